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


def resample_attention(attention: Tensor, target: tuple[int, int], source: tuple[int, int]) -> Tensor:
    """Q A Mᵀ: an attention map moved to another grid; the class token's row and column are kept.

    attention: (..., 1+N_source, 1+N_source), rows sum to 1. Returns (..., 1+N_target, 1+N_target), rows sum to 1.
    Q's rows sum to 1 over source cells, M's columns over target cells (resizing the map itself gives row sums 0.77).
    """
    if target == source:
        return attention
    queries = torch.block_diag(torch.ones(1, 1), row_resampling(target, source)).to(attention)
    keys = torch.block_diag(torch.ones(1, 1), column_resampling(target, source)).to(attention)
    return queries @ (attention @ keys.T)
