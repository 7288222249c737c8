"""equal: every active loss has weight 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from basd.components.sizes import Sizes
from basd.components.weighting.base import SCALES, Active, Generators, Weighting


@dataclass
class EqualConfig:
    name: str = "equal"
    # Unit of each loss: its first value (first), the mean of the first values (first_mean), 1 (none).
    scale: str = field(default="none", metadata={"choices": SCALES})

    def build(self, losses: Sequence[str], sizes: Sizes) -> Weighting:
        return EqualWeighting(losses, self.scale)


class EqualWeighting(Weighting):
    def weigh(self, active: Active, step: int, generator: Generators | None) -> Tensor:
        return torch.ones_like(active.values)
