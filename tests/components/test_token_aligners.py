import dataclasses
import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from each import each
from torch import Tensor, nn

from basd.components.sizes import Sizes
from basd.components.token_aligners import TOKEN_ALIGNERS
from basd.components.token_aligners.cross_attention import CrossAttentionConfig
from basd.components.token_aligners.diagnostics import aligner_diagnostics
from basd.components.token_aligners.interpolate import InterpolateConfig
from basd.components.token_aligners.student_projection import StudentProjectionConfig

GRIDS = [((3, 4), (5, 3)), ((6, 6), (8, 8)), ((4, 4), (2, 5)), ((3, 4), (3, 4))]
# every aligner, and cross_attention with a value map
KINDS = [*TOKEN_ALIGNERS, "projected"]


def sizes(student: tuple[int, int] = (3, 4), teacher: tuple[int, int] = (5, 3), width: int = 32) -> Sizes:
    return Sizes(
        points=(1, 3),
        image_size=24,
        student_depth=4,
        student_width=6,
        student_heads=2,
        student_grid=student,
        teacher_depth=3,
        teacher_width=width,
        teacher_heads=4,
        teacher_grid=teacher,
        total_steps=10,
    )


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixtures(s: Sizes, batch: int = 3, seed: int = 0) -> Tensor:
    return torch.nn.functional.layer_norm(
        randn(2, batch, s.teacher_tokens, s.teacher_width, seed=seed), (s.teacher_width,)
    )


def build(kind: str, s: Sizes, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "projected":
        return CrossAttentionConfig(values="projected", **options).build(s)
    return TOKEN_ALIGNERS[kind](**options).build(s)


def perturb(module: nn.Module, amount: float = 0.1) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return module


def naive_area(student: tuple[int, int], teacher: tuple[int, int]) -> np.ndarray:
    """Mean over the area that a student cell covers, by loops over cells: (N_s, N_t)."""

    def shared(a: int, cells_a: int, b: int, cells_b: int) -> float:
        return max(0.0, min((a + 1) / cells_a, (b + 1) / cells_b) - max(a / cells_a, b / cells_b))

    rows = []
    for y in range(student[0]):
        for x in range(student[1]):
            row = []
            for v in range(teacher[0]):
                for u in range(teacher[1]):
                    row.append(shared(y, student[0], v, teacher[0]) * shared(x, student[1], u, teacher[1]))
            rows.append(np.array(row) / sum(row))
    return np.array(rows)


@each("student, teacher", GRIDS)
def test_interpolate_equals_overlap_loops(student: tuple[int, int], teacher: tuple[int, int]) -> None:
    s = sizes(student, teacher)
    aligner = InterpolateConfig().build(s)
    tokens = mixtures(s)
    expected = np.einsum("st,mbtd->mbsd", naive_area(student, teacher), tokens.double().numpy())
    np.testing.assert_allclose(aligner(tokens).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert not list(aligner.parameters())


@each("kind", TOKEN_ALIGNERS)
@each("student, teacher", GRIDS)
def test_rows_sum_to_one_and_values_are_the_tokens(
    kind: str, student: tuple[int, int], teacher: tuple[int, int]
) -> None:
    s = sizes(student, teacher)
    aligner: Any = perturb(build(kind, s))
    assert TOKEN_ALIGNERS[kind]().name == kind
    tokens = mixtures(s)
    weights = aligner.weights(tokens).expand(2, 3, -1, -1)
    assert weights.shape == (2, 3, s.student_tokens, s.teacher_tokens)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert (weights >= 0).all()
    torch.testing.assert_close(aligner(tokens), weights @ tokens, rtol=1e-4, atol=1e-5)


@each("student, teacher", GRIDS)
def test_cross_attention_weights_equal_loops(student: tuple[int, int], teacher: tuple[int, int]) -> None:
    """P_ij = softmax_j(q_i · W(t_j + p_j)), with queries and W perturbed."""
    s = sizes(student, teacher, width=8)
    aligner, tokens = CrossAttentionConfig().build(s), mixtures(s)
    perturb(aligner, 0.3)
    q, w, p, t = (
        tensor.detach().double().numpy()
        for tensor in (aligner.get_parameter("queries"), aligner.get_parameter("key_weight"), aligner.position, tokens)  # type: ignore[union-attr]
    )
    assert np.abs(w - w.transpose(0, 2, 1)).max() > 0.1
    assert sum(parameter.numel() for parameter in aligner.parameters()) == 2 * (s.student_tokens * 8 + 8 * 8)
    expected = np.zeros((2, 3, s.student_tokens, s.teacher_tokens))
    for m in range(2):
        for b in range(3):
            keys = [w[m] @ (t[m, b, j] + p[j]) for j in range(s.teacher_tokens)]
            for i in range(s.student_tokens):
                scores = [sum(q[m, i, d] * key[d] for d in range(8)) for key in keys]
                powers = [math.exp(score - max(scores)) for score in scores]
                expected[m, b, i] = [power / sum(powers) for power in powers]
    weights = aligner.weights(tokens)  # type: ignore[operator]
    np.testing.assert_allclose(weights.detach().numpy(), expected, rtol=1e-3, atol=1e-5)


@each(
    "student, teacher, width",
    [((3, 4), (5, 3), 32), ((6, 6), (8, 8), 96), ((14, 14), (16, 16), 64), ((5, 5), (8, 8), 96), ((4, 4), (4, 4), 32)],
)
def test_cross_attention_starts_close_to_area_overlap(
    student: tuple[int, int], teacher: tuple[int, int], width: int
) -> None:
    torch.manual_seed(0)
    s = sizes(student, teacher, width)
    aligner, tokens = CrossAttentionConfig().build(s), mixtures(s)
    area = torch.from_numpy(naive_area(student, teacher)).float()
    weights = aligner.weights(tokens)
    # half the L1 distance of rows: 0 for equal, 1 for disjoint, about 0.9 for a uniform P
    assert (weights - area).abs().sum(-1).mean().item() / 2 < 0.5
    assert (weights * (area > 0)).sum(-1).mean().item() > 0.6
    together = torch.stack([aligner(tokens).flatten(), (area @ tokens).flatten()])
    assert torch.corrcoef(together)[0, 1].item() > 0.8


@each("student, teacher", [((3, 4), (5, 3)), ((14, 14), (14, 14))])
def test_cross_attention_can_learn_from_its_start(student: tuple[int, int], teacher: tuple[int, int]) -> None:
    """A start so sharp that the softmax is saturated would stay interpolation forever."""
    s = sizes(student, teacher, 64)
    aligner, tokens = CrossAttentionConfig().build(s), mixtures(s, batch=2)
    aligner(tokens).backward(randn(2, 2, s.student_tokens, 64, seed=1))
    for name, parameter in aligner.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().mean()) > 1e-4, name


def test_cross_attention_scores_each_token_by_itself() -> None:
    """P = softmax(q · W(LN0(T) + position)): the odds of two places do not depend on a third."""
    torch.manual_seed(0)
    s = sizes()
    aligner = CrossAttentionConfig().build(s)
    with torch.no_grad():
        for parameter in aligner.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = mixtures(s)
    plain = aligner.weights(tokens).detach()
    changed = tokens.clone()
    changed[:, :, 4] = mixtures(s, seed=5)[:, :, 4]
    others = [k for k in range(15) if k != 4]
    got = aligner.weights(changed).detach()
    assert (got - plain).abs().max() > 0.01
    for weights in (got, plain):
        weights[..., 4] = 0
    odds = [w[..., others] / w[..., others].sum(-1, keepdim=True) for w in (got, plain)]
    torch.testing.assert_close(odds[0], odds[1], rtol=1e-3, atol=1e-5)


@each("gradient", ["joint", "detached"])
@each("values", ["identity", "projected"])
def test_gradient(values: str, gradient: str) -> None:
    config = CrossAttentionConfig(values=values, gradient=gradient)
    tokens = mixtures(sizes())
    # the setting does not change the values
    assert torch.equal(config.build(sizes())(tokens), CrossAttentionConfig(values=values).build(sizes())(tokens))
    aligner = perturb(config.build(sizes()))
    tokens.requires_grad_()
    aligner(tokens).backward(randn(2, 3, 12, 32, seed=1))
    assert tokens.grad is not None and tokens.grad.any()
    trained = {name for name, parameter in aligner.named_parameters() if parameter.grad is not None}
    if gradient == "detached":
        assert not trained
        return
    assert trained == {"queries", "key_weight"} | ({"value_weight"} if values == "projected" else set())
    assert all(p.grad is not None and p.grad.abs().max() > 1e-4 for p in aligner.parameters())


# -- values=projected -------------------------------------------------------------------------------------------------


@each("student, teacher", GRIDS)
def test_projected_values_equal_loops(student: tuple[int, int], teacher: tuple[int, int]) -> None:
    s = sizes(student, teacher)
    aligner, tokens = perturb(build("projected", s)), mixtures(s)
    p, t = aligner.weights(tokens).detach().double().numpy(), tokens.double().numpy()  # type: ignore[operator]
    values = aligner.get_parameter("value_weight").detach().double().numpy()
    expected = np.zeros((2, 3, s.student_tokens, 32))
    for m in range(2):
        for b in range(3):
            projected = np.stack([token @ values[m] for token in t[m, b]])
            for i in range(s.student_tokens):
                mixed = sum(p[m, b, i, j] * projected[j] for j in range(s.teacher_tokens))
                expected[m, b, i] = (mixed - mixed.mean()) / math.sqrt(mixed.var() + 1e-5)
    np.testing.assert_allclose(aligner(tokens).detach().numpy(), expected, rtol=1e-3, atol=1e-4)


def test_projected_values_start_as_the_tokens_but_for_the_norm() -> None:
    s = sizes()
    tokens = mixtures(s)
    plain, projected = build("cross_attention", s)(tokens), build("projected", s)(tokens)
    torch.testing.assert_close(projected, nn.functional.layer_norm(plain, (32,)), rtol=1e-4, atol=1e-5)
    added = set(build("projected", s).state_dict()) - set(build("cross_attention", s).state_dict())
    assert added == {"value_weight"}
    aligner = build("projected", s)
    assert aligner.get_parameter("value_weight").shape == (2, 32, 32)
    # tokens of zero have finite gradients
    aligner(torch.zeros(2, 3, 15, 32)).backward(randn(2, 3, 12, 32))
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in aligner.parameters())


def test_a_trained_value_map_can_collapse_the_target_and_a_detached_one_cannot() -> None:
    """Why values are the teacher's own tokens by default: V can make the target a constant of full size."""
    s = sizes()
    tokens = nn.functional.layer_norm(mixtures(s) + randn(32, seed=7), (32,))  # as in ViTs, tokens share a part
    aligner = build("projected", s)

    def shares() -> Tensor:
        with torch.no_grad():
            values = aligner_diagnostics(aligner.weights(tokens), tokens, s, aligner(tokens))  # type: ignore[operator]
        return values["spatial_variance_share"]

    start = shares()
    optimizer = torch.optim.Adam([aligner.get_parameter("value_weight")], lr=0.03)
    for _ in range(100):
        target = aligner(tokens)
        optimizer.zero_grad()
        # the loss of a student that always predicts the mean
        (target - target.mean(dim=(1, 2), keepdim=True)).square().mean().backward()
        optimizer.step()
    assert (shares() < 0.05 * start).all()
    assert float(aligner(tokens).detach().square().mean()) > 0.9
    # the variance share of P alone does not fall
    only_p = aligner_diagnostics(aligner.weights(tokens), tokens, s)["spatial_variance_share"]  # type: ignore[operator]
    assert (only_p > 0.5).all()
    assert not build("projected", s, gradient="detached")(tokens).requires_grad


# -- controls ---------------------------------------------------------------------------------------------------------


def test_only_student_projection_has_a_student_mlp_and_its_teacher_side_is_interpolate() -> None:
    assert set(TOKEN_ALIGNERS) == {"cross_attention", "interpolate", "student_projection", "frozen_random"}
    assert {kind for kind, config in TOKEN_ALIGNERS.items() if config.student_mlp} == {"student_projection"}
    # a class attribute, not a setting
    assert all("student_mlp" not in dataclasses.asdict(config()) for config in TOKEN_ALIGNERS.values())
    tokens = mixtures(sizes())
    assert torch.equal(StudentProjectionConfig().build(sizes())(tokens), InterpolateConfig().build(sizes())(tokens))


def naive_row_entropy(p: np.ndarray) -> float:
    return float(np.mean([-sum(x * math.log(x) for x in row if x > 0) for row in p.reshape(-1, p.shape[-1])]))


@each("student, teacher", [*GRIDS, ((14, 14), (16, 16)), ((2, 3), (1, 1))])
def test_frozen_random_is_as_sharp_as_the_start_of_cross_attention(
    student: tuple[int, int], teacher: tuple[int, int]
) -> None:
    s = sizes(student, teacher)
    # tokens of zero: positions alone set the start
    nothing = torch.zeros(2, 1, s.teacher_tokens, 32)
    start, random = (build(kind, s).weights(nothing).detach() for kind in ("cross_attention", "frozen_random"))  # type: ignore[operator]
    entropies = [naive_row_entropy(p.double().numpy()) for p in (start, random)]
    assert entropies[1] == pytest.approx(entropies[0], abs=1e-3)


@each("student, teacher", [((6, 6), (8, 8)), ((14, 14), (16, 16)), ((5, 5), (8, 8))])
def test_frozen_random_looks_at_no_place_in_particular(student: tuple[int, int], teacher: tuple[int, int]) -> None:
    s = sizes(student, teacher, 48)
    seen = naive_area(student, teacher) > 0
    chance = seen.mean()
    p = build("frozen_random", s).weights(mixtures(s))[:, 0].numpy()  # type: ignore[operator]
    at_its_place = (p * seen).sum(axis=-1).mean()
    assert at_its_place == pytest.approx(chance, abs=0.06)
    assert (build("cross_attention", s).weights(mixtures(s)) * torch.from_numpy(seen)).sum(-1).mean() > 0.6  # type: ignore[operator]


def test_frozen_random_depends_on_the_seed_and_the_point_but_not_on_the_tokens() -> None:
    s = sizes()
    first, again, other = (build("frozen_random", s, seed).weights(mixtures(s)) for seed in (0, 0, 1))  # type: ignore[operator]
    assert first.shape == (2, 1, 12, 15) and torch.equal(first, again)
    assert (first - other).abs().max() > 0.1 and (first[0] - first[1]).abs().max() > 0.1
    assert torch.equal(build("frozen_random", s).weights(mixtures(s, seed=3)), first)  # type: ignore[operator]


@each("kind", KINDS)
def test_a_checkpoint_gives_the_same_output(kind: str) -> None:
    s = sizes()
    tokens = mixtures(s)
    trained = perturb(build(kind, s, seed=1))
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    restored = build(kind, s, seed=2)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(restored(tokens), trained(tokens))


@each("kind", ["interpolate", "student_projection", "frozen_random"])
def test_controls_have_nothing_to_train(kind: str) -> None:
    aligner = build(kind, sizes())
    assert not list(aligner.parameters())
    # a checkpoint keeps what is drawn, not what follows from the sizes
    assert set(aligner.state_dict()) == ({"attention"} if kind == "frozen_random" else set())


# -- diagnostics ------------------------------------------------------------------------------------------------------


def diagnose(weights: Tensor, tokens: Tensor, s: Sizes) -> dict[str, Any]:
    return {name: values.tolist() for name, values in aligner_diagnostics(weights, tokens, s).items()}


def test_diagnostics_of_a_uniform_map_and_of_area_overlap() -> None:
    s = sizes()
    values = diagnose(torch.full((2, 3, 12, 15), 1 / 15), mixtures(s), s)
    assert values["spatial_variance_share"] == pytest.approx([0, 0], abs=1e-6)
    assert values["effective_rank"] == pytest.approx([1, 1], abs=1e-3)
    assert values["row_entropy"] == pytest.approx([1, 1], abs=1e-4)
    # the places of an image are alike: all variance is between images
    assert values["input_variance_share"] == pytest.approx([1, 1], abs=1e-4)
    area = naive_area((3, 4), (5, 3))
    singular = np.linalg.svd(area, compute_uv=False)
    share = singular / singular.sum()
    rank = math.exp(-sum(x * math.log(x) for x in share if x > 1e-12))
    for shape in ((1, 1), (2, 1), (2, 3)):
        values = diagnose(torch.from_numpy(area).float().expand(*shape, 12, 15), mixtures(s), s)
        assert values["spatial_variance_share"] == pytest.approx([1, 1], abs=1e-4), shape
        assert values["effective_rank"] == pytest.approx([rank, rank], rel=1e-3), shape
        assert values["row_entropy"] == pytest.approx([naive_row_entropy(area) / math.log(15)] * 2, rel=1e-3), shape


def test_input_variance_share_equals_loops() -> None:
    s = sizes()
    tokens = mixtures(s) + 2 * randn(2, 1, 15, 32, seed=3)  # much of the variance is the same in all images
    area = torch.from_numpy(naive_area((3, 4), (5, 3))).float()
    aligned = (area @ tokens).double().numpy()
    expected = []
    for m in range(2):
        total = np.mean([aligned[m, :, :, d].var() for d in range(32)])
        between = np.mean([aligned[m, :, n, d].var() for n in range(12) for d in range(32)])
        expected.append(between / total)
    values = diagnose(area.expand(1, 1, 12, 15), tokens, s)
    assert values["input_variance_share"] == pytest.approx(expected, rel=1e-3)
    constant = diagnose(area.expand(1, 1, 12, 15), tokens[:, :1].expand(2, 3, 15, 32), s)
    assert constant["input_variance_share"] == pytest.approx([0, 0], abs=1e-6)


def make_uniform(aligner: nn.Module) -> nn.Module:
    """The aligner with a uniform P."""
    with torch.no_grad():
        for name, tensor in [*aligner.named_parameters(), *aligner.named_buffers()]:
            if name == "queries":
                tensor.zero_()
            elif name in ("attention", "resampling"):
                tensor.fill_(1 / tensor.shape[-1])
    return aligner


@each("kind", KINDS)
@each("student, teacher", GRIDS)
def test_a_uniform_map_is_visible_in_every_aligner(
    kind: str, student: tuple[int, int], teacher: tuple[int, int]
) -> None:
    s = sizes(student, teacher)
    tokens = mixtures(s)

    def seen(aligner: nn.Module) -> dict[str, list[float]]:
        with torch.no_grad():
            weights, aligned = aligner.weights(tokens), aligner(tokens)  # type: ignore[operator]
        values = aligner_diagnostics(weights, tokens, s, aligned)
        if kind != "projected":
            for name, without in aligner_diagnostics(weights, tokens, s).items():
                torch.testing.assert_close(values[name], without, rtol=1e-4, atol=1e-6)
        return {name: value.tolist() for name, value in values.items()}

    start, uniform = seen(build(kind, s)), seen(make_uniform(build(kind, s)))
    assert min(start["spatial_variance_share"]) > 0.3 and min(start["effective_rank"]) > 2
    assert uniform["spatial_variance_share"] == pytest.approx([0, 0], abs=1e-6)
    assert uniform["effective_rank"] == pytest.approx([1, 1], abs=1e-2)
    assert uniform["row_entropy"] == pytest.approx([1, 1], abs=1e-4)
    assert uniform["input_variance_share"] == pytest.approx([1, 1], abs=1e-3)
