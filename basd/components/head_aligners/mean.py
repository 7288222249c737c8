"""mean: the attention averaged over heads, on both sides; nothing is learned, and head counts may differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from basd.components.head_aligners.base import HeadAligner, safe_log
from basd.components.sizes import Sizes


@dataclass
class MeanConfig:
    name: str = "mean"

    all_layers: ClassVar[bool] = False

    def build(self, sizes: Sizes) -> HeadAligner:
        return MeanHeadAligner()


class MeanHeadAligner(HeadAligner):
    averages_heads = True

    def forward(self, scores: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
        """scores (M, B, H_s, Q, K), maps (M, B, H_t, Q, K) → log-probabilities and probabilities (M, B, 1, Q, K)."""
        return safe_log(scores.softmax(dim=-1).mean(dim=2, keepdim=True)), maps.mean(dim=2, keepdim=True)
