"""The part that weightings with a learned number per loss have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from basd.components.weighting.base import EPSILON, Active, Generators, Weighting


class LearnedWeighting(Weighting):
    """Total = Σ ramp·(w(s_k)·L_k + penalty(s_k)), s_k learned together with the student, without weight decay.

    The ramp multiplies all that a loss brings: s settles where it would without one. (If it left the penalty out, s would
    undo the ramp.) Each s is a parameter of its own: it has no gradient, and no state in the optimizer, before its loss
    is active. The gradient of s sees L + 1e-8, so that a loss of 0 leaves its weight finite.
    """

    def __init__(self, losses: Sequence[str], scale: str, start: float) -> None:
        super().__init__(losses, scale)
        self.s = nn.ParameterDict({name: nn.Parameter(torch.tensor(start)) for name in losses})

    def weight(self, s: Tensor) -> Tensor:
        raise NotImplementedError

    def penalty(self, s: Tensor) -> Tensor:
        raise NotImplementedError

    def weigh(self, active: Active, step: int, generator: Generators | None) -> Tensor:
        return self.weight(self._s(active.names)).detach()

    def term(self, losses: Mapping[str, Tensor], ramps: Mapping[str, float]) -> Tensor:
        """Value Σ ramp·penalty(s); gradient of Σ ramp·(w(s)·L + penalty(s)) for s, and none for the losses."""
        active = self.active(losses, ramps)
        s = self._s(active.names)
        weighted = self.weight(s) * (active.scaled + EPSILON)
        ramp = s.new_tensor([ramps[name] for name in active.names])
        return (ramp * (weighted - weighted.detach() + self.penalty(s))).sum()

    def _s(self, names: Sequence[str]) -> Tensor:
        return torch.stack([self.s[name] for name in names])
