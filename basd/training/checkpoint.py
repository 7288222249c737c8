"""Checkpoints that survive a kill at any moment: written aside, synced, verified, renamed; the previous one is kept."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

CURRENT = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"


def save_checkpoint(directory: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint of an arm. `state` holds tensors, numbers, texts, lists and dictionaries only."""
    fresh = directory / f"{CURRENT}.{os.getpid()}.tmp"
    with open(fresh, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    _read(fresh)
    current = directory / CURRENT
    if current.exists():
        # a hard link, so that at every moment a complete checkpoint bears the current name
        kept = directory / f"{PREVIOUS}.{os.getpid()}.tmp"
        kept.unlink(missing_ok=True)
        os.link(current, kept)
        os.replace(kept, directory / PREVIOUS)
    os.replace(fresh, current)
    sync_directory(directory)


def load_checkpoint(directory: Path) -> tuple[dict[str, Any] | None, str | None]:
    """The newest readable checkpoint of an arm, or None, and a sentence if a damaged one had to be passed over."""
    damaged: list[str] = []
    for name in (CURRENT, PREVIOUS):
        path = directory / name
        if not path.exists():
            continue
        try:
            state = _read(path)
        except Exception:
            damaged.append(name)
            continue
        return state, _passed_over(damaged, f"continuing from {name}")
    return None, _passed_over(damaged, "starting this arm again from its first step")


def _passed_over(damaged: list[str], then: str) -> str | None:
    return f"{' and '.join(damaged)} cannot be read (cut off or damaged); {then}." if damaged else None


def _read(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def remove_checkpoints(directory: Path) -> None:
    """After an arm is complete."""
    for path in directory.glob("checkpoint*.pt*"):
        path.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Make a rename durable, where the platform can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
