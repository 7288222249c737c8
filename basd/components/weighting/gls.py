"""gls: the geometric mean of the losses, GLS (Chennupati et al. 2019, MultiNet++, arXiv:1904.08492)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from basd.components.sizes import Sizes
from basd.components.weighting.base import EPSILON, SCALES, Active, Generators, Weighting


@dataclass
class GLSConfig:
    name: str = "gls"
    # Unit of each loss: its first value (first), the mean of the first values (first_mean), 1 (none). Of a geometric
    # mean it changes the length only, not the direction.
    scale: str = field(default="none", metadata={"choices": SCALES})

    def build(self, losses: Sequence[str], sizes: Sizes) -> Weighting:
        return GLSWeighting(losses, self.scale)


class GLSWeighting(Weighting):
    """w = GM/(n·L_k), GM = (Π L_k)^{1/n} over the n active losses: Σ w·L and its gradient are those of GM."""

    def weigh(self, active: Active, step: int, generator: Generators | None) -> Tensor:
        logs = (active.scaled + EPSILON).log()
        return (logs.mean() - logs).exp() / len(logs)
