"""static, alp and spectral_similarity; adaptive_spectral has a file of its own."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from each import each
from selector_fakes import LAYERS, WIDTH, randn, sizes, small_teacher, student_tokens, teacher_with
from torch import Tensor, nn

from basd.components.selectors import SELECTORS
from basd.components.selectors.adaptive_spectral import band_count, normalized_entropy, spectral_descriptor
from basd.components.sizes import Sizes
from basd.models.teacher import TeacherOutput


@pytest.fixture(scope="module")
def teacher() -> TeacherOutput:
    return small_teacher()


def build(kind: str, s: Sizes, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return SELECTORS[kind](**options).build(s)


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(z - max(logits)) for z in logits]
    return [p / sum(powers) for p in powers]


def assert_one_hot(alpha: Tensor, layers: list[int]) -> None:
    assert alpha.argmax(dim=1).tolist() == layers
    assert alpha.max(dim=1).values.min().item() > 0.99


# -- temperature ------------------------------------------------------------------------------------------------------


@each("kind", ["adaptive_spectral", "static", "alp", "spectral_similarity"])
@each("seed", range(3))
def test_limits_of_the_temperature(kind: str, seed: int) -> None:
    s = sizes()
    student = student_tokens(s, seed=seed) + randn(2, 3, 1, 6, seed=seed)
    tokens = randn(LAYERS, 3, 15, WIDTH, seed=seed + 10).cumsum(dim=0) + 2 * randn(LAYERS, 3, 1, WIDTH, seed=seed)
    seen = teacher_with(tokens, s.teacher_grid)

    def alpha(temperature: float) -> Tensor:
        selector = build(kind, s, temperature=temperature)
        if kind in ("adaptive_spectral", "static"):
            # at the start two layers may lie equally near to a point
            with torch.no_grad():
                selector.get_parameter("bias").add_(randn(2, LAYERS, seed=seed))
        return selector(student, seen).detach()

    plain = alpha(1.0)
    first, second = plain.sort(dim=1, descending=True).values[:, :2].T
    assert (first > 1.007 * second).all()
    assert_one_hot(alpha(1e-3), plain.argmax(dim=1).tolist())
    torch.testing.assert_close(alpha(1e5), torch.full((2, LAYERS), 1 / LAYERS), rtol=1e-2, atol=0)


# -- static -----------------------------------------------------------------------------------------------------------


@each("points, depth", [((1, 3), 4), ((0, 2, 5), 6), ((3,), 4)])
def test_static_starts_as_adaptive_spectral(points: tuple[int, ...], depth: int, teacher: TeacherOutput) -> None:
    s = sizes(points, depth)
    student = student_tokens(s)
    static, adaptive = (build(kind, s)(student, teacher) for kind in ("static", "adaptive_spectral"))
    torch.testing.assert_close(static, adaptive, rtol=0, atol=0)
    deviation = LAYERS / len(points)
    for m, point in enumerate(points):
        center = (point + 1) * LAYERS / depth - 1
        prior = softmax([-((layer - center) ** 2) / (2 * deviation**2) for layer in range(LAYERS)])
        assert static[m].tolist() == pytest.approx(prior, rel=1e-4)


def test_static_is_the_softmax_of_its_bias_whatever_the_tokens() -> None:
    s = sizes()
    selector = build("static", s, temperature=0.7)
    bias = randn(2, LAYERS)
    with torch.no_grad():
        selector.get_parameter("bias").copy_(bias)
    for seed in (1, 2):
        seen = teacher_with(randn(LAYERS, 2, 15, WIDTH, seed=seed), s.teacher_grid)
        alpha = selector(student_tokens(s, batch=2, seed=seed), seen)
        for m in range(2):
            assert alpha[m].tolist() == pytest.approx(softmax([z / 0.7 for z in bias[m].tolist()]), rel=1e-4)


# -- alp --------------------------------------------------------------------------------------------------------------


def naive_pooled(image: np.ndarray) -> np.ndarray:
    """Mean of the layer-normalised tokens of one image, (N, D) → (D,)."""
    return np.mean([(token - token.mean()) / math.sqrt(token.var() + 1e-5) for token in image], axis=0)


def naive_alp(student: Tensor, teacher: Tensor, weight: Tensor | None, temperature: float) -> np.ndarray:
    student_images, teacher_images = student.double().numpy(), teacher.double().numpy()
    rows = []
    for point in student_images:
        logits = []
        for layer in teacher_images:
            products = []
            for own, other in zip(point, layer, strict=True):
                state = naive_pooled(own)
                if weight is not None:
                    state = weight.double().numpy() @ state
                products.append(float(state @ naive_pooled(other)) / math.sqrt(other.shape[1]))
            logits.append(sum(products) / len(products) / temperature)
        rows.append(softmax(logits))
    return np.array(rows)


@each("student_width, teacher_width", [(6, 24), (24, 24), (10, 7)])
@each("temperature", [1.0, 0.3])
@each("batch", [1, 4])
def test_alp_equals_loops(student_width: int, teacher_width: int, temperature: float, batch: int) -> None:
    s = sizes((0, 2, 3), student_width=student_width, teacher_width=teacher_width)
    selector = build("alp", s, temperature=temperature)
    # without means of their own the pooled products would all be near 0
    student = student_tokens(s, batch) + 2 * randn(3, batch, 1, student_width, seed=3)
    tokens = randn(LAYERS, batch, 15, teacher_width, seed=1) + 2 * randn(LAYERS, batch, 1, teacher_width, seed=4)
    weight = dict(selector.named_parameters()).get("projection.weight")
    assert (weight is None) == (student_width == teacher_width)
    expected = naive_alp(student, tokens, None if weight is None else weight.detach(), temperature)
    alpha = selector(student, teacher_with(tokens, s.teacher_grid))
    np.testing.assert_allclose(alpha.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - 1 / LAYERS).max() > 0.02


def test_alp_compares_images_without_their_places_and_lengths() -> None:
    s = sizes(student_width=WIDTH)
    selector = build("alp", s)
    student = student_tokens(s, 4) + 2 * randn(2, 4, 1, WIDTH, seed=3)
    tokens = randn(LAYERS, 4, 15, WIDTH, seed=1) + 2 * randn(LAYERS, 4, 1, WIDTH, seed=4)
    alpha = selector(student, teacher_with(tokens, s.teacher_grid))

    def changed(own: Tensor, other: Tensor) -> float:
        return float((selector(own, teacher_with(other, s.teacher_grid)) - alpha).abs().max())

    assert changed(student.flip(1), tokens.flip(1)) < 1e-5
    assert changed(student.flip(2), tokens.roll(3, dims=2)) < 1e-5
    assert changed(student, tokens.flip(1)) > 1e-2
    # layers with longer tokens are not favoured
    longer = tokens * torch.logspace(0, 2, LAYERS)[:, None, None, None]
    assert changed(student, longer) < 1e-3


# -- spectral_similarity ----------------------------------------------------------------------------------------------


@each("temperature", [0.1, 0.6])
@each(
    "student_grid, teacher_grid, points",
    [((4, 3), (3, 5), (1, 3)), ((5, 5), (4, 6), (0, 1, 3)), ((2, 3), (6, 6), (3,))],
)
def test_spectral_similarity_equals_loops(
    student_grid: tuple[int, int], teacher_grid: tuple[int, int], points: tuple[int, ...], temperature: float
) -> None:
    s = sizes(points, student_grid=student_grid, teacher_grid=teacher_grid)
    student = student_tokens(s)
    tokens = randn(LAYERS, 3, s.teacher_tokens, WIDTH, seed=1).cumsum(dim=0)
    bands = band_count(student_grid, teacher_grid)
    own = spectral_descriptor(student, student_grid, bands).double().numpy()
    layers = spectral_descriptor(tokens, teacher_grid, bands).double().numpy()
    center = sum(layers) / LAYERS
    expected = []
    for d in own:
        cosines = []
        for layer in layers:
            a, b = d - center, layer - center
            cosines.append(float(sum(a * b)) / math.sqrt(float(sum(a * a)) * float(sum(b * b))))
        expected.append(softmax([c / temperature for c in cosines]))
    selector = build("spectral_similarity", s, temperature=temperature)
    alpha = selector(student, teacher_with(tokens, teacher_grid)).detach().numpy()
    np.testing.assert_allclose(alpha, expected, rtol=2e-3, atol=1e-5)


def layers_of_different_spectra(seed: int, grid: tuple[int, int]) -> Tensor:
    """Noise with ramps of a strength and direction of its own in every layer, (L, B, N, D)."""
    rows = torch.linspace(0, 1, grid[0]).repeat_interleave(grid[1])
    columns = torch.linspace(0, 1, grid[1]).repeat(grid[0])
    ramps = torch.stack([a * rows + b * columns for a, b in 4 * randn(LAYERS, 2, seed=seed)])
    strength = randn(LAYERS, seed=seed + 1).exp()[:, None, None, None]
    return strength * (randn(LAYERS, 3, grid[0] * grid[1], WIDTH, seed=seed + 2) + ramps[:, None, :, None])


@each("seed", range(0, 50, 5))
def test_the_layer_with_the_student_s_spectrum_wins(seed: int) -> None:
    grid = (3, 5)
    s = sizes((0, 1, 2), student_width=WIDTH, student_grid=grid, teacher_grid=grid)
    tokens = layers_of_different_spectra(seed, grid)
    matching = torch.randperm(LAYERS, generator=torch.Generator().manual_seed(seed))[:3]
    alpha = build("spectral_similarity", s)(tokens[matching], teacher_with(tokens, grid))
    assert alpha.argmax(dim=1).tolist() == matching.tolist()
    # at the lowest temperature α is one-hot
    coldest = build("spectral_similarity", s, temperature=1e-3)
    assert_one_hot(coldest(tokens[matching], teacher_with(tokens, grid)), matching.tolist())


@each("rounding", [0.0, 1e-6])
def test_alike_layers_are_chosen_alike(rounding: float) -> None:
    s = sizes()
    tokens = randn(1, 3, 15, WIDTH) * (1 + rounding * randn(LAYERS, 3, 15, WIDTH, seed=1))
    alpha = build("spectral_similarity", s)(student_tokens(s), teacher_with(tokens, s.teacher_grid))
    torch.testing.assert_close(alpha, torch.full((2, LAYERS), 1 / LAYERS), rtol=0.1, atol=0)


@each("sign, colder", [(1, True), (-1, False)])
def test_the_temperature_learns(sign: int, colder: bool, teacher: TeacherOutput) -> None:
    """sparsify (less entropy) cools, spread (more entropy) warms."""
    s = sizes()
    selector = build("spectral_similarity", s, temperature=0.5)
    assert float(selector.get_parameter("log_temperature").detach().exp()) == pytest.approx(0.5)
    optimizer = torch.optim.SGD(selector.parameters(), lr=0.1)
    start = normalized_entropy(selector(student_tokens(s), teacher)).mean().item()
    for _ in range(5):
        optimizer.zero_grad()
        (sign * normalized_entropy(selector(student_tokens(s), teacher)).mean()).backward()
        optimizer.step()
    end = normalized_entropy(selector(student_tokens(s), teacher)).mean().item()
    assert (end < start) == colder
    assert (float(selector.get_parameter("log_temperature").detach().exp()) < 0.5) == colder


@each("log_temperature", [-200.0, 200.0])
def test_no_temperature_is_out_of_bounds(log_temperature: float, teacher: TeacherOutput) -> None:
    s = sizes()
    selector = build("spectral_similarity", s)
    with torch.no_grad():
        selector.get_parameter("log_temperature").fill_(log_temperature)
    alpha = selector(student_tokens(s), teacher)
    (alpha * randn(2, LAYERS)).sum().backward()
    torch.testing.assert_close(alpha.sum(dim=1), torch.ones(2))
    gradient = selector.get_parameter("log_temperature").grad
    assert gradient is not None and torch.isfinite(gradient)


def test_descriptors_of_the_teacher_are_computed_once() -> None:
    """Arms of a cohort share them: after `adaptive_spectral` the teacher's tokens are not read again."""
    s = sizes()
    student, tokens = student_tokens(s), randn(LAYERS, 3, 15, WIDTH)
    expected = build("spectral_similarity", s)(student, teacher_with(tokens, s.teacher_grid))
    seen = teacher_with(tokens, s.teacher_grid)
    build("adaptive_spectral", s)(student, seen)
    seen.tokens = torch.full_like(tokens, math.nan)
    assert torch.equal(build("spectral_similarity", s)(student, seen), expected)
