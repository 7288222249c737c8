"""equal: every active loss has weight 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class EqualConfig:
    name: str = "equal"

    def build(self, losses: Sequence[str]) -> nn.Module:
        return EqualWeighting()


class EqualWeighting(nn.Module):
    def forward(self, losses: Mapping[str, Tensor], ramps: Mapping[str, float]) -> dict[str, Tensor]:
        """Weights of the active losses, without gradient."""
        return {name: torch.ones_like(value.detach()) for name, value in losses.items()}
