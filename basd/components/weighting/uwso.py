"""uwso: softmax of inverse losses, UW-SO (Kirchdorfer et al. 2024, arXiv:2408.07985, eq. 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from basd.components.sizes import Sizes
from basd.components.weighting.base import EPSILON, SCALES, TOTALS, Active, Generators, Weighting, with_total


@dataclass
class UWSOConfig:
    name: str = "uwso"
    temperature: float = field(default=2.0, metadata={"min": 1e-6})
    # Statistics are divided by their value at the loss's first active step (first), by the mean of these values
    # (first_mean) or taken as they are (none). The losses themselves are not scaled.
    scale: str = field(default="first", metadata={"choices": SCALES})
    # The weights sum to the number of active losses, or to one.
    total: str = field(default="n_active", metadata={"choices": TOTALS})
    # Statistics of un-ramped losses (weights_then_ramp) or, as in the literal reading, of ramped ones.
    order: str = field(default="weights_then_ramp", metadata={"choices": ("weights_then_ramp", "ramp_then_weights")})

    def build(self, losses: Sequence[str], sizes: Sizes) -> Weighting:
        return UWSOWeighting(self, losses)


class UWSOWeighting(Weighting):
    """w = softmax_k((1/(stat_k + 1e-8))/T) over active losses, times their number (`total=n_active`)."""

    scales_losses = False

    def __init__(self, config: UWSOConfig, losses: Sequence[str]) -> None:
        super().__init__(losses, config.scale)
        self.config = config

    def active(self, losses: Mapping[str, Tensor], ramps: Mapping[str, float]) -> Active:
        found = super().active(losses, ramps)
        if self.config.order == "weights_then_ramp":
            return found
        # ramped after the scale: a first value that was ramped too would hide the ramp for the rest of training
        ramped = found.scaled * found.scaled.new_tensor([ramps[name] for name in found.names])
        return replace(found, scaled=ramped)

    def weigh(self, active: Active, step: int, generator: Generators | None) -> Tensor:
        weights = torch.softmax(1 / (active.scaled + EPSILON) / self.config.temperature, dim=0)
        return with_total(weights, self.config.total)
