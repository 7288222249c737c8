import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from basd.components.sizes import Sizes
from basd.components.token_aligners import TOKEN_ALIGNERS
from basd.components.token_aligners.cross_attention import CrossAttentionConfig
from basd.components.token_aligners.diagnostics import aligner_diagnostics
from basd.components.token_aligners.interpolate import InterpolateConfig

GRIDS = [((3, 4), (5, 3)), ((6, 6), (8, 8)), ((4, 4), (2, 5)), ((3, 4), (3, 4))]


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


def naive_area(student: tuple[int, int], teacher: tuple[int, int]) -> np.ndarray:
    """Mean over what a student cell covers, by loops over cells: (N_s, N_t)."""

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


@pytest.mark.parametrize("student, teacher", GRIDS)
def test_interpolate_equals_overlap_loops(student: tuple[int, int], teacher: tuple[int, int]) -> None:
    s = sizes(student, teacher)
    aligner = InterpolateConfig().build(s)
    tokens = mixtures(s)
    expected = np.einsum("st,mbtd->mbsd", naive_area(student, teacher), tokens.double().numpy())
    np.testing.assert_allclose(aligner(tokens).numpy(), expected, rtol=1e-4, atol=1e-5)
    assert not list(aligner.parameters())


@pytest.mark.parametrize("kind", TOKEN_ALIGNERS)
@pytest.mark.parametrize("student, teacher", GRIDS)
def test_rows_sum_to_one_and_values_are_the_tokens(
    kind: str, student: tuple[int, int], teacher: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    s = sizes(student, teacher)
    aligner = TOKEN_ALIGNERS[kind]().build(s)
    assert TOKEN_ALIGNERS[kind]().name == kind
    with torch.no_grad():
        for parameter in aligner.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = mixtures(s)
    weights = aligner.weights(tokens).expand(2, 3, -1, -1)
    assert weights.shape == (2, 3, s.student_tokens, s.teacher_tokens)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert (weights >= 0).all()
    torch.testing.assert_close(aligner(tokens), weights @ tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
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
    assert float((weights - area).abs().sum(-1).mean() / 2) < 0.5
    assert float((weights * (area > 0)).sum(-1).mean()) > 0.6
    together = torch.stack([aligner(tokens).flatten(), (area @ tokens).flatten()])
    assert float(torch.corrcoef(together)[0, 1]) > 0.8


@pytest.mark.parametrize("student, teacher", [((3, 4), (5, 3)), ((14, 14), (14, 14))])
def test_cross_attention_can_learn_from_its_start(student: tuple[int, int], teacher: tuple[int, int]) -> None:
    """A start so sharp that the softmax is saturated would stay interpolation for ever."""
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


def test_cross_attention_has_queries_and_keys_per_point() -> None:
    torch.manual_seed(0)
    s = sizes()
    aligner = CrossAttentionConfig().build(s)
    assert sum(p.numel() for p in aligner.parameters()) == 2 * (s.student_tokens * 32 + 32 * 32)
    with torch.no_grad():
        for parameter in aligner.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    first, second = aligner.weights(mixtures(s)[:1].expand(2, -1, -1, -1))
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("gradient", ["joint", "detached"])
def test_gradient(gradient: str) -> None:
    aligner = CrossAttentionConfig(gradient=gradient).build(sizes())
    tokens = mixtures(sizes()).requires_grad_()
    aligner(tokens).backward(randn(2, 3, 12, 32, seed=1))
    assert tokens.grad is not None and tokens.grad.any()
    for parameter in aligner.parameters():
        assert (parameter.grad is not None) == (gradient == "joint")


def diagnose(weights: Tensor, tokens: Tensor, s: Sizes) -> dict[str, Any]:
    return {name: values.tolist() for name, values in aligner_diagnostics(weights, tokens, s).items()}


def test_diagnostics_of_a_uniform_map() -> None:
    s = sizes()
    values = diagnose(torch.full((2, 3, 12, 15), 1 / 15), mixtures(s), s)
    assert values["spatial_variance_share"] == pytest.approx([0, 0], abs=1e-6)
    assert values["effective_rank"] == pytest.approx([1, 1], abs=1e-3)
    assert values["row_entropy"] == pytest.approx([1, 1], abs=1e-4)
    # all that is left of a token is its image
    assert values["input_variance_share"] == pytest.approx([1, 1], abs=1e-4)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (2, 3)])
def test_diagnostics_of_area_overlap(shape: tuple[int, int]) -> None:
    s = sizes()
    area = torch.from_numpy(naive_area((3, 4), (5, 3))).float()
    values = diagnose(area.expand(*shape, 12, 15), mixtures(s), s)
    assert values["spatial_variance_share"] == pytest.approx([1, 1], abs=1e-4)
    singular = np.linalg.svd(area.double().numpy(), compute_uv=False)
    share = singular / singular.sum()
    rank = math.exp(-sum(x * math.log(x) for x in share if x > 1e-12))
    assert values["effective_rank"] == pytest.approx([rank, rank], rel=1e-3)
    entropy = float(np.mean([-sum(p * math.log(p) for p in row if p > 0) for row in area.double().numpy()]))
    assert values["row_entropy"] == pytest.approx([entropy / math.log(15)] * 2, rel=1e-3)


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
