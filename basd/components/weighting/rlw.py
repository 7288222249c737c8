"""rlw: random weights at every step, RLW (Lin et al. 2021, arXiv:2111.10603): the control that knows nothing of the losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from basd.components.sizes import Sizes
from basd.components.weighting.base import SCALES, TOTALS, Active, Generators, Weighting, with_total

# Purpose of the random stream that the weights are drawn from.
WEIGHTS_STREAM = "rlw"


@dataclass
class RLWConfig:
    name: str = "rlw"
    # Unit of each loss: its first value (first), the mean of the first values (first_mean), 1 (none).
    scale: str = field(default="none", metadata={"choices": SCALES})
    # The weights sum to the number of active losses, or to one.
    total: str = field(default="n_active", metadata={"choices": TOTALS})

    def build(self, losses: Sequence[str], sizes: Sizes) -> Weighting:
        return RLWWeighting(self, losses)


class RLWWeighting(Weighting):
    """w = softmax of standard normals over active losses, times their number (`total=n_active`)."""

    def __init__(self, config: RLWConfig, losses: Sequence[str]) -> None:
        super().__init__(losses, config.scale)
        self.total = config.total

    def weigh(self, active: Active, step: int, generator: Generators | None) -> Tensor:
        assert generator is not None
        # one draw per loss, active or not: which others are active does not change a loss's own
        drawn = torch.randn(len(self.index), generator=generator(WEIGHTS_STREAM))
        normals = drawn[[self.index[name] for name in active.names]].to(active.values.device)
        return with_total(normals.softmax(dim=0), self.total)
