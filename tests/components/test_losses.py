import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basd.components.losses import LOSSES, TOKEN_LOSSES, LossesConfig, enabled_losses, rsd
from basd.components.losses.attn import UNIFORM, AttentionLossConfig, layer_information
from basd.components.losses.rel import RelationLossConfig, draw_pairs, edge_products
from basd.components.losses.rsd import RSDLossConfig, correlation_floor, cross_correlation
from basd.components.losses.spectral import SpectralLossConfig
from basd.components.sizes import Sizes
from basd.models.resampling import resample_attention


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
        total_steps=10,
    )


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_registry() -> None:
    assert list(LOSSES) == ["rsd", "rel", "attn", "spectral"] and set(TOKEN_LOSSES) < set(LOSSES)
    config = LossesConfig()
    assert enabled_losses(config) == ()
    config.spectral.enabled = config.rsd.enabled = True
    assert enabled_losses(config) == ("rsd", "spectral")


# -- rsd --------------------------------------------------------------------------------------------------------------


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


def naive_rsd(correlation: np.ndarray, kappa: float) -> float:
    values = []
    for c in correlation:
        width = len(c)
        on = sum((1 - c[i, i]) ** 2 for i in range(width))
        off = sum(c[i, j] ** 2 for i in range(width) for j in range(width) if i != j)
        values.append((on + kappa * off) / width)
    return float(np.mean(values))


@pytest.mark.parametrize("center", ["position", "global"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 2, 7, 3), (3, 4, 1, 5)])
def test_cross_correlation_equals_loops(center: str, shape: tuple[int, ...]) -> None:
    student, teacher = 3 * randn(*shape) + 1, randn(*shape, seed=1) - 2
    got = cross_correlation(student, teacher, center)
    np.testing.assert_allclose(got.numpy(), naive_correlation(student, teacher, center), rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kappa", [0.0, 0.01, 0.5])
@pytest.mark.parametrize("center", ["position", "global"])
def test_rsd_equals_loops(monkeypatch: pytest.MonkeyPatch, kappa: float, center: str) -> None:
    torch.manual_seed(0)
    loss = RSDLossConfig(kappa=kappa, center=center).build(sizes())
    seen: list[tuple[Tensor, Tensor, str]] = []

    def recording(student: Tensor, teacher: Tensor, center: str) -> Tensor:
        seen.append((student, teacher, center))
        return cross_correlation(student, teacher, center)

    monkeypatch.setattr(rsd, "cross_correlation", recording)
    student, teacher = randn(2, 4, 15, 6), randn(2, 4, 15, 8, seed=1)
    value = loss(student, teacher)
    ((projected, aligned, how),) = seen
    assert how == center and torch.equal(aligned, teacher) and projected.shape == teacher.shape
    expected = naive_rsd(naive_correlation(projected, teacher, center), kappa)
    assert float(value.detach()) == pytest.approx(expected, rel=1e-4)


def test_projector_is_linear_norm_gelu_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    loss = RSDLossConfig().build(sizes())
    seen: list[Tensor] = []

    def recording(student: Tensor, teacher: Tensor, center: str) -> Tensor:
        seen.append(student)
        return cross_correlation(student, teacher, center)

    monkeypatch.setattr(rsd, "cross_correlation", recording)
    student, teacher = 2 * randn(2, 4, 15, 6) + 1, randn(2, 4, 15, 8, seed=1)
    loss.train()(student, teacher)
    loss.eval()(student, teacher)
    parameters = list(loss.parameters())
    assert sum(p.numel() for p in parameters) == 2 * (6 * 16 + 2 * 16 + 16 * 8)
    first = torch.cat([p.reshape(-1, 16, 6) for p in parameters if p.shape[-2:] == (16, 6)])
    last = torch.cat([p.reshape(-1, 8, 16) for p in parameters if p.shape[-2:] == (8, 16)])
    for m in range(2):
        hidden = student[m].reshape(-1, 6).double() @ first[m].double().T
        hidden = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-5).sqrt()
        expected = (F.gelu(hidden) @ last[m].double().T).reshape(4, 15, 8).float()
        for projected in seen:  # batch statistics in training and evaluation
            torch.testing.assert_close(projected[m], expected, rtol=1e-3, atol=1e-4)
    assert not list(loss.buffers())


@pytest.mark.parametrize("center", ["position", "global"])
def test_rsd_bounds(center: str) -> None:
    """1 for unrelated samples, 0 for a match of decorrelated channels, whatever the sizes."""
    for batch, tokens, width in ((64, 9, 8), (128, 20, 4), (200, 4, 16)):
        teacher = randn(1, batch, tokens, width)
        match = naive_rsd(cross_correlation(teacher, teacher, center).numpy(), 0.01)
        unrelated = naive_rsd(cross_correlation(randn(1, batch, tokens, width, seed=1), teacher, center).numpy(), 0.01)
        assert match < 0.01 and abs(unrelated - 1) < 0.1


@pytest.mark.parametrize("center", ["position", "global"])
def test_rsd_ignores_scale_and_shift_of_channels(center: str) -> None:
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


def test_position_only_student_is_rewarded_by_global_centring_only() -> None:
    position = randn(1, 1, 400, 8)
    teacher = position + 0.1 * randn(1, 8, 400, 8, seed=1)
    student = position.expand(1, 8, 400, 8)
    assert naive_rsd(cross_correlation(student, teacher, "global").numpy(), 0.01) < 0.03
    assert naive_rsd(cross_correlation(student, teacher, "position").numpy(), 0.01) == pytest.approx(1, abs=0.01)


def test_rsd_can_be_learned() -> None:
    torch.manual_seed(0)
    loss = RSDLossConfig().build(sizes(grid=(3, 3), points=1))
    teacher = randn(1, 32, 9, 8)
    student = teacher @ randn(8, 6, seed=1)
    assert 0.7 < float(loss(student, teacher).detach()) < 1.3
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        value = loss(student, teacher)
        value.backward()
        optimizer.step()
    # six channels know three quarters of eight
    assert float(value.detach()) < 0.3


# -- rel --------------------------------------------------------------------------------------------------------------


def test_pairs_are_different_and_ordered() -> None:
    first, second = draw_pairs(12, 40, generator(0))
    assert len(first) == 40 and bool((first < second).all()) and int(second.max()) < 12
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == 40
    again = draw_pairs(12, 40, generator(0))
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert not torch.equal(first, draw_pairs(12, 40, generator(1))[0])
    everything = set(zip(*(x.tolist() for x in draw_pairs(5, 1000, generator(0))), strict=True))
    assert everything == {(i, j) for i in range(5) for j in range(i + 1, 5)}


def naive_rel(student: Tensor, teacher: Tensor, first: Tensor, second: Tensor, prune: float) -> float:
    s, t = student.double().numpy(), teacher.double().numpy()
    values = []
    for m in range(len(s)):
        edges = []
        for b in range(s.shape[1]):
            for i, j in zip(first.tolist(), second.tolist(), strict=True):
                edges.append((s[m, b, i] - s[m, b, j], t[m, b, i] - t[m, b, j]))
        length_s = [np.linalg.norm(e) for e, _ in edges]
        length_t = [np.linalg.norm(e) for _, e in edges]
        eps_s, eps_t = 1e-3 * np.mean(length_s), 1e-3 * np.mean(length_t)
        threshold = np.quantile(length_t, prune)
        total = weight = 0.0
        for (edge_s, edge_t), long in zip(edges, length_t, strict=True):
            if long < threshold:
                continue
            unit_s = edge_s / math.sqrt(edge_s @ edge_s + eps_s**2)
            unit_t = edge_t / math.sqrt(edge_t @ edge_t + eps_t**2)
            total += 1 - unit_s @ unit_t
            weight += 1
        values.append(total / weight)
    return float(np.mean(values))


@pytest.mark.parametrize("prune", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("pairs, grid", [(20, (3, 5)), (4, (5, 7)), (1000, (2, 3))])
def test_rel_equals_loops(prune: float, pairs: int, grid: tuple[int, int]) -> None:
    loss = RelationLossConfig(num_pairs=pairs, prune=prune).build(sizes(grid))
    tokens = grid[0] * grid[1]
    # ten images: the quantile falls on an edge of its own for every interpolation rule
    student, teacher = randn(2, 10, tokens, 8) + 5, 2 * randn(2, 10, tokens, 8, seed=1) - 3
    first, second = draw_pairs(tokens, pairs, generator(7))
    expected = naive_rel(student, teacher, first, second, prune)
    assert float(loss(student, teacher, generator(7))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_edge_products_by_both_ways(shift: float) -> None:
    a, b = randn(2, 3, 12, 5) + shift, randn(2, 3, 12, 5, seed=1) + shift
    for count in (3, 60):  # few pairs: differences; many: the Gram matrix
        first, second = draw_pairs(12, count, generator(0))
        expected = torch.zeros(2, 3, count)
        for k, (i, j) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
            expected[:, :, k] = ((a[:, :, i] - a[:, :, j]) * (b[:, :, i] - b[:, :, j])).sum(-1)
        torch.testing.assert_close(edge_products(a, b, first, second), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pairs, grid", [(128, (3, 5)), (4, (5, 7))])
def test_rel_bounds_and_invariances(pairs: int, grid: tuple[int, int]) -> None:
    tokens = grid[0] * grid[1]
    loss = RelationLossConfig(num_pairs=pairs).build(sizes(grid))
    student, teacher = randn(2, 8, tokens, 64), randn(2, 8, tokens, 64, seed=1)
    assert float(loss(student, teacher, generator())) == pytest.approx(1, abs=0.15)
    assert float(loss(teacher, teacher, generator())) == pytest.approx(0, abs=1e-4)
    assert float(loss(-teacher, teacher, generator())) == pytest.approx(2, abs=1e-4)
    plain = float(loss(student, teacher, generator()))
    moved = 0.2 * student + 4 * randn(2, 8, 1, 64, seed=2)
    assert float(loss(moved, teacher, generator())) == pytest.approx(plain, abs=1e-3)
    moved = 7 * teacher + randn(2, 8, 1, 64, seed=2)
    assert float(loss(student, moved, generator())) == pytest.approx(plain, abs=1e-3)
    turned, _ = torch.linalg.qr(randn(64, 64, seed=3))
    assert float(loss(student @ turned, teacher @ turned, generator())) == pytest.approx(plain, abs=1e-3)


def test_rel_prunes_short_edges_of_the_teacher_only() -> None:
    """A tenth of the edges is much shorter than the rest: what the student does there does not count."""
    loss = RelationLossConfig(num_pairs=1000, prune=0.1).build(sizes((1, 5)))
    teacher = randn(1, 8, 5, 16)
    teacher[:, :, 1] = teacher[:, :, 0] + 1e-3 * randn(1, 8, 16, seed=1)  # one pair of ten
    student = teacher.clone()
    student[:, :, 1] = teacher[:, :, 0] - (teacher[:, :, 1] - teacher[:, :, 0])
    kept = RelationLossConfig(num_pairs=1000, prune=0.0).build(sizes((1, 5)))
    assert float(loss(student, teacher, generator())) < 1e-3
    assert float(kept(student, teacher, generator())) > 0.1


# -- attn -------------------------------------------------------------------------------------------------------------


def naive_attn(student: Tensor, teacher: Tensor, normalize: str) -> float:
    s, t = student.double().numpy(), teacher.double().numpy()
    values = []
    keys = t.shape[-1]
    for m in range(len(t)):
        divergence = information = rows = 0.0
        for row_s, row_t in zip(s[m].reshape(-1, keys), t[m].reshape(-1, keys), strict=True):
            divergence += sum(p * math.log(p / q) for p, q in zip(row_t, row_s, strict=True) if p > 0)
            information += sum(p * math.log(p * keys) for p in row_t if p > 0)
            rows += 1
        by = {"teacher_information": information, "log_n": rows * math.log(keys), "none": rows}[normalize]
        values.append(divergence / by)
    return float(np.mean(values))


def attention(*shape: int, seed: int, gain: float = 1.0) -> Tensor:
    return (gain * randn(*shape, seed=seed)).softmax(-1)


@pytest.mark.parametrize("normalize", ["teacher_information", "log_n", "none"])
def test_attn_equals_loops(normalize: str) -> None:
    loss = AttentionLossConfig(normalize=normalize).build(sizes())
    student, teacher = attention(2, 2, 3, 6, 6, seed=0), attention(2, 2, 3, 6, 6, seed=1, gain=3)
    teacher[0, 0, 0, 0] = torch.eye(6)[2]  # a row with zeros
    value = float(loss(student.log(), teacher))
    assert value == pytest.approx(naive_attn(student, teacher, normalize), rel=1e-4)


@pytest.mark.parametrize("gain", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("tokens", [3, 40])
def test_attn_bounds(gain: float, tokens: int) -> None:
    loss = AttentionLossConfig().build(sizes())
    teacher = attention(2, 2, 3, tokens, tokens, seed=1, gain=gain)
    uniform = torch.full_like(teacher, 1 / tokens).log()
    assert float(loss(uniform, teacher)) == pytest.approx(1, abs=5e-3)
    assert float(loss(teacher.clamp_min(1e-30).log(), teacher)) == pytest.approx(0, abs=5e-3)
    assert float(loss(attention(2, 2, 3, tokens, tokens, seed=2, gain=30).clamp_min(1e-30).log(), teacher)) > 1


def test_attn_counts_informative_points_only() -> None:
    loss = AttentionLossConfig().build(sizes())
    teacher = attention(3, 2, 3, 6, 6, seed=1, gain=2)
    teacher[1] = 1 / 6
    scores = randn(3, 2, 3, 6, 6).requires_grad_()
    student = scores.log_softmax(-1)
    value = loss(student, teacher, torch.tensor([True, False, True]))
    value.backward()
    kept = torch.tensor([0, 2])
    assert float(value.detach()) == pytest.approx(float(loss(student.detach()[kept], teacher[kept])))
    assert scores.grad is not None and torch.isfinite(scores.grad).all() and not scores.grad[1].any()


def test_layer_information_is_the_divergence_from_a_resampled_uniform_map() -> None:
    uniform = resample_attention(torch.full((10, 10), 1 / 10), (2, 2), (3, 3))
    layers = torch.stack([uniform.expand(2, 3, 5, 5), attention(2, 3, 5, 5, seed=1, gain=2)])
    found = layer_information(layers, uniform)
    assert float(found[0]) == pytest.approx(0, abs=1e-6)
    assert float(found[0]) < UNIFORM < float(found[1])
    naive = 0.0
    for row, reference in zip(layers[1].double().flatten(0, 2), uniform.double().repeat(6, 1), strict=True):
        naive += sum(float(p * math.log(p / q)) for p, q in zip(row.tolist(), reference.tolist(), strict=True)) / 30
    assert float(found[1]) == pytest.approx(naive, rel=1e-4)


def test_attn_denominator_is_detached() -> None:
    loss = AttentionLossConfig().build(sizes())
    scores = (2 * randn(1, 2, 3, 6, 6, seed=1)).requires_grad_()
    student = attention(1, 2, 3, 6, 6, seed=0).log()
    teacher = scores.softmax(-1)
    loss(student, teacher).backward()
    given = scores.grad
    again = scores.detach().clone().requires_grad_()
    teacher = again.softmax(-1)
    information = (teacher * (teacher * 6).log()).sum().detach()
    ((teacher * (teacher.log() - student)).sum() / information).backward()
    torch.testing.assert_close(given, again.grad, rtol=1e-3, atol=1e-6)


# -- spectral ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(3, 5), (4, 6), (5, 4), (1, 7), (2, 2)])
def test_spectral_equals_the_full_transform(grid: tuple[int, int]) -> None:
    loss = SpectralLossConfig().build(sizes(grid))
    tokens = grid[0] * grid[1]
    student, teacher = 2 * randn(2, 3, tokens, 8) + 1, randn(2, 3, tokens, 8, seed=1)
    s, t = (F.layer_norm(x.double(), (8,)).numpy() for x in (student, teacher))
    values = []
    for m in range(2):
        total = 0.0
        for b in range(3):
            for d in range(8):
                delta = np.fft.fft2((s[m, b, :, d] - t[m, b, :, d]).reshape(grid), norm="ortho")
                total += float((np.abs(delta) ** 2).sum())
        values.append(total / (2 * 3 * 8 * tokens))
    value = float(loss(student, teacher))
    assert value == pytest.approx(np.mean(values), rel=1e-4)
    # Parseval: half the spatial mean squared error
    assert value == pytest.approx(float(np.square(s - t).mean() / 2), rel=1e-4)


def test_spectral_bounds() -> None:
    loss = SpectralLossConfig().build(sizes((5, 7)))
    student, teacher = randn(2, 8, 35, 16), randn(2, 8, 35, 16, seed=1)
    assert float(loss(student, teacher)) == pytest.approx(1, abs=0.05)
    assert float(loss(teacher, teacher)) == pytest.approx(0, abs=1e-6)
    assert float(loss(3 * teacher + 1, teacher)) == pytest.approx(0, abs=1e-4)


# -- all --------------------------------------------------------------------------------------------------------------


def call(name: str, loss: nn.Module, student: Tensor, teacher: Tensor) -> Tensor:
    return loss(student, teacher, generator()) if name == "rel" else loss(student, teacher)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
@pytest.mark.parametrize(
    "case", ["random", "constant student", "constant teacher", "equal tokens", "match", "one image"]
)
def test_gradients_are_finite(name: str, case: str) -> None:
    torch.manual_seed(0)
    loss = LOSSES[name](enabled=True).build(sizes(student_width=8))
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
    student.requires_grad_()
    teacher.requires_grad_()
    value = call(name, loss, student, teacher)
    value.backward()
    assert value.ndim == 0 and torch.isfinite(value)
    for tensor in (student, teacher, *loss.parameters()):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all()


@pytest.mark.parametrize("name", ["rel", "spectral"])
def test_points_are_averaged(name: str) -> None:
    both = LOSSES[name](enabled=True).build(sizes(student_width=8))
    student, teacher = randn(2, 4, 15, 8), randn(2, 4, 15, 8, seed=1)
    teacher[1] = student[1]
    together = float(call(name, both, student, teacher))
    single = LOSSES[name](enabled=True).build(sizes(student_width=8, points=1))
    alone = [float(call(name, single, student[m : m + 1], teacher[m : m + 1])) for m in range(2)]
    assert together == pytest.approx(sum(alone) / 2, rel=1e-4)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_different_token_counts_are_noticed(name: str) -> None:
    """components.md, rule 4: a token loss compares the same places."""
    loss = LOSSES[name](enabled=True).build(sizes(student_width=8))
    for student, teacher in ((16, 15), (15, 16)):
        with pytest.raises((AssertionError, ValueError, RuntimeError)):
            call(name, loss, randn(2, 4, student, 8), randn(2, 4, teacher, 8, seed=1))


def test_rsd_floor_is_the_loss_of_a_perfect_match() -> None:
    """Correlated teacher channels: the identity target leaves κ·Σ_{i≠j}corr²/D; decorrelated ones leave nothing."""
    teacher = randn(2, 8, 15, 6, seed=3)
    teacher[..., 1] = teacher[..., 0] + 0.1 * teacher[..., 1]
    own = cross_correlation(teacher, teacher, "position")
    diagonal = own.diagonal(dim1=1, dim2=2)
    on = (1 - diagonal).square().sum(1)
    off = 0.5 * (own.square().sum((1, 2)) - diagonal.square().sum(1))
    perfect = ((on + off) / 6).mean()
    assert float(correlation_floor(teacher, "position", 0.5)) == pytest.approx(float(perfect), rel=1e-3)
    assert float(correlation_floor(teacher, "position", 0.5)) > 0.1
