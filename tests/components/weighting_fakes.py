"""Losses, ramps and streams for the tests of the weightings."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from basd.components.sizes import Sizes
from basd.components.weighting import WEIGHTINGS
from basd.components.weighting.base import Weighting

NAMES = ("rsd", "rel", "attn", "spectral")


def sizes(steps_per_epoch: int = 4) -> Sizes:
    return Sizes(
        points=(0, 1),
        image_size=24,
        student_depth=4,
        student_width=6,
        student_heads=2,
        student_grid=(3, 5),
        teacher_depth=3,
        teacher_width=8,
        teacher_heads=4,
        teacher_grid=(4, 3),
        total_steps=10 * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
    )


def losses(*values: float, names: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    return {name: torch.tensor(value, requires_grad=True) for name, value in zip(names, values, strict=False)}


def ramps(*values: float) -> dict[str, float]:
    return dict(zip(NAMES, values or (1.0,) * 4, strict=False))


def generators(seed: int) -> Callable[[str], torch.Generator]:
    return lambda purpose: torch.Generator().manual_seed(1000 * seed + len(purpose))


def build(name: str, only: tuple[str, ...] = NAMES, steps_per_epoch: int = 4, **options: Any) -> Weighting:
    weighting = WEIGHTINGS[name](**options).build(only, sizes(steps_per_epoch))
    assert isinstance(weighting, Weighting)
    return weighting


def weigh(weighting: Weighting, values: dict[str, Tensor], step: int = 0, factors: Any = None) -> dict[str, Tensor]:
    return weighting(values, ramps() if factors is None else factors, step, generators(step))


def formula(statistics: list[float], temperature: float) -> list[float]:
    scores = [1 / (s + 1e-8) / temperature for s in statistics]
    powers = [math.exp(s - max(scores)) for s in scores]
    return [p / sum(powers) for p in powers]


def numbers(weights: dict[str, Tensor]) -> list[float]:
    return [float(w) for w in weights.values()]


def check(weights: dict[str, Tensor], expected: list[float]) -> None:
    assert numbers(weights) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert not any(w.requires_grad for w in weights.values())
