"""The device and the threads that a process trains with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from basd import distributed
from basd.config import Config
from basd.distributed import local_rows, world
from basd.errors import UserError


def choose_device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UserError(f"runtime.device={wanted} is not a device; write auto, cpu, cuda or cuda:0.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"runtime.device={wanted}, but no CUDA device is usable here; choose runtime.device=cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"runtime.device={wanted}, but there are {torch.cuda.device_count()} CUDA devices, numbered from 0."
        )
    return device


def check_device(config: Config) -> torch.device:
    """The device of this process; `UserError` where it is not there, or where the batch cannot be split over the processes."""
    if world() > 1:
        local_rows(config.recipe.batch_size, 0, world() * config.recipe.accumulation)
    return distributed.local_device(choose_device(config.runtime.device))


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Torch computes with this many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
