"""uwso: softmax of inverse losses, UW-SO (Kirchdorfer et al. 2024, arXiv:2408.07985, eq. 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class UWSOConfig:
    name: str = "uwso"
    temperature: float = field(default=2.0, metadata={"min": 1e-6})
    # Statistics are divided by their value at the loss's first active step (first) or taken as they are (none).
    scale: str = field(default="first", metadata={"choices": ("first", "none")})
    # The weights sum to the number of active losses, or to one.
    total: str = field(default="n_active", metadata={"choices": ("n_active", "one")})
    # Statistics of un-ramped losses (weights_then_ramp) or, as in the literal reading, of ramped ones.
    order: str = field(default="weights_then_ramp", metadata={"choices": ("weights_then_ramp", "ramp_then_weights")})

    def build(self, losses: Sequence[str]) -> nn.Module:
        return UWSOWeighting(self, losses)


class UWSOWeighting(nn.Module):
    """w = softmax_k((1/(stat_k + 1e-8))/T) over active losses, times their number (`total=n_active`)."""

    first: Tensor

    def __init__(self, config: UWSOConfig, losses: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.index = {name: i for i, name in enumerate(losses)}
        # 0 = this loss has not been active yet; kept in the checkpoint
        self.register_buffer("first", torch.zeros(len(losses)))

    def forward(self, losses: Mapping[str, Tensor], ramps: Mapping[str, float]) -> dict[str, Tensor]:
        """Weights of the active losses (scalars, un-ramped), without gradient."""
        active = list(losses)
        statistic = torch.stack([losses[name].detach().float() for name in active])
        if self.config.order == "ramp_then_weights":
            statistic = statistic * statistic.new_tensor([ramps[name] for name in active])
        if self.config.scale == "first":
            where = torch.tensor([self.index[name] for name in active], device=statistic.device)
            known = self.first[where]
            start = torch.where(known > 0, known, statistic.clamp_min(1e-6))
            self.first = self.first.index_copy(0, where, start)
            statistic = statistic / start
        weights = torch.softmax(1 / (statistic + 1e-8) / self.config.temperature, dim=0)
        if self.config.total == "n_active":
            weights = weights * len(active)
        return dict(zip(active, weights.unbind(), strict=True))
