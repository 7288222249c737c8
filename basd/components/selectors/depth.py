"""Which teacher layer lies at the depth of each extraction point."""

from __future__ import annotations

import torch
from torch import Tensor

from basd.components.sizes import Sizes


def proportional_layers(sizes: Sizes) -> tuple[float, ...]:
    """Teacher layer at the same relative depth as each point: (p+1)·L/L_s − 1, not rounded."""
    return tuple((p + 1) * sizes.teacher_depth / sizes.student_depth - 1 for p in sizes.points)


def nearest_layers(sizes: Sizes) -> tuple[int, ...]:
    """The teacher's block nearest to proportional depth, per point (halves round up)."""
    return tuple(min(max(int(layer + 0.5), 0), sizes.teacher_depth - 1) for layer in proportional_layers(sizes))


def gaussian_prior(sizes: Sizes) -> Tensor:
    """Logits of a Gaussian at proportional depth with a standard deviation of L/M layers, (M, L)."""
    deviation = sizes.teacher_depth / len(sizes.points)
    layers = torch.arange(sizes.teacher_depth, dtype=torch.float32)
    centers = torch.tensor(proportional_layers(sizes), dtype=torch.float32)
    return -((layers - centers[:, None]) ** 2) / (2 * deviation**2)
