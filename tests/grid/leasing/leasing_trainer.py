"""The trainer of grid_fakes, leaving word of its GPU: `used`, and `clash` where another process has the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import grid_fakes

from basd.grid.processes import process_start


def train_cohort(arms: Any, directories: Any, recorders: Any, **callbacks: Any) -> Any:
    device = os.environ["CUDA_VISIBLE_DEVICES"]
    folder = Path(os.environ["BASD_LEASES"]).parent
    mark = folder / f"busy-{device}"
    try:
        holder = int(mark.read_text())
    except FileNotFoundError:
        holder = -1
    if holder > 0 and process_start(holder) is not None:  # one that was killed leaves its mark
        (folder / "clash").write_text(f"{holder} and {os.getpid()} on {device}")
    mark.write_text(str(os.getpid()))
    with open(folder / "used", "a") as file:
        file.write(f"{device} {os.getpid()}\n")
    try:
        return grid_fakes.train_cohort(arms, directories, recorders, **callbacks)
    finally:
        mark.unlink()
