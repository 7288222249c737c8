"""Which rows of a batch are made here: all of them, or those of one process among several."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """Random numbers are drawn for a batch of `whole` images, and those of `rows` (int64, on the CPU) are used.

    So a row is the same bits whether the batch is made in one process or in several. Without rows: all of them.
    """

    whole: int
    rows: Tensor | None = None

    def take(self, drawn: Tensor, dim: int = 0) -> Tensor:
        """The rows of what was drawn for the whole batch."""
        return drawn if self.rows is None else drawn.index_select(dim, self.rows)


def whole(images: Tensor) -> Part:
    """All rows of a batch (B,…)."""
    return Part(images.shape[0])
