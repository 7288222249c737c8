import math

import torch
from torch import Tensor

from basd.models.resampling import area_overlap, column_resampling, resample_attention, row_resampling

GRIDS = [((3, 4), (5, 3)), ((2, 5), (7, 2)), ((4, 4), (4, 4)), ((5, 5), (2, 3)), ((1, 3), (4, 1))]


def counted_overlap(target: tuple[int, int], source: tuple[int, int]) -> Tensor:
    """Shared area by counting the pixels of an image that both grids divide, as a share of the image."""
    height, width = math.lcm(target[0], source[0]), math.lcm(target[1], source[1])
    counts = torch.zeros(target[0] * target[1], source[0] * source[1], dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            t = (y * target[0] // height) * target[1] + x * target[1] // width
            s = (y * source[0] // height) * source[1] + x * source[1] // width
            counts[t, s] += 1
    return counts / (height * width)


def close(got: Tensor, expected: Tensor, case: object, rtol: float, atol: float) -> None:
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, msg=lambda said: f"{case}: {said}")


def test_area_overlap_counts_pixels() -> None:
    for target, source in [*GRIDS, ((14, 14), (16, 16))]:
        case, expected = (target, source), counted_overlap(target, source)
        close(area_overlap(target, source), expected, case, rtol=0, atol=1e-12)
        rows, columns = row_resampling(target, source), column_resampling(target, source)
        close(rows.double(), expected / expected.sum(1, keepdim=True), case, rtol=1e-5, atol=1e-7)
        close(columns.double(), expected / expected.sum(0, keepdim=True), case, rtol=1e-5, atol=1e-7)


def random_attention(tokens: int, seed: int = 0) -> Tensor:
    scores = 2 * torch.randn(2, 3, 1 + tokens, 1 + tokens, generator=torch.Generator().manual_seed(seed))
    return scores.softmax(-1)


def attention_by_loops(target: tuple[int, int], source: tuple[int, int], attention: Tensor) -> Tensor:
    overlap = counted_overlap(target, source)
    n_t, n_s = overlap.shape
    query_side = torch.zeros(1 + n_t, 1 + n_s, dtype=torch.float64)
    for i in range(1 + n_t):
        for j in range(1 + n_s):
            if i == 0:
                query_side[i, j] = attention[0, j]
            else:
                query_side[i, j] = sum(overlap[i - 1, a] * attention[1 + a, j] for a in range(n_s)) * n_t
    expected = torch.zeros(1 + n_t, 1 + n_t, dtype=torch.float64)
    for i in range(1 + n_t):
        expected[i, 0] = query_side[i, 0]
        for k in range(n_t):
            # a teacher cell's mass is shared out by the area each student cell has of it
            expected[i, 1 + k] = sum(query_side[i, 1 + a] * overlap[k, a] * n_s for a in range(n_s))
    return expected


def test_resampled_attention_equals_loops() -> None:
    for target, source in GRIDS:
        attention = random_attention(source[0] * source[1])
        got = resample_attention(attention, target, source)
        expected = attention_by_loops(target, source, attention[0, 0].double())
        close(got[0, 0].double(), expected, (target, source), rtol=1e-5, atol=1e-6)
        close(got.sum(-1), torch.ones(2, 3, len(expected)), (target, source), rtol=1.3e-6, atol=1e-5)
        assert (got >= 0).all(), (target, source)


def test_same_grid_keeps_the_map() -> None:
    attention = random_attention(12)
    assert torch.equal(resample_attention(attention, (3, 4), (3, 4)), attention)


def test_uniform_attention_spreads_by_area() -> None:
    got = resample_attention(torch.full((1, 16, 16), 1 / 16), (3, 4), (5, 3))
    torch.testing.assert_close(got[0, :, 0], torch.full((13,), 1 / 16))
    torch.testing.assert_close(got[0, :, 1:], torch.full((13, 12), 15 / 16 / 12))
