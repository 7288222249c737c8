import math
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from each import each
from torch import Tensor

from basd.components.comparison import PROJECTION, TOKENS, Bridges, Comparison
from basd.components.losses import spectral
from basd.components.losses.spectral import SpectralLoss, SpectralLossConfig
from basd.components.sizes import Sizes
from basd.components.spectrum import channel_groups, multiplicity, radii, real_bins, spatial_power, spatial_spectrum

Grid = tuple[int, int]
GRIDS = [(3, 5), (4, 6), (5, 4), (1, 7), (6, 1), (2, 2)]
NORMALIZED = ["full", "log_magnitude", "phase", "high_band", "low_band", "spatial_mse"]
MODES = [*NORMALIZED, "half_spectrum"]


def build(mode: str, grid: Grid = (3, 5), points: int = 2) -> SpectralLoss:
    shape = Sizes(
        points=tuple(range(points)),
        image_size=24,
        student_depth=4,
        student_width=6,
        student_heads=2,
        student_grid=grid,
        teacher_depth=3,
        teacher_width=8,
        teacher_heads=4,
        teacher_grid=(4, 3),
    )
    return SpectralLossConfig(mode=mode).build(shape)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def normalized(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def transforms(x: Tensor, grid: Grid) -> np.ndarray:
    """Full orthonormal 2-D transform of each token map, (M, B, D, h, w)."""
    points, batch, _, width = x.shape
    values = x.double().numpy()
    result = np.zeros((points, batch, width, *grid), dtype=complex)
    for m in range(points):
        for b in range(batch):
            for d in range(width):
                result[m, b, d] = np.fft.fft2(values[m, b, :, d].reshape(grid), norm="ortho")
    return result


def layer_normed_transforms(student: Tensor, teacher: Tensor, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    s, t = (transforms(normalized(x.double()), grid) for x in (student, teacher))
    return s, t


def comparison(**parts: Tensor) -> Comparison:
    """A comparison that has these parts only; reading another one fails."""
    nothing: Any = SimpleNamespace()
    made = Comparison(
        Bridges(), nothing, nothing, nothing, labels=torch.zeros(0), generator=lambda _: torch.Generator()
    )
    for name, value in parts.items():
        assert isinstance(vars(Comparison)[name], cached_property)
        setattr(made, name, value)
    return made


# -- helpers ----------------------------------------------------------------------------------------------------------


@each("grid", GRIDS)
def test_spatial_spectrum_is_rfft2(grid: Grid) -> None:
    tokens = randn(2, 3, grid[0] * grid[1], 4)
    found = spatial_spectrum(tokens, grid).numpy()
    half = transforms(tokens, grid)[..., : grid[1] // 2 + 1].reshape(2, 3, 4, -1).swapaxes(-1, -2)
    np.testing.assert_allclose(found[:, :, 0], half.real, atol=1e-5)
    np.testing.assert_allclose(found[:, :, 1], half.imag, atol=1e-5)
    power = (np.abs(half) ** 2).sum(-1) * multiplicity(grid).numpy()
    np.testing.assert_allclose(spatial_power(tokens, grid).numpy(), power, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(power.sum(-1), tokens.square().sum((-1, -2)).numpy(), rtol=1e-4)


@each("grid", [*GRIDS, (1, 1), (14, 14)])
def test_multiplicity_and_real_bins_by_the_full_spectrum(grid: Grid) -> None:
    height, width = grid
    columns = width // 2 + 1
    seen = np.zeros((height, columns))
    real = np.zeros((height, columns), dtype=bool)
    for r in range(height):
        for c in range(width):
            mirror = (-r % height, -c % width)
            kept = (r, c) if c < columns else mirror
            seen[kept] += 1
            real[kept] = (r, c) == mirror
    np.testing.assert_array_equal(multiplicity(grid).reshape(height, columns).numpy(), seen)
    np.testing.assert_array_equal(real_bins(grid).reshape(height, columns).numpy(), real)


@each("channels, groups", [(8, 4), (8, 6), (6, 8), (5, 5), (7, 1)])
def test_channel_groups_are_adaptive_average_pooling(channels: int, groups: int) -> None:
    x = randn(2, 3, channels)
    torch.testing.assert_close(x @ channel_groups(channels, groups), F.adaptive_avg_pool1d(x, groups))


# -- full and its control ---------------------------------------------------------------------------------------------


@each("grid", GRIDS)
def test_full_equals_the_full_transform_and_half_the_spatial_error(grid: Grid) -> None:
    tokens = grid[0] * grid[1]
    student, teacher = 2 * randn(2, 3, tokens, 8) + 1, randn(2, 3, tokens, 8, seed=1)
    s, t = layer_normed_transforms(student, teacher, grid)
    values = [(np.abs(s[m] - t[m]) ** 2).sum() / (2 * 3 * 8 * tokens) for m in range(2)]
    assert float(build("full", grid)(student, teacher)) == pytest.approx(np.mean(values), rel=1e-4)
    # Parseval
    control = build("spatial_mse", grid)(student, teacher)
    difference = normalized(student.double()) - normalized(teacher.double())
    assert float(control) == pytest.approx(float(difference.square().mean() / 2), rel=1e-5)
    assert float(build("full", grid)(student, teacher)) == pytest.approx(float(control), rel=1e-5)
    assert SpectralLossConfig().mode == "full"
    gradients = []
    for mode in ("full", "spatial_mse"):
        given = student.clone().requires_grad_()
        build(mode, grid)(given, teacher).backward()
        gradients.append(given.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-7)


# -- half_spectrum ----------------------------------------------------------------------------------------------------


@each("student_width, teacher_width", [(4, 8), (6, 8), (8, 6), (5, 5)])
@each("grid", [(3, 5), (4, 6), (1, 7)])
def test_half_spectrum_equals_loops(grid: Grid, student_width: int, teacher_width: int) -> None:
    tokens = grid[0] * grid[1]
    student, teacher = 2 * randn(2, 3, tokens, student_width) + 1, randn(2, 3, tokens, teacher_width, seed=1)
    grouped = torch.zeros(2, 3, tokens, student_width)
    for j in range(student_width):
        members = range(j * teacher_width // student_width, math.ceil((j + 1) * teacher_width / student_width))
        grouped[..., j] = torch.stack([teacher[..., i] for i in members]).mean(0)
    difference = (transforms(student, grid) - transforms(grouped, grid))[..., : grid[1] // 2 + 1]
    squares = [part**2 for value in difference.flatten() for part in (value.real, value.imag)]
    value = float(build("half_spectrum", grid)(student, teacher))
    assert value == pytest.approx(sum(squares) / len(squares), rel=1e-4)


# -- log_magnitude and phase ------------------------------------------------------------------------------------------


@each("grid", GRIDS)
def test_log_magnitude_equals_loops(grid: Grid) -> None:
    """Mean over the bins of the full transform, each by the variance of log|F_s|−log|F_t| of unrelated white tokens."""
    height, width = grid
    student, teacher = 2 * randn(2, 3, height * width, 8) + 1, randn(2, 3, height * width, 8, seed=1)
    s, t = layer_normed_transforms(student, teacher, grid)
    values = []
    for r in range(height):
        for c in range(width):
            is_real = np.abs(s[..., r, c].imag).max() < 1e-12
            variance = 2 * math.pi**2 / (8 if is_real else 24)
            log_s, log_t = (np.log(np.abs(x[..., r, c]) ** 2 + 1e-4) / 2 for x in (s, t))
            values.append((log_s - log_t) ** 2 / variance)
    assert float(build("log_magnitude", grid)(student, teacher)) == pytest.approx(np.mean(values), rel=1e-3)


@each("grid", GRIDS)
def test_phase_equals_loops(grid: Grid) -> None:
    tokens = grid[0] * grid[1]
    student, teacher = 2 * randn(2, 3, tokens, 8) + 1, randn(2, 3, tokens, 8, seed=1)
    s, t = layer_normed_transforms(student, teacher, grid)
    values = []
    for m in range(2):
        missed = weight = 0.0
        for a, b in zip(s[m].flatten(), t[m].flatten(), strict=True):
            size_a, size_b = math.sqrt(abs(a) ** 2 + 1e-4), math.sqrt(abs(b) ** 2 + 1e-4)
            missed += size_b * (1 - (a * b.conjugate()).real / (size_a * size_b))
            weight += size_b
        values.append(missed / weight)
    assert float(build("phase", grid)(student, teacher)) == pytest.approx(np.mean(values), rel=1e-4)


def test_phase_is_nearly_the_plain_cosine_of_the_angle() -> None:
    student, teacher = randn(1, 4, 15, 8), randn(1, 4, 15, 8, seed=1)
    s, t = layer_normed_transforms(student, teacher, (3, 5))
    expected = (np.abs(t) * (1 - np.cos(np.angle(s) - np.angle(t)))).sum() / np.abs(t).sum()
    assert float(build("phase")(student, teacher)) == pytest.approx(expected, abs=2e-3)
    # the opposite sign is the opposite phase, and no other magnitude
    assert float(build("phase")(-teacher, teacher)) == pytest.approx(2, abs=2e-3)
    assert float(build("log_magnitude")(-teacher, teacher)) == pytest.approx(0, abs=1e-6)


@each("grid", [(3, 5), (4, 6)])
def test_a_shift_changes_phases_only_and_a_filter_magnitudes_only(grid: Grid) -> None:
    teacher = normalized(randn(2, 3, grid[0] * grid[1], 8))
    shifted = teacher.unflatten(2, grid).roll((1, 2), dims=(2, 3)).flatten(2, 3)
    assert float(spectral.log_magnitude(shifted, teacher, grid)) == pytest.approx(0, abs=1e-5)
    assert float(spectral.phase(shifted, teacher, grid)) > 0.3
    # a positive factor for each bin
    transformed = torch.fft.rfft2(teacher.unflatten(2, grid), dim=(2, 3), norm="ortho")
    gain = 0.5 + 1.5 * torch.rand(grid[0], grid[1] // 2 + 1, 1, generator=torch.Generator().manual_seed(1))
    gain[1:] = (gain[1:] + gain[1:].flip(0)) / 2  # mirror images alike, so that the result is real
    filtered = torch.fft.irfft2(transformed * gain, s=grid, dim=(2, 3), norm="ortho").flatten(2, 3)
    assert float(spectral.phase(filtered, teacher, grid)) == pytest.approx(0, abs=2e-3)
    assert float(spectral.log_magnitude(filtered, teacher, grid)) > 0.05


def test_phase_weights_are_detached() -> None:
    student = normalized(randn(2, 3, 15, 8))
    given, again = (normalized(randn(2, 3, 15, 8, seed=1)).requires_grad_() for _ in range(2))
    spectral.phase(student, given, (3, 5)).backward()
    s, t = (torch.fft.fft2(x.unflatten(2, (3, 5)), dim=(2, 3), norm="ortho") for x in (student, again))
    size_s, size_t = ((x.abs().square() + 1e-4).sqrt() for x in (s, t))
    cosine = (s * t.conj()).real / (size_s * size_t)
    weight = size_t.detach()
    axes = (1, 2, 3, 4)
    (((1 - cosine) * weight).sum(axes) / weight.sum(axes)).mean().backward()
    torch.testing.assert_close(given.grad, again.grad, rtol=1e-3, atol=1e-6)


# -- bands ------------------------------------------------------------------------------------------------------------


@each("grid", [*GRIDS, (4, 4)])
def test_bands_equal_loops(grid: Grid) -> None:
    height, width = grid
    student, teacher = 2 * randn(2, 3, height * width, 8) + 1, randn(2, 3, height * width, 8, seed=1)
    teacher[1] += 3 * randn(3, 1, 8, seed=2)  # the points hold different power
    s, t = layer_normed_transforms(student, teacher, grid)
    radius = np.zeros(grid)
    for r in range(height):
        for c in range(width):
            radius[r, c] = math.hypot(min(r, height - r), min(c, width - c))
    for mode in ("high_band", "low_band"):
        values = []
        for m in range(2):
            missed = present = 0.0
            for r in range(height):
                for c in range(width):
                    if (radius[r, c] > radius.max() / 2) == (mode == "high_band"):
                        a, b = s[m, ..., r, c], t[m, ..., r, c]
                        missed += (np.abs(a - b) ** 2).sum()
                        present += (np.abs(a) ** 2 + np.abs(b) ** 2).sum()
            values.append(missed / present)
        assert float(build(mode, grid)(student, teacher)) == pytest.approx(np.mean(values), rel=1e-4), mode
    # a band of every bin is `full`, up to the epsilon of the layer norm
    student, teacher = normalized(student), normalized(randn(2, 3, height * width, 8, seed=1))
    every = torch.ones_like(radii(grid).flatten(), dtype=torch.bool)
    banded = spectral.band_difference(student, teacher, grid, every)
    assert float(banded) == pytest.approx(float(spectral.full(student, teacher, grid)), rel=1e-4)


@each("grid", [(2, 4), (4, 6)])
def test_a_band_sees_its_own_bins_only(grid: Grid) -> None:
    teacher = normalized(randn(2, 3, grid[0] * grid[1], 8))
    offset = teacher + randn(2, 3, 1, 8, seed=1)  # DC only
    sign = torch.tensor([(-1.0) ** (i // grid[1] + i % grid[1]) for i in range(grid[0] * grid[1])])
    chequered = teacher + sign[:, None] * randn(2, 3, 1, 8, seed=2)  # Nyquist along both axes only
    high, low = (partial(spectral.half_of_band, high=high) for high in (True, False))
    assert float(high(offset, teacher, grid)) < 1e-6 and float(low(offset, teacher, grid)) > 0.05
    assert float(low(chequered, teacher, grid)) < 1e-6 and float(high(chequered, teacher, grid)) > 0.05


def test_band_power_is_detached() -> None:
    teacher = normalized(randn(2, 3, 15, 8, seed=1))
    given, again = (normalized(randn(2, 3, 15, 8)).requires_grad_() for _ in range(2))
    spectral.half_of_band(given, teacher, (3, 5), high=True).backward()
    s, t = (torch.fft.fft2(x.unflatten(2, (3, 5)), dim=(2, 3), norm="ortho") for x in (again, teacher))
    rows, columns = torch.fft.fftfreq(3) * 3, torch.fft.fftfreq(5) * 5
    radius = (rows[:, None] ** 2 + columns**2).sqrt()
    high = (radius > radius.max() / 2)[:, :, None]
    axes = (1, 2, 3, 4)
    missed = ((s - t).abs().square() * high).sum(axes)
    present = ((s.abs().square() + t.abs().square()) * high).sum(axes)
    (missed / present.detach()).mean().backward()
    torch.testing.assert_close(given.grad, again.grad, rtol=1e-3, atol=1e-6)


def test_a_band_is_one_where_the_student_has_no_power_and_zero_where_neither_side_has() -> None:
    teacher = randn(2, 4, 15, 8)
    flat = randn(2, 4, 1, 8, seed=1).expand(2, 4, 15, 8)  # DC only
    assert float(build("high_band")(flat, teacher)) == pytest.approx(1, abs=1e-4)
    assert float(build("high_band")(flat, 2 * flat + 1)) == pytest.approx(0, abs=1e-5)


# -- all modes --------------------------------------------------------------------------------------------------------


@each("grid", [(5, 7), (4, 4), (1, 6)])
@each("mode", NORMALIZED)
def test_bounds(mode: str, grid: Grid) -> None:
    """About 1 for unrelated white tokens, 0 for a match up to scale and shift of a token."""
    tokens = grid[0] * grid[1]
    loss = build(mode, grid)
    student, teacher = randn(2, 64, tokens, 32), randn(2, 64, tokens, 32, seed=1)
    assert float(loss(student, teacher)) == pytest.approx(1, abs=0.05)
    assert float(loss(teacher, teacher)) == pytest.approx(0, abs=1e-3)
    assert float(loss(3 * teacher + 1, teacher)) == pytest.approx(0, abs=1e-3)


@each("mode", MODES)
def test_what_is_read(mode: str) -> None:
    config = SpectralLossConfig(mode=mode)
    student, target = randn(2, 4, 15, 8), randn(2, 4, 15, 8, seed=1)
    if mode == "half_spectrum":
        student = student[..., :6]
        assert config.reads == {TOKENS}
        read = comparison(student_tokens=student, target=target)
    else:
        assert config.reads == {TOKENS, PROJECTION}
        read = comparison(projected=student, target=target)
    loss = build(mode)
    assert torch.equal(loss.compare(read), loss(student, target)) and not read.notes


@each("mode", MODES)
def test_points_are_averaged(mode: str) -> None:
    student, teacher = randn(2, 4, 15, 8), randn(2, 4, 15, 8, seed=1)
    teacher[1] = student[1] + 0.5 * teacher[1]
    together = float(build(mode)(student, teacher))
    alone = [float(build(mode, points=1)(student[m : m + 1], teacher[m : m + 1])) for m in range(2)]
    assert together == pytest.approx(sum(alone) / 2, rel=1e-4) and alone[1] < 0.9 * alone[0]


@each("mode", MODES)
@each("case", ["random", "zero student", "zero teacher", "both zero", "equal tokens", "match"])
def test_gradients_are_finite(mode: str, case: str) -> None:
    loss = build(mode)
    student, teacher = randn(2, 4, 15, 8), randn(2, 4, 15, 8, seed=1)
    if case in ("zero student", "both zero"):
        student = torch.zeros(2, 4, 15, 8)
    if case in ("zero teacher", "both zero"):
        teacher = torch.zeros(2, 4, 15, 8)
    if case == "equal tokens":
        student = student[:, :, :1].expand(2, 4, 15, 8).clone()
        teacher = teacher[:, :, :1].expand(2, 4, 15, 8).clone()
    elif case == "match":
        student = teacher.clone()
    student.requires_grad_()
    teacher.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.ndim == 0 and torch.isfinite(value)
    for tensor in (student, teacher):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all()
    if case == "random":
        assert student.grad is not None and student.grad.abs().max() > 1e-6


@each("mode", MODES)
@each("tokens", [(16, 15), (15, 16), (16, 16), (1, 15), (15, 1)])
def test_different_token_counts_are_noticed(mode: str, tokens: tuple[int, int]) -> None:
    with pytest.raises(AssertionError):
        build(mode)(randn(2, 4, tokens[0], 8), randn(2, 4, tokens[1], 8, seed=1))
