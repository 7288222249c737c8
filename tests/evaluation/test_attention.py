"""Mean attention distance against a double loop and in closed form."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from each import each

from basd.evaluation.attention import attention_distance, patch_distances


def looped(attention: np.ndarray, grid: tuple[int, int]) -> float:
    """One map of patches."""
    places = [((row + 0.5) / grid[0], (column + 0.5) / grid[1]) for row in range(grid[0]) for column in range(grid[1])]
    total = 0.0
    for query, row in enumerate(attention):
        total += sum(weight * math.dist(places[query], places[key]) for key, weight in enumerate(row)) / row.sum()
    return total / len(attention)


@each("grid, prefix", [((3, 3), 1), ((2, 4), 1), ((3, 2), 5)])
def test_against_a_loop(grid: tuple[int, int], prefix: int) -> None:
    """The class token and registers have no place: neither their rows nor their columns count."""
    tokens = prefix + grid[0] * grid[1]
    maps = torch.randn(2, 3, tokens, tokens, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)
    got = attention_distance(maps, grid)
    for image, head in itertools.product(range(2), range(3)):
        patches = maps[image, head, prefix:, prefix:].double().numpy()
        assert float(got[image, head]) == pytest.approx(looped(patches, grid), rel=1e-5)


def test_attention_to_oneself_and_everywhere() -> None:
    assert float(attention_distance(torch.eye(10), (3, 3))) == 0
    # all attention on the class token: a distance of 0, without a division by 0
    on_class = torch.zeros(10, 10).index_fill(1, torch.tensor([0]), 1.0)
    assert float(attention_distance(on_class, (3, 3))) == 0
    for side in (2, 5, 9):
        uniform = torch.full((side**2 + 1, side**2 + 1), 1 / (side**2 + 1))
        # of offsets (a, b) there are (side−a)·(side−b)·(1, 2 or 4) pairs
        expected = sum(
            (side - a) * (side - b) * (1 + (a > 0)) * (1 + (b > 0)) * math.hypot(a, b) / side
            for a, b in itertools.product(range(side), repeat=2)
        )
        assert float(attention_distance(uniform, (side, side))) == pytest.approx(expected / side**4, rel=1e-5), side
    # the mean distance of two points in a unit square
    assert float(patch_distances((20, 20)).mean()) == pytest.approx(0.5214, abs=1e-3)


def test_a_finer_grid_does_not_change_the_distance() -> None:
    """Distances are shares of the side, here of attention to a fixed offset to the right."""
    for side in (4, 8):
        keys = torch.arange(side**2).view(side, side).roll(-side // 4, dims=1)[:, : -side // 4].flatten()
        queries = torch.arange(side**2).view(side, side)[:, : -side // 4].flatten()
        maps = torch.eye(side**2)
        maps[queries, queries], maps[queries, keys] = 0, 1
        assert float(attention_distance(maps, (side, side))) == pytest.approx(0.25 * 0.75)
