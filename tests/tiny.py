"""Tiny arms and what the tests compare of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file

TINY = [
    "data.image_size=20",
    "teacher.image_size=20",
    "student.image_size=20",
    "student.patch_size=4",
    "teacher.epochs=1",
    "teacher.width=16",
    "teacher.depth=2",
    "teacher.heads=2",
    "teacher.batch_size=64",
    "student.width=12",
    "student.depth=3",
    "student.heads=3",
    "student.points=2",
    "student.drop_path=0.2",
    "recipe.batch_size=200",
    "recipe.duration=3 epochs",
    "recipe.validate_every=2",
    "runtime.checkpoint_interval=0",
    "runtime.log_every=2",
    # as long as the training of so small an arm: on where a test is about them
    "runtime.probes=false",
]


class MemoryRecorder:
    """Keeps what is recorded; positions are counts of events."""

    def __init__(self) -> None:
        self.events: list[tuple[int, dict[str, float]]] = []

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.events.append((step, dict(values)))

    def flush(self) -> int:
        return len(self.events)

    def rewind(self, position: int) -> None:
        if position > len(self.events):
            raise ValueError("shorter than the checkpoint knows")
        del self.events[position:]

    @property
    def results(self) -> list[tuple[int, dict[str, float]]]:
        """Without what the clock and the machine say."""
        kept = [(s, {k: v for k, v in m.items() if k.split("/")[0] not in ("time", "system")}) for s, m in self.events]
        return [(step, values) for step, values in kept if values]


def state_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "student.safetensors")


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
