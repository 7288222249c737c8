"""fixed: a weight per loss, given by the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class FixedWeights:
    rsd: float = field(default=1.0, metadata={"min": 0.0})
    rel: float = field(default=1.0, metadata={"min": 0.0})
    attn: float = field(default=1.0, metadata={"min": 0.0})
    spectral: float = field(default=1.0, metadata={"min": 0.0})


@dataclass
class FixedConfig:
    name: str = "fixed"
    weights: FixedWeights = field(default_factory=FixedWeights)

    def build(self, losses: Sequence[str]) -> nn.Module:
        return FixedWeighting({name: getattr(self.weights, name) for name in losses})


class FixedWeighting(nn.Module):
    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = dict(weights)

    def forward(self, losses: Mapping[str, Tensor], ramps: Mapping[str, float]) -> dict[str, Tensor]:
        """Weights of the active losses, without gradient."""
        return {name: torch.full_like(value.detach(), self.weights[name]) for name, value in losses.items()}
