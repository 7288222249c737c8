"""dwa: losses that fall slowly count more, DWA (Liu et al. 2019, arXiv:1803.10704, eq. 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from basd.components.sizes import Sizes
from basd.components.weighting.base import EPSILON, SCALES, Active, Generators, Weighting, with_total


@dataclass
class DWAConfig:
    name: str = "dwa"
    temperature: float = field(default=2.0, metadata={"min": 1e-6})
    # Unit of each loss: its first value (first), the mean of the first values (first_mean), 1 (none).
    scale: str = field(default="none", metadata={"choices": SCALES})

    def build(self, losses: Sequence[str], sizes: Sizes) -> Weighting:
        return DWAWeighting(self, losses, sizes.steps_per_epoch)


class DWAWeighting(Weighting):
    """w = n·softmax(r/T) over the n active losses, r the ratio of a loss's means in the last two epochs it was active in.

    In its first two epochs r = 1. The ratio is that of the losses as they are: a scale would cancel in it.
    """

    epoch: Tensor
    sums: Tensor
    counts: Tensor
    means: Tensor

    def __init__(self, config: DWAConfig, losses: Sequence[str], steps_per_epoch: int) -> None:
        super().__init__(losses, config.scale)
        self.temperature = config.temperature
        self.steps_per_epoch = steps_per_epoch
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))
        # of the epoch that is running
        self.register_buffer("sums", torch.zeros(len(losses)))
        self.register_buffer("counts", torch.zeros(len(losses)))
        # the last epoch's and the one's before, (2, K); 0 = there was none
        self.register_buffer("means", torch.zeros(2, len(losses)))

    def weigh(self, active: Active, step: int, generator: Generators | None) -> Tensor:
        epoch = step // self.steps_per_epoch
        if epoch != int(self.epoch):
            self._close_epoch(epoch)
        where = self.places(active.names, active.values.device)
        self.sums = self.sums.index_add(0, where, active.values)
        self.counts = self.counts.index_add(0, where, torch.ones_like(active.values))
        last, before = self.means[:, where]
        known = (last > 0) & (before > 0)
        ratio = torch.where(known, last.clamp_min(EPSILON) / before.clamp_min(EPSILON), 1.0)
        return with_total((ratio / self.temperature).softmax(dim=0), "n_active")

    def _close_epoch(self, epoch: int) -> None:
        """A loss that was not active in the epoch keeps its means."""
        fresh = torch.stack([self.sums / self.counts.clamp_min(1), self.means[0]])
        self.means = torch.where(self.counts > 0, fresh, self.means)
        self.sums, self.counts = torch.zeros_like(self.sums), torch.zeros_like(self.counts)
        self.epoch = torch.full_like(self.epoch, epoch)
