"""conv: a 1×1 convolution without bias over the heads of the point, on pre-softmax scores.

Source: Align-to-Distill (arXiv:2403.01479), with the softmax taken over each row and after the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from basd.components.sizes import Sizes


@dataclass
class ConvConfig:
    name: str = "conv"

    def build(self, sizes: Sizes) -> nn.Module:
        return ConvHeadAligner(sizes)


class ConvHeadAligner(nn.Module):
    """Teacher head h starts as student head ⌊h·H_s/H_t⌋ plus noise of 0.02, per point."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        nearest = torch.arange(sizes.teacher_heads) * sizes.student_heads // sizes.teacher_heads
        start = nn.functional.one_hot(nearest, sizes.student_heads).float()
        noise = 0.02 * torch.randn(len(sizes.points), sizes.teacher_heads, sizes.student_heads)
        self.weight = nn.Parameter(start + noise)

    def forward(self, scores: Tensor) -> Tensor:
        """scores (M, B, H_s, Q, K) → log-probabilities (M, B, H_t, Q, K)."""
        mixed = self.weight.unsqueeze(1) @ scores.flatten(3)
        return mixed.unflatten(3, scores.shape[3:]).log_softmax(dim=-1)
