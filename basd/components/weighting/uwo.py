"""uwo: inverse losses, UW-O (Kirchdorfer et al. 2024, arXiv:2408.07985): uncertainty weighting with σ² at its optimum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from basd.components.sizes import Sizes
from basd.components.weighting.base import EPSILON, SCALES, TOTALS, Active, Generators, Weighting, with_total


@dataclass
class UWOConfig:
    name: str = "uwo"
    # Statistics are divided by their value at the loss's first active step (first), by the mean of these values
    # (first_mean) or taken as they are (none). The losses themselves are not scaled.
    scale: str = field(default="none", metadata={"choices": SCALES})
    # Every weighted loss has the value 1 (none), or the weights sum to the number of active losses, or to one.
    total: str = field(default="none", metadata={"choices": ("none", *TOTALS)})

    def build(self, losses: Sequence[str], sizes: Sizes) -> Weighting:
        return UWOWeighting(self, losses)


class UWOWeighting(Weighting):
    """w = 1/(stat_k + 1e-8): without a scale each weighted loss has the value 1, with `first` its own first value."""

    scales_losses = False

    def __init__(self, config: UWOConfig, losses: Sequence[str]) -> None:
        super().__init__(losses, config.scale)
        self.total = config.total

    def weigh(self, active: Active, step: int, generator: Generators | None) -> Tensor:
        weights = 1 / (active.scaled + EPSILON)
        return weights if self.total == "none" else with_total(weights / weights.sum(), self.total)
