"""imtl_l: Σ e^s·L − s, s learned, the loss balance of IMTL (Liu et al. 2021, Towards Impartial Multi-task Learning, ICLR)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from basd.components.sizes import Sizes
from basd.components.weighting.base import SCALES, Weighting
from basd.components.weighting.learned import LearnedWeighting

START = 0.0


@dataclass
class IMTLLConfig:
    name: str = "imtl_l"
    # Unit of each loss: its first value (first), the mean of the first values (first_mean), 1 (none). Where s settles the
    # scale has cancelled; it says how far s has to go.
    scale: str = field(default="none", metadata={"choices": SCALES})

    def build(self, losses: Sequence[str], sizes: Sizes) -> Weighting:
        return IMTLLWeighting(losses, self.scale, START)


class IMTLLWeighting(LearnedWeighting):
    """w = e^s; s settles at −log L, where the weighted loss is 1. An optimizer like Adam moves s by about lr a step."""

    def weight(self, s: Tensor) -> Tensor:
        return s.exp()

    def penalty(self, s: Tensor) -> Tensor:
        return -s
