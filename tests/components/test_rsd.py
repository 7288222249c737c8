import math
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from each import each
from torch import Tensor

from basd.components.comparison import CLS, FEATURES, TOKENS, Bridges, Comparison
from basd.components.losses.rsd import RSDLossConfig, correlation_floor, cross_correlation
from basd.components.sizes import Sizes
from basd.errors import UserError


def sizes(grid: tuple[int, int] = (3, 5), student_width: int = 6, teacher_width: int = 8, points: int = 2) -> Sizes:
    return Sizes(
        points=tuple(range(points)),
        image_size=24,
        student_depth=4,
        student_width=student_width,
        student_heads=2,
        student_grid=grid,
        teacher_depth=3,
        teacher_width=teacher_width,
        teacher_heads=4,
        teacher_grid=(4, 3),
    )


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(*shape: int, seed: int = 0) -> Tensor:
    """Samples whose second channel nearly repeats the first."""
    made = randn(*shape, seed=seed)
    made[..., 1] = made[..., 0] + 0.1 * made[..., 1]
    return made


def comparison(diagnose: bool = False, **parts: Tensor) -> Comparison:
    """A comparison that has these parts only; reading another one fails."""
    nothing: Any = SimpleNamespace()
    made = Comparison(
        Bridges(),
        sizes(),
        nothing,
        nothing,
        labels=torch.zeros(0),
        generator=lambda purpose: torch.Generator(),
        diagnose=diagnose,
    )
    for name, value in parts.items():
        assert isinstance(vars(Comparison)[name], cached_property)
        setattr(made, name, value)
    return made


# -- cross-correlation ------------------------------------------------------------------------------------------------


def naive_correlation(student: Tensor, teacher: Tensor, center: str) -> np.ndarray:
    s, t = student.detach().double().numpy().copy(), teacher.detach().double().numpy().copy()
    points, batch, tokens, width = s.shape
    result = np.zeros((points, width, width))
    for m in range(points):
        for x in (s[m], t[m]):
            for d in range(width):
                if center == "global":
                    x[:, :, d] -= x[:, :, d].mean()
                else:
                    for n in range(tokens):
                        x[:, n, d] -= x[:, n, d].mean()
                x[:, :, d] /= math.sqrt((x[:, :, d] ** 2).mean() + 1e-5)
        for i in range(width):
            for j in range(width):
                result[m, i, j] = (t[m, :, :, i] * s[m, :, :, j]).sum() / (batch * tokens)
    return result


def naive_rsd(
    correlation: np.ndarray, kappa: float, goal: np.ndarray | None = None, reduction: str = "per_dim"
) -> float:
    values = []
    for m, c in enumerate(correlation):
        width = len(c)
        wanted = np.eye(width) if goal is None else goal[m]
        on = sum((wanted[i, i] - c[i, i]) ** 2 for i in range(width))
        off = sum((wanted[i, j] - c[i, j]) ** 2 for i in range(width) for j in range(width) if i != j)
        values.append((on + kappa * off) / (width if reduction == "per_dim" else 1))
    return float(np.mean(values))


@each("center", ["position", "global"])
@each("shape", [(2, 3, 5, 4), (1, 2, 7, 3), (3, 4, 1, 5)])
def test_cross_correlation_equals_loops(center: str, shape: tuple[int, ...]) -> None:
    student, teacher = 3 * randn(*shape) + 1, randn(*shape, seed=1) - 2
    got = cross_correlation(student, teacher, center)
    np.testing.assert_allclose(got.numpy(), naive_correlation(student, teacher, center), rtol=1e-3, atol=2e-5)


@each("center", ["position", "global"])
def test_scale_and_shift_of_channels_do_not_count(center: str) -> None:
    student, teacher = randn(2, 6, 5, 4), randn(2, 6, 5, 4, seed=1)
    scale, shift = randn(4, seed=2).abs() + 1, randn(4, seed=3)
    plain = cross_correlation(student, teacher, center)
    torch.testing.assert_close(cross_correlation(student * scale + shift, teacher, center), plain, rtol=0, atol=1e-4)
    torch.testing.assert_close(cross_correlation(student, teacher * scale + shift, center), plain, rtol=0, atol=1e-4)
    flipped = cross_correlation(-student, teacher, center)
    torch.testing.assert_close(flipped, -plain, rtol=0, atol=1e-5)


def test_position_centring_ignores_a_shift_of_a_position() -> None:
    student, teacher = randn(2, 6, 5, 4), randn(2, 6, 5, 4, seed=1)
    shifted = student + 3 * randn(2, 1, 5, 4, seed=2)
    plain = cross_correlation(student, teacher, "position")
    torch.testing.assert_close(cross_correlation(shifted, teacher, "position"), plain, rtol=0, atol=1e-4)
    assert (cross_correlation(shifted, teacher, "global") - plain).abs().max() > 0.05
    # with one sample an image both ways are the same
    both = [cross_correlation(student[:, :, :1], teacher[:, :, :1], center) for center in ("position", "global")]
    torch.testing.assert_close(*both)


def test_a_student_that_knows_positions_only_is_rewarded_by_global_centring_only() -> None:
    position = randn(1, 1, 400, 8)
    teacher = position + 0.1 * randn(1, 8, 400, 8, seed=1)
    student = position.expand(1, 8, 400, 8)
    assert naive_rsd(cross_correlation(student, teacher, "global").numpy(), 0.01) < 0.03
    assert naive_rsd(cross_correlation(student, teacher, "position").numpy(), 0.01) == pytest.approx(1, abs=0.01)


# -- the loss ---------------------------------------------------------------------------------------------------------


@each("reduction", ["per_dim", "sum"])
@each("target", ["identity", "teacher_correlation"])
@each("kappa", [0.0, 0.01, 0.5])
@each("center", ["position", "global"])
def test_rsd_equals_loops(center: str, kappa: float, target: str, reduction: str) -> None:
    config = RSDLossConfig(kappa=kappa, center=center, target=target, reduction=reduction, projector="none")
    loss = config.build(sizes(student_width=8))
    student, teacher = randn(2, 4, 15, 8), correlated(2, 4, 15, 8, seed=1)
    goal = naive_correlation(teacher, teacher, center) if target == "teacher_correlation" else None
    expected = naive_rsd(naive_correlation(student, teacher, center), kappa, goal, reduction)
    assert float(loss(student, teacher)) == pytest.approx(expected, rel=1e-4)


def test_barlow_twins_is_a_setting() -> None:
    """Barlow Twins (arXiv:2103.03230) eq. 1 and 2: Σ(1−C_ii)² + λ Σ C_ij², C normalised by the norms over the batch."""
    config = RSDLossConfig(projector="none", reduction="sum", kappa=0.0051)
    loss = config.build(sizes(student_width=5, teacher_width=5, points=1))
    student, teacher = randn(1, 16, 1, 5) + 2, 3 * randn(1, 16, 1, 5, seed=1)
    a, b = (x[0, :, 0].double().numpy() for x in (student, teacher))
    a, b = a - a.mean(0), b - b.mean(0)
    expected = 0.0
    for i in range(5):
        for j in range(5):
            c = (a[:, i] * b[:, j]).sum() / (math.sqrt((a[:, i] ** 2).sum()) * math.sqrt((b[:, j] ** 2).sum()))
            expected += (1 - c) ** 2 if i == j else 0.0051 * c**2
    assert float(loss(student, teacher)) == pytest.approx(expected, rel=1e-4)


@each("target", ["identity", "teacher_correlation"])
@each("center", ["position", "global"])
@each("batch, tokens, width", [(64, 9, 8), (128, 20, 4), (200, 4, 16), (400, 1, 8)])
def test_bounds(center: str, target: str, batch: int, tokens: int, width: int) -> None:
    """1 for unrelated samples, 0 for a match of decorrelated channels, whatever the sizes."""
    config = RSDLossConfig(center=center, target=target, projector="none")
    loss = config.build(sizes(student_width=width, teacher_width=width, points=1))
    teacher = randn(1, batch, tokens, width)
    assert float(loss(teacher, teacher)) < 0.01
    assert float(loss(randn(1, batch, tokens, width, seed=1), teacher)) == pytest.approx(1, abs=0.1)


@each("reduction", ["per_dim", "sum"])
@each("center", ["position", "global"])
def test_match_of_correlated_channels(center: str, reduction: str) -> None:
    """Against the identity κ·Σ_{i≠j}corr² is left, the floor; against the teacher's own correlation nothing is."""
    teacher = correlated(2, 8, 15, 6, seed=3)
    own = naive_correlation(teacher, teacher, center)
    off = [sum(c[i, j] ** 2 for i in range(6) for j in range(6) if i != j) for c in own]
    expected = 0.5 * float(np.mean(off)) / (6 if reduction == "per_dim" else 1)
    floor = float(correlation_floor(teacher, center, 0.5, reduction))
    assert floor == pytest.approx(expected, rel=1e-3) and floor > 0.1
    for target, left in (("identity", floor), ("teacher_correlation", 0.0)):
        config = RSDLossConfig(center=center, kappa=0.5, target=target, reduction=reduction, projector="none")
        loss = config.build(sizes(student_width=6, teacher_width=6))
        assert float(loss(teacher, teacher)) == pytest.approx(left, rel=1e-3, abs=1e-6)


def test_teacher_correlation_is_detached() -> None:
    loss = RSDLossConfig(target="teacher_correlation", kappa=0.3, projector="none").build(sizes(student_width=8))
    student, teacher = randn(2, 4, 15, 8), correlated(2, 4, 15, 8, seed=1)
    given, again = teacher.clone().requires_grad_(), teacher.clone().requires_grad_()
    loss(student, given).backward()
    goal = cross_correlation(teacher, teacher, "position")
    weight = torch.full((8, 8), 0.3).fill_diagonal_(1)
    ((goal - cross_correlation(student, again, "position")).square() * weight).sum().div(2 * 8).backward()
    torch.testing.assert_close(given.grad, again.grad, rtol=1e-3, atol=1e-6)


# -- projectors -------------------------------------------------------------------------------------------------------


def test_default_is_aad_per_position_per_channel_against_the_identity() -> None:
    """AAD is Linear–BatchNorm–GELU–Linear, with the statistics of the batch in training and in evaluation."""
    torch.manual_seed(0)
    loss = RSDLossConfig().build(sizes())
    student, teacher = 2 * randn(2, 4, 15, 6) + 1, randn(2, 4, 15, 8, seed=1)
    parameters = list(loss.parameters())
    with torch.no_grad():
        for parameter in parameters:
            if parameter.ndim == 1:  # the affine parameters of the norm, away from 1 and 0
                parameter.add_(0.3 * torch.randn_like(parameter))
    assert sum(p.numel() for p in parameters) == 2 * (6 * 16 + 2 * 16 + 16 * 8) and not list(loss.buffers())
    projected = []
    for m in range(2):
        first, gain, bias, last = (p.detach().double() for p in parameters[4 * m : 4 * m + 4])
        assert first.shape == (16, 6) and last.shape == (8, 16)
        hidden = student[m].reshape(-1, 6).double() @ first.T
        hidden = gain * (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt() + bias
        projected.append((F.gelu(hidden) @ last.T).reshape(4, 15, 8))
    expected = naive_rsd(naive_correlation(torch.stack(projected), teacher, "position"), 0.01)
    for mode in (True, False):
        assert float(loss.train(mode)(student, teacher).detach()) == pytest.approx(expected, rel=1e-4), mode


def test_linear_projector_is_one_matrix_a_point() -> None:
    torch.manual_seed(0)
    loss = RSDLossConfig(projector="linear").build(sizes())
    weights = list(loss.parameters())
    assert [tuple(w.shape) for w in weights] == [(8, 6), (8, 6)] and not torch.equal(*weights)
    student, teacher = randn(2, 4, 15, 6), randn(2, 4, 15, 8, seed=1)
    projected = torch.stack([student[m] @ weights[m].T for m in range(2)])
    expected = naive_rsd(naive_correlation(projected, teacher, "position"), 0.01)
    assert float(loss(student, teacher).detach()) == pytest.approx(expected, rel=1e-4)


def test_no_projector_needs_equal_widths() -> None:
    assert not list(RSDLossConfig(projector="none").build(sizes(student_width=8)).parameters())
    with pytest.raises(UserError, match=r"equal widths.* 6 .* 8; choose losses.rsd.projector=linear"):
        RSDLossConfig(projector="none").build(sizes())


@each("projector", ["aad", "linear"])
def test_rsd_can_be_learned(projector: str) -> None:
    torch.manual_seed(0)
    loss = RSDLossConfig(projector=projector).build(sizes(grid=(3, 3), points=1))
    teacher = randn(1, 32, 9, 8)
    student = teacher @ randn(8, 6, seed=1)
    before = float(loss(student, teacher).detach())
    assert 0.5 < before < 1.7
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        value = loss(student, teacher)
        value.backward()
        optimizer.step()
    # six channels can predict about six of eight
    assert float(value.detach()) < 0.3


# -- samples ----------------------------------------------------------------------------------------------------------

SAMPLES = {"tokens": {TOKENS}, "cls": {CLS}, "mean_pool": {TOKENS}, "pre_logits": {FEATURES}}


def parts_for(samples: str) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """The parts that may be read, and the samples of student and teacher, in the width 8."""
    if samples == "cls":
        student, teacher = randn(2, 6, 8), randn(2, 6, 8, seed=1)
        return {"student_cls": student, "target_cls": teacher}, student.unsqueeze(2), teacher.unsqueeze(2)
    if samples == "pre_logits":
        student, teacher = randn(6, 8), randn(6, 8, seed=1)
        parts = {"student_features": student, "teacher_features": teacher}
        return parts, student.reshape(1, 6, 1, 8), teacher.reshape(1, 6, 1, 8)
    student, teacher = randn(2, 6, 15, 8), randn(2, 6, 15, 8, seed=1)
    parts = {"student_tokens": student, "target": teacher}
    if samples == "tokens":
        return parts, student, teacher
    means = [torch.zeros(2, 6, 1, 8) for _ in range(2)]
    for mean, tokens in zip(means, (student, teacher), strict=True):
        for n in range(15):
            mean[:, :, 0] += tokens[:, :, n] / 15
    return parts, *means


@each("reduction", ["per_dim", "sum"])
@each("samples", SAMPLES)
def test_samples_and_their_floor(samples: str, reduction: str) -> None:
    """The value, and the floor κ·Σ_{i≠j}corr² that is logged where diagnostics are asked for."""
    config = RSDLossConfig(samples=samples, kappa=0.2, projector="none", reduction=reduction)
    assert config.reads == SAMPLES[samples]
    parts, student, teacher = parts_for(samples)
    loss = config.build(sizes(student_width=8))
    read = comparison(**parts)
    expected = naive_rsd(naive_correlation(student, teacher, "position"), 0.2, reduction=reduction)
    assert float(loss.compare(read)) == pytest.approx(expected, rel=1e-4) and not read.notes
    read = comparison(diagnose=True, **parts)
    loss.compare(read)
    own = naive_correlation(teacher, teacher, "position")
    off = np.mean([(c**2).sum() - (np.diagonal(c) ** 2).sum() for c in own])
    floor = 0.2 * off / (8 if reduction == "per_dim" else 1)
    assert list(read.notes) == ["rsd/floor"] and float(read.notes["rsd/floor"]) == pytest.approx(floor, rel=1e-3)
    config.target = "teacher_correlation"
    read = comparison(diagnose=True, **parts)
    config.build(sizes(student_width=8)).compare(read)
    assert not read.notes


@each("projector", ["aad", "linear"])
@each("samples", SAMPLES)
def test_one_projector_a_point_and_one_for_features(samples: str, projector: str) -> None:
    places = len(list(RSDLossConfig(samples=samples, projector=projector).build(sizes(points=3)).projectors))
    assert places == (1 if samples == "pre_logits" else 3)


# -- all forms --------------------------------------------------------------------------------------------------------


@each("target", ["identity", "teacher_correlation"])
@each("projector", ["aad", "linear", "none"])
@each("case", ["random", "constant student", "constant teacher", "equal tokens", "match", "one image", "one token"])
def test_gradients_are_finite(case: str, projector: str, target: str) -> None:
    torch.manual_seed(0)
    loss = RSDLossConfig(projector=projector, target=target).build(sizes(student_width=8))
    student, teacher = randn(2, 4, 15, 8), randn(2, 4, 15, 8, seed=1)
    if case == "constant student":
        student = torch.zeros(2, 4, 15, 8)
    elif case == "constant teacher":
        teacher = torch.zeros(2, 4, 15, 8)
    elif case == "equal tokens":
        student = student[:, :, :1].expand(2, 4, 15, 8).clone()
        teacher = teacher[:, :, :1].expand(2, 4, 15, 8).clone()
    elif case == "match":
        student = teacher.clone()
    elif case == "one image":
        student, teacher = student[:, :1], teacher[:, :1]
    elif case == "one token":
        student, teacher = student[:, :, :1], teacher[:, :, :1]
    student, teacher = (x.clone().requires_grad_() for x in (student, teacher))
    value = loss(student, teacher)
    value.backward()
    assert value.ndim == 0 and torch.isfinite(value)
    for tensor in (student, teacher, *loss.parameters()):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all()


@each("projector", ["aad", "linear", "none"])
@each("tokens", [(16, 15), (15, 16), (1, 15)])
def test_different_token_counts_are_noticed(projector: str, tokens: tuple[int, int]) -> None:
    loss = RSDLossConfig(projector=projector).build(sizes(student_width=8))
    with pytest.raises(AssertionError):
        loss(randn(2, 4, tokens[0], 8), randn(2, 4, tokens[1], 8, seed=1))
