"""What every loss weighting offers, and the scale that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# `scale`, the unit that a loss is measured in before it is weighted: its own value at its first active step (first), the
# mean of these values over the losses that have been active so far, so that relative sizes stay (first_mean), or 1 (none).
SCALES = ("first", "first_mean", "none")
# Least first value.
FIRST_FLOOR = 1e-6
# Added where a loss divides, so that a loss of 0 has a finite weight.
EPSILON = 1e-8
# `total`: the weights sum to the number of active losses, or to one.
TOTALS = ("n_active", "one")

Generators = Callable[[str], torch.Generator]


@dataclass(frozen=True)
class Active:
    """The losses of one step: n of them, without gradient, float32."""

    names: list[str]
    # (n,) as they are
    values: Tensor
    # (n,) divided by the scale
    scaled: Tensor
    # (n,) the scale; None where it is 1
    scale: Tensor | None


class Weighting(nn.Module):
    """Weights of the active losses of a step.

    `forward(losses, ramps, step, generator)` gets the un-ramped losses (scalars, those of all processes) that are active, their
    ramps in (0, 1], the step from 0 and `generator(purpose)` for the step's random streams; it returns a scalar weight
    without gradient for each. The objective adds Σ w·ramp·L and `term`.

    A subclass gives `weigh`: the weights of the scaled losses. Since w·(L/scale) = (w/scale)·L, what is returned is
    w/scale. Where `scales_losses` is false the scale is only in what the weights are computed from, and w is returned.
    """

    first: Tensor
    scales_losses = True

    def __init__(self, losses: Sequence[str], scale: str = "none") -> None:
        super().__init__()
        self.index = {name: i for i, name in enumerate(losses)}
        self.scale = scale
        if scale != "none":
            # 0 = this loss has not been active yet; kept in the checkpoint
            self.register_buffer("first", torch.zeros(len(losses)))

    def forward(
        self,
        losses: Mapping[str, Tensor],
        ramps: Mapping[str, float],
        step: int = 0,
        generator: Generators | None = None,
    ) -> dict[str, Tensor]:
        """Weights of the active losses, scalars without gradient."""
        active = self.active(losses, ramps)
        weights = self.weigh(active, step, generator)
        if active.scale is not None and self.scales_losses:
            weights = weights / active.scale
        return dict(zip(active.names, weights.unbind(), strict=True))

    def weigh(self, active: Active, step: int, generator: Generators | None) -> Tensor:
        """Weights (n,) of the scaled losses, without gradient."""
        raise NotImplementedError

    def term(self, losses: Mapping[str, Tensor], ramps: Mapping[str, float]) -> Tensor | float:
        """What is added to the total beside the weighted losses, to train the weighting's own parameters."""
        return 0.0

    def active(self, losses: Mapping[str, Tensor], ramps: Mapping[str, float]) -> Active:
        """The losses of a step and their scale; remembers the first value of those that are new."""
        names, values = list(losses), torch.stack([value.detach().float() for value in losses.values()])
        if self.scale == "none":
            return Active(names, values, values, None)
        where = self.places(names, values.device)
        known = self.first[where]
        scale = torch.where(known > 0, known, values.clamp_min(FIRST_FLOOR))
        self.first = self.first.index_copy(0, where, scale)
        if self.scale == "first_mean":
            scale = (self.first.sum() / (self.first > 0).sum()).expand_as(values)
        return Active(names, values, values / scale, scale)

    def places(self, names: Sequence[str], device: torch.device) -> Tensor:
        """Where the losses stand in the state, (n,)."""
        return torch.tensor([self.index[name] for name in names], device=device)


def with_total(weights: Tensor, total: str) -> Tensor:
    """Weights (n,) that sum to one → weights that sum to `total`."""
    return weights * len(weights) if total == "n_active" else weights
