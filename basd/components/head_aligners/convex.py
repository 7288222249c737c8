"""convex: every teacher head is a convex combination of student heads' probabilities.

The rows of the 1×1 convolution are a softmax, so what it makes of attention maps are attention maps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from basd.components.head_aligners.base import (
    STACKS,
    HeadAligner,
    mix_heads,
    nearest_heads,
    safe_log,
    stacks_points,
)
from basd.components.sizes import Sizes

# Share of the nearest student head at the start: the softmax still has three quarters of its steepest gradient.
NEAREST_SHARE = 0.75


@dataclass
class ConvexConfig:
    name: str = "convex"
    # Student heads that a teacher head is made of: those of its point, or those of all points.
    stack: str = field(default="point", metadata={"choices": STACKS})

    all_layers: ClassVar[bool] = False

    def build(self, sizes: Sizes) -> HeadAligner:
        return ConvexHeadAligner(self, sizes)


class ConvexHeadAligner(HeadAligner):
    """A_h = Σ_s softmax_s(weight_h)·A_s; teacher head h starts with ¾ of student head ⌊h·H_s/H_t⌋ of its point."""

    def __init__(self, config: ConvexConfig, sizes: Sizes) -> None:
        super().__init__()
        start = nearest_heads(sizes, stacks_points(config.stack, sizes))
        odds = NEAREST_SHARE / (1 - NEAREST_SHARE) * max(start.shape[2] - 1, 1)
        self.weight = nn.Parameter(math.log(odds) * start + 0.02 * torch.randn(start.shape))

    def forward(self, scores: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
        """scores (M, B, H_s, Q, K) → log-probabilities (M, B, H_t, Q, K); the teacher's maps stay as they are."""
        return safe_log(mix_heads(self.weight.softmax(dim=-1), scores.softmax(dim=-1))), maps
