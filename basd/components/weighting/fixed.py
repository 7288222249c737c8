"""fixed: a weight per loss, given by the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from basd.components.sizes import Sizes
from basd.components.weighting.base import SCALES, Active, Generators, Weighting


@dataclass
class FixedWeights:
    rsd: float = field(default=1.0, metadata={"min": 0.0})
    rel: float = field(default=1.0, metadata={"min": 0.0})
    attn: float = field(default=1.0, metadata={"min": 0.0})
    spectral: float = field(default=1.0, metadata={"min": 0.0})
    logit: float = field(default=1.0, metadata={"min": 0.0})
    feature: float = field(default=1.0, metadata={"min": 0.0})


@dataclass
class FixedConfig:
    name: str = "fixed"
    weights: FixedWeights = field(default_factory=FixedWeights)
    # Unit of each loss: its first value (first), the mean of the first values (first_mean), 1 (none).
    scale: str = field(default="none", metadata={"choices": SCALES})

    def build(self, losses: Sequence[str], sizes: Sizes) -> Weighting:
        return FixedWeighting(self, losses)


class FixedWeighting(Weighting):
    def __init__(self, config: FixedConfig, losses: Sequence[str]) -> None:
        super().__init__(losses, config.scale)
        self.weights = {name: getattr(config.weights, name) for name in losses}

    def weigh(self, active: Active, step: int, generator: Generators | None) -> Tensor:
        return active.values.new_tensor([self.weights[name] for name in active.names])
