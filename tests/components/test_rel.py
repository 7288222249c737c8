import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from each import each
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from basd.components.comparison import PROJECTION, TOKENS, TWO_VIEWS
from basd.components.losses.rel import (
    PAIRS_STREAM,
    RelationLoss,
    RelationLossConfig,
    all_pairs,
    differences,
    differences_by_product,
    draw_pairs,
    edge_products,
)
from basd.components.losses.vrm import VRMLoss
from basd.components.sizes import Sizes

EDGES = ("unit_difference", "difference", "cosine_gram")


def sizes(grid: tuple[int, int] = (3, 5), points: int = 2) -> Sizes:
    return Sizes(
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
        total_steps=10,
    )


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(grid: tuple[int, int] = (3, 5), **options: Any) -> RelationLoss:
    loss = RelationLossConfig(**options).build(sizes(grid))
    assert isinstance(loss, RelationLoss)
    return loss


def test_pairs_are_different_and_ordered() -> None:
    first, second = draw_pairs(12, 40, generator(0))
    assert len(first) == 40 and bool((first < second).all()) and int(second.max()) < 12
    assert len(set(zip(first.tolist(), second.tolist(), strict=True))) == 40
    again = draw_pairs(12, 40, generator(0))
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert not torch.equal(first, draw_pairs(12, 40, generator(1))[0])
    for pairs in (draw_pairs(5, 1000, generator(0)), all_pairs(5)):
        listed = list(zip(*(x.tolist() for x in pairs), strict=True))
        assert len(listed) == 10 and set(listed) == {(i, j) for i in range(5) for j in range(i + 1, 5)}


def huber(x: float, delta: float | None) -> float:
    if delta is None or abs(x) < delta:
        return 0.5 * x * x
    return delta * (abs(x) - 0.5 * delta)


def naive_rel(
    student: Tensor,
    teacher: Tensor,
    pairs: list[tuple[int, int]],
    prune: float,
    edge: str = "unit_difference",
    delta: float | None = None,
    pooled: bool = False,
) -> float:
    s, t = student.double().numpy(), teacher.double().numpy()
    if pooled:
        s, t = s.mean(2)[:, None], t.mean(2)[:, None]
    values = []
    for m in range(len(s)):
        places = [(b, i, j) for b in range(s.shape[1]) for i, j in pairs]
        edges_s = [s[m, b, i] - s[m, b, j] for b, i, j in places]
        edges_t = [t[m, b, i] - t[m, b, j] for b, i, j in places]
        lengths = [np.linalg.norm(e) for e in edges_t]
        # the shortest edges of the teacher do not count
        threshold = sorted(lengths)[int(prune * len(lengths))]
        kept = [k for k, length in enumerate(lengths) if length >= threshold]
        if edge == "cosine_gram":
            values.append(naive_cosines(s[m], t[m], [places[k] for k in kept], delta))
            continue
        if edge == "unit_difference":
            eps_s, eps_t = (1e-3 * np.mean([np.linalg.norm(e) for e in edges]) for edges in (edges_s, edges_t))
            edges_s = [e / math.sqrt(e @ e + eps_s**2) for e in edges_s]
            edges_t = [e / math.sqrt(e @ e + eps_t**2) for e in edges_t]
        else:
            rms_s, rms_t = (math.sqrt(np.mean([edges[k] @ edges[k] for k in kept])) for edges in (edges_s, edges_t))
            edges_s, edges_t = [e / rms_s for e in edges_s], [e / rms_t for e in edges_t]
        values.append(float(np.mean([sum(huber(x, delta) for x in edges_s[k] - edges_t[k]) for k in kept])))
    return float(np.mean(values))


def naive_cosines(s: np.ndarray, t: np.ndarray, kept: list[tuple[int, int, int]], delta: float | None) -> float:
    found = []
    for x in (s, t):
        centred = [[token - image.mean(0) for token in image] for image in x]
        epsilon = 1e-3 * np.mean([np.linalg.norm(token) for image in centred for token in image])
        norms = [[math.sqrt(token @ token + epsilon**2) for token in image] for image in centred]
        found.append([centred[b][i] @ centred[b][j] / (norms[b][i] * norms[b][j]) for b, i, j in kept])
    missed = sum(2 * huber(a - b, delta) for a, b in zip(*found, strict=True))
    return missed / (sum(b**2 for b in found[1]) + 1e-6 * len(kept))


@each("edge", EDGES)
@each("delta", [None, 0.1])
@each("prune", [0.0, 0.1, 0.5])
@each("pairs, grid", [(20, (3, 5)), (4, (5, 7)), (1000, (2, 3))])
def test_rel_equals_loops(edge: str, delta: float | None, prune: float, pairs: int, grid: tuple[int, int]) -> None:
    loss = build(grid, num_pairs=pairs, prune=prune, edge=edge, huber_delta=delta)
    tokens = grid[0] * grid[1]
    student, teacher = randn(2, 4, tokens, 8) + 5, 2 * randn(2, 4, tokens, 8, seed=1) - 3
    drawn = draw_pairs(tokens, pairs, generator(7))
    listed = list(zip(*(x.tolist() for x in drawn), strict=True))
    expected = naive_rel(student, teacher, listed, prune, edge, delta)
    assert float(loss(student, teacher, generator(7))) == pytest.approx(expected, rel=2e-4)


@each("edge", EDGES)
@each("delta", [None, 0.1])
def test_pooled_vertices_are_the_images(edge: str, delta: float | None) -> None:
    loss = build((2, 3), vertices="pooled", num_pairs=9, prune=0.2, edge=edge, huber_delta=delta)
    student, teacher = randn(3, 7, 6, 8) + 5, 2 * randn(3, 7, 6, 8, seed=1) - 3
    listed = list(zip(*(x.tolist() for x in draw_pairs(7, 9, generator(7))), strict=True))
    expected = naive_rel(student, teacher, listed, 0.2, edge, delta, pooled=True)
    assert float(loss(student, teacher, generator(7))) == pytest.approx(expected, rel=2e-4)


@each("vertices", ["tokens", "pooled"])
@each("edge", EDGES)
def test_all_pairs_draw_nothing(edge: str, vertices: str) -> None:
    student, teacher = randn(2, 5, 15, 8), randn(2, 5, 15, 8, seed=1)
    stream = generator(3)
    before = stream.get_state()
    every = build(pairs="all", num_pairs=1, edge=edge, vertices=vertices)(student, teacher, stream)
    assert torch.equal(stream.get_state(), before)
    drawn = build(num_pairs=1000, edge=edge, vertices=vertices)(student, teacher, stream)
    assert not torch.equal(stream.get_state(), before)
    assert float(every) == pytest.approx(float(drawn), rel=1e-5)


class Largest(TorchDispatchMode):
    """Counts the numbers of the largest tensor that an operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


@each("edge", EDGES)
def test_all_pairs_need_no_tensor_of_differences(edge: str) -> None:
    student, teacher = randn(1, 4, 15, 64).requires_grad_(), randn(1, 4, 15, 64, seed=1)
    with Largest() as largest:
        build(pairs="all", edge=edge)(student, teacher, generator()).backward()
    assert largest.numbers <= 4 * 15 * 64 < 4 * (15 * 14 // 2) * 64


def test_differences_by_product_are_the_differences() -> None:
    """Values and gradients; on CUDA the product is used where pairs are few."""
    first, second = draw_pairs(12, 7, generator(0))
    found = []
    for by in (differences, differences_by_product):
        z = randn(2, 3, 12, 5).requires_grad_()
        edges = by(z, first, second)
        (edges * randn(2, 3, 7, 5, seed=2)).sum().backward()
        found.append((edges.detach(), z.grad))
    expected = torch.stack([z.detach()[:, :, i] - z.detach()[:, :, j] for i, j in zip(first, second, strict=True)], 2)
    torch.testing.assert_close(found[0][0], expected)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@each("shift", [0.0, 1.0])
def test_edge_products_by_both_ways(shift: float) -> None:
    a, b = randn(2, 3, 12, 5) + shift, randn(2, 3, 12, 5, seed=1) + shift
    for count in (3, 60):  # few pairs: differences; many: the Gram matrix
        first, second = draw_pairs(12, count, generator(0))
        for (x, y), found in zip(((a, a), (b, b), (a, b)), edge_products(a, b, first, second), strict=True):
            expected = torch.zeros(2, 3, count)
            for k, (i, j) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
                expected[:, :, k] = ((x[:, :, i] - x[:, :, j]) * (y[:, :, i] - y[:, :, j])).sum(-1)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@each("vertices", ["tokens", "pooled"])
@each("edge", ["unit_difference", "difference"])
@each("pairs, grid", [(128, (3, 5)), (4, (5, 7))])
def test_rel_bounds_and_invariances(edge: str, vertices: str, pairs: int, grid: tuple[int, int]) -> None:
    tokens = grid[0] * grid[1]
    loss = build(grid, num_pairs=pairs, edge=edge, vertices=vertices)
    student, teacher = randn(2, 8, tokens, 64), randn(2, 8, tokens, 64, seed=1)
    wide = 0.15 if vertices == "tokens" else 0.3  # eight vertices, not a hundred
    assert float(loss(student, teacher, generator())) == pytest.approx(1, abs=wide)
    assert float(loss(teacher, teacher, generator())) == pytest.approx(0, abs=1e-4)
    assert float(loss(-teacher, teacher, generator())) == pytest.approx(2, abs=1e-4)
    # 1 for equal student tokens
    assert float(loss(0 * student, teacher, generator())) == pytest.approx(1, abs=1e-4)
    plain = float(loss(student, teacher, generator()))
    shift = randn(2, 8 if vertices == "tokens" else 1, 1, 64, seed=2)
    moved = 0.2 * student + 4 * shift
    assert float(loss(moved, teacher, generator())) == pytest.approx(plain, abs=1e-3)
    moved = 7 * teacher + shift
    assert float(loss(student, moved, generator())) == pytest.approx(plain, abs=1e-3)
    turned, _ = torch.linalg.qr(randn(64, 64, seed=3))
    assert float(loss(student @ turned, teacher @ turned, generator())) == pytest.approx(plain, abs=1e-3)


@each("vertices", ["tokens", "pooled"])
def test_cosine_bounds_and_invariances(vertices: str) -> None:
    loss = build(edge="cosine_gram", vertices=vertices)
    student, teacher = randn(2, 24, 15, 64), randn(2, 24, 15, 64, seed=1)
    # unrelated sides of equal spread; centring gives both a mean cosine of −1/(N−1)
    assert 1.2 < float(loss(student, teacher, generator())) < 2.2
    assert float(loss(0 * student, teacher, generator())) == pytest.approx(1, abs=1e-3)
    assert float(loss(teacher, teacher, generator())) == pytest.approx(0, abs=1e-5)
    plain = float(loss(student, teacher, generator()))
    # cosines do not depend on rotation, shift and scale of a side
    turned, _ = torch.linalg.qr(randn(64, 64, seed=3))
    shift = randn(2, 24 if vertices == "tokens" else 1, 1, 64, seed=2)
    assert float(loss(0.2 * student @ turned + shift, teacher, generator())) == pytest.approx(plain, abs=2e-3)
    assert float(loss(student, 7 * teacher @ turned + shift, generator())) == pytest.approx(plain, abs=2e-3)
    assert float(loss(teacher @ turned, teacher, generator())) == pytest.approx(0, abs=1e-5)


def test_cosine_denominator_is_detached() -> None:
    loss = build(edge="cosine_gram", prune=0.0, pairs="all")
    student, teacher = randn(2, 4, 15, 8), randn(2, 4, 15, 8, seed=1).requires_grad_()
    loss(student, teacher, generator()).backward()

    def cosines(z: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize((z - z.mean(2, keepdim=True)).double(), dim=-1)
        return torch.stack([(unit[:, :, i] * unit[:, :, j]).sum(-1) for i in range(15) for j in range(i + 1, 15)])

    again = teacher.detach().clone().requires_grad_()
    c_s, c_t = cosines(student), cosines(again)
    ((c_s - c_t).square().sum((0, 2)) / c_t.detach().square().sum((0, 2))).mean().backward()
    assert teacher.grad is not None and again.grad is not None
    torch.testing.assert_close(teacher.grad, again.grad, rtol=1e-2, atol=1e-5)


@each("vertices", ["tokens", "pooled"])
@each("edge", EDGES)
def test_huber_of_a_large_delta_is_the_squared_form(edge: str, vertices: str) -> None:
    student, teacher = randn(2, 8, 15, 16), randn(2, 8, 15, 16, seed=1) + randn(2, 8, 15, 16)
    plain = float(build(edge=edge, vertices=vertices)(student, teacher, generator()))
    values = [
        float(build(edge=edge, vertices=vertices, huber_delta=delta)(student, teacher, generator()))
        for delta in (0.01, 0.1, 1e6)
    ]
    assert values[2] == pytest.approx(plain, rel=1e-4)
    assert values[0] < values[1] < values[2]
    # far inside the linear branch the loss is proportional to δ
    smaller = build(edge=edge, vertices=vertices, huber_delta=1e-4)(student, teacher, generator())
    small = build(edge=edge, vertices=vertices, huber_delta=2e-4)(student, teacher, generator())
    assert float(small) == pytest.approx(2 * float(smaller), rel=1e-2)


@each("edge", EDGES)
@each("delta", [None, 0.5])
def test_rel_prunes_short_edges_of_the_teacher_only(edge: str, delta: float | None) -> None:
    """A tenth of the teacher's edges is much shorter than the rest: the student is free there."""
    teacher = randn(1, 8, 5, 16)
    teacher[:, :, 1] = teacher[:, :, 0] + 1e-3 * randn(1, 8, 16, seed=1)  # one pair of ten
    student = teacher.clone()
    student[:, :, 1] = teacher[:, :, 0] - (teacher[:, :, 1] - teacher[:, :, 0])
    pruned = build((1, 5), num_pairs=1000, prune=0.1, edge=edge, huber_delta=delta)
    assert float(pruned(student, teacher, generator())) < 1e-3
    if edge == "unit_difference":  # so short an edge hardly changes the other two
        kept = build((1, 5), num_pairs=1000, prune=0.0, edge=edge, huber_delta=delta)
        assert float(kept(student, teacher, generator())) > 0.05
    long = student.clone()
    # long for the student, short for the teacher: only pair (0, 1) is free
    long[:, :, 1] += 3 * randn(1, 8, 16, seed=2)
    assert float(pruned(long, teacher, generator())) > 0.01


CASES = ["random", "constant student", "constant teacher", "equal tokens", "zero", "match", "two images"]


@each("vertices", ["tokens", "pooled"])
@each("edge", EDGES)
@each("delta", [None, 0.1])
@each("case", CASES)
def test_gradients_are_finite(case: str, delta: float | None, edge: str, vertices: str) -> None:
    student, teacher = randn(2, 4, 15, 8), randn(2, 4, 15, 8, seed=1)
    if case in ("constant student", "zero"):
        student = torch.zeros(2, 4, 15, 8)
    if case in ("constant teacher", "zero"):
        teacher = torch.ones(2, 4, 15, 8)
    elif case == "equal tokens":
        student = student[:, :, :1].expand(2, 4, 15, 8).clone()
        teacher = teacher[:, :1].expand(2, 4, 15, 8).clone()
    elif case == "match":
        student = teacher.clone()
    elif case == "two images":
        student, teacher = student[:, :2], teacher[:, :2]
    student.requires_grad_()
    teacher.requires_grad_()
    value = build(edge=edge, vertices=vertices, huber_delta=delta)(student, teacher, generator())
    value.backward()
    assert value.ndim == 0 and torch.isfinite(value)
    for tensor in (student, teacher):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all()


@each("vertices", ["tokens", "pooled"])
def test_different_token_counts_are_noticed(vertices: str) -> None:
    for student, teacher in ((16, 15), (15, 16), (16, 16)):
        with pytest.raises(AssertionError):
            build(vertices=vertices)(randn(2, 4, student, 8), randn(2, 4, teacher, 8, seed=1), generator())


@each("vertices", ["tokens", "pooled"])
def test_compare_reads_projected_tokens_and_targets_only(vertices: str) -> None:
    config = RelationLossConfig(vertices=vertices)
    assert config.reads == {TOKENS, PROJECTION}
    purposes = []

    def stream(purpose: str) -> torch.Generator:
        purposes.append(purpose)
        return generator(5)

    loss = config.build(sizes())
    comparison: Any = SimpleNamespace(projected=randn(2, 4, 15, 8), target=randn(2, 4, 15, 8, seed=1), generator=stream)
    expected = loss(comparison.projected, comparison.target, generator(5))
    assert float(loss.compare(comparison)) == float(expected) > 0.5
    assert purposes == [PAIRS_STREAM]


def test_logits_are_vrm() -> None:
    config = RelationLossConfig(vertices="logits", prune=0.25, huber_delta=0.5, inter_class_weight=3.0)
    assert config.reads == {TWO_VIEWS}
    logits = [2 * randn(6, 5, seed=seed) for seed in range(4)]
    for given, expected in (
        (config, VRMLoss(0.25, 0.5, 1.0, 3.0)),
        (RelationLossConfig(vertices="logits"), VRMLoss(0.1, None, 1.0, 1.0)),
    ):
        assert float(given.build(sizes())(*logits)) == float(expected(*logits)) > 0, given
