"""Mean attention distance: how far from a patch lies what it attends to."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=32)
def patch_distances(grid: tuple[int, int]) -> Tensor:
    """Distance between the centres of two patches, as a share of the image's side, (N, N), float32."""
    rows = (torch.arange(grid[0], dtype=torch.float64) + 0.5) / grid[0]
    columns = (torch.arange(grid[1], dtype=torch.float64) + 0.5) / grid[1]
    centres = torch.cartesian_prod(rows, columns)
    return (centres[:, None] - centres[None]).square().sum(dim=-1).sqrt().float()


def attention_distance(attention: Tensor, grid: tuple[int, int]) -> Tensor:
    """The mean attention distance of each map, as a share of the image's side: 0 looks at itself, uniform 0.52 on a fine grid.

    Dosovitskiy et al. (2021, arXiv:2010.11929), figure 7 and appendix D.7; Raghu et al. (2021, arXiv:2108.08810):
    the distance between a query patch and every key patch, weighted by attention, mean over queries. They count pixels; a
    share of the side is the same measure for models of other image sizes. Class token, distillation token and registers
    have no place: they are left out as queries and as keys, and rows are renormalised.

    attention: (..., P+N, P+N), the N patches last, rows sum to 1. Returns (...).
    """
    patches = grid[0] * grid[1]
    weights = attention[..., -patches:, -patches:]
    distances = patch_distances(grid).to(weights)
    # a row without any mass on patches would be 0/0
    mass = weights.sum(dim=-1).clamp_min(torch.finfo(weights.dtype).tiny)
    return ((weights * distances).sum(dim=-1) / mass).mean(dim=-1)
