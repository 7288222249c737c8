"""none: student and teacher heads are compared one to one; needs equal head counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from basd.components.head_aligners.base import HeadAligner
from basd.components.sizes import Sizes


@dataclass
class IdentityConfig:
    name: str = "none"

    all_layers: ClassVar[bool] = False

    def build(self, sizes: Sizes) -> HeadAligner:
        return IdentityHeadAligner()


class IdentityHeadAligner(HeadAligner):
    def forward(self, scores: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
        """scores (M, B, H, Q, K) → log-probabilities of the same shape; the teacher's maps stay as they are."""
        return scores.log_softmax(dim=-1), maps
