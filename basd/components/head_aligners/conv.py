"""conv: a 1×1 convolution without bias over the heads, on pre-softmax scores.

Source: Align-to-Distill (arXiv:2403.01479), with the softmax taken over each row and after the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from basd.components.head_aligners.base import STACKS, HeadAligner, mix_heads, nearest_heads, stacks_points
from basd.components.sizes import Sizes


@dataclass
class ConvConfig:
    name: str = "conv"
    # Student heads that a teacher head is made of: those of its point, or those of all points.
    stack: str = field(default="point", metadata={"choices": STACKS})

    all_layers: ClassVar[bool] = False

    def build(self, sizes: Sizes) -> HeadAligner:
        return ConvHeadAligner(self, sizes)


class ConvHeadAligner(HeadAligner):
    """Teacher head h starts as student head ⌊h·H_s/H_t⌋ of its point plus noise of 0.02."""

    def __init__(self, config: ConvConfig, sizes: Sizes) -> None:
        super().__init__()
        start = nearest_heads(sizes, stacks_points(config.stack, sizes))
        self.weight = nn.Parameter(start + 0.02 * torch.randn(start.shape))

    def forward(self, scores: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
        """scores (M, B, H_s, Q, K) → log-probabilities (M, B, H_t, Q, K); the teacher's maps stay as they are."""
        return mix_heads(self.weight, scores).log_softmax(dim=-1), maps
