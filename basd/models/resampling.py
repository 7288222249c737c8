"""Area-overlap resampling between two patch grids that cover the same image."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def interval_overlap(cells_a: int, cells_b: int) -> Tensor:
    """Lengths shared by cell i of a unit interval cut in `cells_a` and cell j of one cut in `cells_b`: (a, b), float64."""
    edges_a = torch.arange(cells_a + 1, dtype=torch.float64) / cells_a
    edges_b = torch.arange(cells_b + 1, dtype=torch.float64) / cells_b
    low = torch.maximum(edges_a[:-1, None], edges_b[None, :-1])
    high = torch.minimum(edges_a[1:, None], edges_b[None, 1:])
    return (high - low).clamp_min(0.0)


@lru_cache(maxsize=32)
def area_overlap(target: tuple[int, int], source: tuple[int, int]) -> Tensor:
    """Area shared by each target cell and each source cell as a share of the image: (N_target, N_source), float64."""
    rows = interval_overlap(target[0], source[0])
    columns = interval_overlap(target[1], source[1])
    joint = torch.einsum("ac,bd->abcd", rows, columns)
    return joint.reshape(target[0] * target[1], source[0] * source[1])


@lru_cache(maxsize=32)
def row_resampling(target: tuple[int, int], source: tuple[int, int]) -> Tensor:
    """(N_target, N_source), rows sum to 1 over source cells: means of what a target cell covers. float32."""
    overlap = area_overlap(target, source)
    return (overlap / overlap.sum(dim=1, keepdim=True)).float()


@lru_cache(maxsize=32)
def column_resampling(target: tuple[int, int], source: tuple[int, int]) -> Tensor:
    """(N_target, N_source), columns sum to 1 over target cells: mass of a source cell is shared out. float32."""
    overlap = area_overlap(target, source)
    return (overlap / overlap.sum(dim=0, keepdim=True)).float()


# Source cells from which on the matrices are cut into bands; below, one small product is faster than several.
BANDED_CELLS = 128
BAND_ROWS = 2

Band = tuple[slice, slice, Tensor]


@lru_cache(maxsize=64)
def _bands(target: tuple[int, int], source: tuple[int, int], queries: bool, banded: bool) -> list[Band]:
    """A resampling matrix in blocks (target tokens, source tokens, weights), the class token first, at 0.

    A row of target cells overlaps two or three rows of source cells; the matrix is zero elsewhere.
    """
    matrix = row_resampling(target, source) if queries else column_resampling(target, source)
    height = BAND_ROWS if banded else target[0]
    blocks = []
    for start in range(0, target[0], height):
        end = min(target[0], start + height)
        first, last = start * source[0] // target[0], -(-end * source[0] // target[0])
        to = slice(1 + start * target[1], 1 + end * target[1])
        of = slice(1 + first * source[1], 1 + last * source[1])
        blocks.append((to, of, matrix[to.start - 1 : to.stop - 1, of.start - 1 : of.stop - 1].contiguous()))
    return blocks


def resample_attention(
    attention: Tensor, target: tuple[int, int], source: tuple[int, int], out: Tensor | None = None
) -> Tensor:
    """Q A Mᵀ: an attention map moved to another grid; the class token's row and column are kept.

    attention: (..., 1+N_source, 1+N_source), rows sum to 1. Returns (..., 1+N_target, 1+N_target), rows sum to 1, in
    `out` (contiguous) where that is given. Q's rows sum to 1 over source cells, M's columns over target cells (resizing
    the map itself gives row sums 0.77). Not differentiable.
    """
    tokens = 1 + target[0] * target[1]
    if out is None:
        out = attention.new_empty(*attention.shape[:-2], tokens, tokens)
    if target == source:
        return out.copy_(attention)
    banded = attention.device.type == "cpu" and source[0] * source[1] >= BANDED_CELLS
    with torch.no_grad():
        flat = attention.reshape(-1, attention.shape[-1])
        keys = flat.new_empty(flat.shape[0], tokens)
        keys[:, 0] = flat[:, 0]
        for to, of, weights in _bands(target, source, False, banded):
            torch.mm(flat[:, of], weights.to(flat).T, out=keys[:, to])
        keys = keys.view(-1, attention.shape[-2], tokens)
        maps = out.view(-1, tokens, tokens)
        maps[:, 0] = keys[:, 0]
        for to, of, weights in _bands(target, source, True, banded):
            torch.bmm(weights.to(keys).expand(keys.shape[0], -1, -1), keys[:, of], out=maps[:, to])
    return out
