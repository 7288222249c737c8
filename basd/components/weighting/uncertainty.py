"""uncertainty: Σ L/(2e^s) + s/2, s = log σ² learned (Kendall et al. 2018, arXiv:1705.07115)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from basd.components.sizes import Sizes
from basd.components.weighting.base import SCALES, Weighting
from basd.components.weighting.learned import LearnedWeighting

START = -0.5


@dataclass
class UncertaintyConfig:
    name: str = "uncertainty"
    # Unit of each loss: its first value (first), the mean of the first values (first_mean), 1 (none). Where s settles the
    # scale has cancelled; it says how far s has to go.
    scale: str = field(default="none", metadata={"choices": SCALES})

    def build(self, losses: Sequence[str], sizes: Sizes) -> Weighting:
        return UncertaintyWeighting(losses, self.scale, START)


class UncertaintyWeighting(LearnedWeighting):
    """w = 1/(2e^s); s settles at log L, where the weighted loss is ½. An optimizer like Adam moves s by about lr a step."""

    def weight(self, s: Tensor) -> Tensor:
        return (-s).exp() / 2

    def penalty(self, s: Tensor) -> Tensor:
        return s / 2
