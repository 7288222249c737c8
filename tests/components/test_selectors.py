"""adaptive_spectral: its descriptors and logits."""

import math

import numpy as np
import pytest
import torch
from each import each
from selector_fakes import LAYERS, randn, sizes, small_teacher

from basd.components.selectors.adaptive_spectral import (
    AdaptiveSpectralConfig,
    band_count,
    normalized_entropy,
    spectral_descriptor,
)
from basd.components.spectrum import spatial_power
from basd.models.teacher import TeacherOutput


@pytest.fixture(scope="module")
def teacher() -> TeacherOutput:
    return small_teacher()


# -- descriptor -------------------------------------------------------------------------------------------------------


def signed(index: int, count: int) -> int:
    return index if index <= count // 2 else index - count


def naive_shares(powers: list[tuple[float, float]], bands: int) -> list[float]:
    """Shares of `bands` bands of equal width in radius, from (radius, power) of every bin of a full spectrum."""
    largest = max(radius for radius, _ in powers)
    sums = [0.0] * bands
    for radius, power in powers:
        sums[min(bands - 1, math.floor(radius / largest * bands))] += power
    return [x / sum(sums) for x in sums]


def naive_descriptor(tokens: np.ndarray, grid: tuple[int, int], bands: int) -> np.ndarray:
    """(B, N, D) → (2·bands + 2,), from the full transforms, where every bin counts once."""
    per_image = []
    height, width = grid
    for image in tokens:
        channels = image.shape[1]
        spatial: list[tuple[float, float]] = []
        planes = [np.fft.fft2(image[:, d].reshape(grid), norm="ortho") for d in range(channels)]
        for u in range(height):
            for v in range(width):
                radius = math.hypot(signed(u, height), signed(v, width))
                spatial.append((radius, float(sum(abs(plane[u, v]) ** 2 for plane in planes))))
        along = []
        lines = [np.fft.fft(row, norm="ortho") for row in image]
        for f in range(channels):
            along.append((abs(signed(f, channels)), float(sum(abs(line[f]) ** 2 for line in lines))))
        total = sum(power for _, power in spatial)
        entropy = -sum(p / total * math.log(p / total) for _, p in spatial if p > 0) / math.log(height * width)
        first = [math.log(x + 1e-6) for x in naive_shares(spatial, bands)]
        second = [math.log(x + 1e-6) for x in naive_shares(along, bands)]
        per_image.append([*first, *second, entropy, math.log((image**2).mean())])
    return np.mean(per_image, axis=0)


SHAPES = [((3, 5), 6, 4), ((4, 6), 8, 7), ((5, 4), 7, 8), ((6, 6), 16, 5), ((2, 3), 5, 3)]


@each("grid, width, bands", SHAPES)
def test_descriptor_equals_loops(grid: tuple[int, int], width: int, bands: int) -> None:
    smooth = torch.linspace(0, 3, grid[0] * grid[1])[:, None]
    tokens = randn(2, 3, grid[0] * grid[1], width) + smooth
    got = spectral_descriptor(tokens, grid, bands)
    assert got.shape == (2, 2 * bands + 2) and got.dtype == torch.float32
    for layer in range(2):
        expected = naive_descriptor(tokens[layer].double().numpy(), grid, bands)
        kept = [*range(2 * bands), 2 * bands + 1]
        # an empty band has the share 1e-6: there the logarithm sees float32's rounding
        np.testing.assert_allclose(got[layer, kept].numpy(), expected[kept], rtol=1e-3, atol=0.02)
    plain = randn(1, 3, grid[0] * grid[1], width)
    entropy = naive_descriptor(plain[0].double().numpy(), grid, bands)[2 * bands]
    assert float(spectral_descriptor(plain, grid, bands)[0, 2 * bands]) == pytest.approx(entropy, abs=1e-4)


def test_entropy_of_white_tokens_is_one_and_of_constant_ones_zero() -> None:
    one_bright_token = torch.zeros(1, 1, 15, 4)
    one_bright_token[:, :, 7] = 1.0
    assert float(spectral_descriptor(one_bright_token, (3, 5), 4)[0, 8]) == pytest.approx(1, abs=1e-4)
    assert float(spectral_descriptor(torch.ones(1, 1, 15, 4), (3, 5), 4)[0, 8]) == pytest.approx(0, abs=1e-4)
    assert torch.isfinite(spectral_descriptor(torch.zeros(1, 2, 15, 4), (3, 5), 4)).all()


def test_descriptor_does_not_depend_on_the_orientation_of_the_image() -> None:
    tokens = randn(1, 2, 3, 5, 6)
    upright = spectral_descriptor(tokens.flatten(2, 3), (3, 5), 5)
    turned = spectral_descriptor(tokens.transpose(2, 3).flatten(2, 3), (5, 3), 5)
    torch.testing.assert_close(turned, upright, rtol=1e-3, atol=1e-3)


@each("trained", [False, True])
@each("grid", [(3, 5), (4, 6), (5, 4), (1, 6), (2, 2), (7, 7), (14, 14), (16, 15)])
def test_parseval_with_multiplicity(grid: tuple[int, int], trained: bool) -> None:
    """Computed with and without a gradient, with the basis and, on large grids, with an FFT."""
    tokens = randn(2, grid[0] * grid[1], 6)
    power = spatial_power(tokens.clone().requires_grad_(trained), grid)
    assert power.requires_grad == trained
    power = power.detach()
    torch.testing.assert_close(power.sum(-1), tokens.square().sum((1, 2)), rtol=1e-4, atol=1e-4)
    naive = [
        [np.abs(np.fft.rfft2(x[:, d].reshape(grid), norm="ortho").flatten()) ** 2 for d in range(6)]
        for x in tokens.double().numpy()
    ]
    columns = np.array([1 if v == 0 or 2 * v == grid[1] else 2 for v in range(grid[1] // 2 + 1)])
    expected = np.sum(naive, axis=1) * np.tile(columns, grid[0])
    np.testing.assert_allclose(power.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_band_count() -> None:
    assert band_count((14, 14), (16, 16)) == 8
    assert band_count((2, 2), (16, 16)) == 3  # radii 0, 1, √2
    assert band_count((5, 5), (1, 3)) == 2
    assert band_count((3, 3), (5, 5)) == band_count((5, 5), (3, 3))


# -- adaptive_spectral ------------------------------------------------------------------------------------------------


@each("points, depth", [((1, 3), 4), ((0, 2, 5), 6), ((3,), 4)])
def test_start_is_the_gaussian_prior(points: tuple[int, ...], depth: int, teacher: TeacherOutput) -> None:
    torch.manual_seed(0)
    selector = AdaptiveSpectralConfig().build(sizes(points, depth))
    alpha = selector(randn(len(points), 3, 12, 6), teacher)
    deviation = LAYERS / len(points)
    for m, point in enumerate(points):
        center = (point + 1) * LAYERS / depth - 1
        prior = [math.exp(-((layer - center) ** 2) / (2 * deviation**2)) for layer in range(LAYERS)]
        torch.testing.assert_close(alpha[m], torch.tensor(prior) / sum(prior), rtol=1e-4, atol=1e-6)


def trained_selector(temperature: float = 1.0) -> torch.nn.Module:
    torch.manual_seed(0)
    selector = AdaptiveSpectralConfig(temperature=temperature).build(sizes())
    with torch.no_grad():
        for parameter in selector.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return selector


def test_logits_follow_the_formula(teacher: TeacherOutput) -> None:
    selector = trained_selector(temperature=0.7)
    student = randn(2, 3, 12, 6)
    bands = band_count((4, 3), (3, 5))
    own = spectral_descriptor(student, (4, 3), bands)
    layers = spectral_descriptor(teacher.tokens, (3, 5), bands)
    queries = selector.query(selector.student_norm(own))
    keys = selector.key(selector.teacher_norm(layers - layers.mean(0)))
    assert queries.shape[-1] == 32
    expected = torch.zeros(2, LAYERS)
    for m in range(2):
        logits = [(selector.bias[m, k] + queries[m] @ keys[k] / math.sqrt(32)).item() / 0.7 for k in range(LAYERS)]
        expected[m] = torch.tensor(logits).softmax(0)
    alpha = selector(student, teacher)
    torch.testing.assert_close(alpha, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alpha.sum(-1), torch.ones(2))
    assert (alpha - selector(student * randn(2, 1, 12, 1, seed=4), teacher)).abs().max() > 1e-4


def test_normalized_entropy() -> None:
    alpha = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    torch.testing.assert_close(normalized_entropy(alpha), torch.tensor([1.0, 0.0, 0.5]))
    assert float(normalized_entropy(torch.ones(1, 1))) == 0
