import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from each import each
from torch import Tensor

from basd.components.head_aligners import HEAD_ALIGNERS
from basd.components.head_aligners.base import HeadAligner
from basd.components.sizes import Sizes

HEADS = [(3, 6), (2, 5), (4, 1), (3, 3), (1, 2)]


def sizes(student_heads: int, teacher_heads: int, points: int = 3, teacher_depth: int = 2) -> Sizes:
    return Sizes(
        points=tuple(range(points)),
        image_size=24,
        student_depth=4,
        student_width=12,
        student_heads=student_heads,
        student_grid=(2, 3),
        teacher_depth=teacher_depth,
        teacher_width=24,
        teacher_heads=teacher_heads,
        teacher_grid=(4, 3),
        total_steps=10,
    )


def build(name: str, s: Sizes, **options: Any) -> HeadAligner:
    torch.manual_seed(0)
    aligner = HEAD_ALIGNERS[name](**options).build(s)
    assert isinstance(aligner, HeadAligner)
    return aligner


def draw(
    s: Sizes, batch: int = 2, gain: float = 2.0, seed: int = 1, layers: int | None = None
) -> tuple[Tensor, Tensor]:
    """Scores of the student and maps of the teacher, on a map that is not square."""
    g = torch.Generator().manual_seed(seed)
    scores = gain * torch.randn(len(s.points), batch, s.student_heads, 5, 7, generator=g)
    maps = torch.randn(layers or len(s.points), batch, s.teacher_heads, 5, 7, generator=g).softmax(-1)
    return scores, maps


def weight_of(aligner: HeadAligner, *shape: int) -> Tensor:
    """The one parameter of an aligner, (points, heads out, heads in)."""
    (parameter,) = aligner.parameters()
    assert parameter.numel() == math.prod(shape)
    return parameter.detach().reshape(shape).double()


def stacked(x: Tensor) -> Tensor:
    """(M, B, H, Q, K) → (B, M·H, Q, K), the heads of point 0 first."""
    return torch.cat(list(x), dim=1)


@each("student_heads, teacher_heads", HEADS)
@each("name, stack", [("conv", "point"), ("conv", "all"), ("convex", "all")])
def test_heads_are_mixed_by_a_convolution(name: str, stack: str, student_heads: int, teacher_heads: int) -> None:
    """`conv` mixes scores before the softmax, `convex` probabilities; with stack=all the heads of all points."""
    s = sizes(student_heads, teacher_heads)
    aligner = build(name, s, stack=stack)
    weight = weight_of(aligner, 3, teacher_heads, student_heads * (3 if stack == "all" else 1))  # no bias
    scores, maps = draw(s)
    got, target = aligner(scores, maps)
    for m in range(3):
        heads = stacked(scores.double()) if stack == "all" else scores[m].double()
        if name == "conv":
            expected = F.conv2d(heads, weight[m, :, :, None, None]).log_softmax(-1)
        else:
            expected = F.conv2d(heads.softmax(-1), weight[m].softmax(dim=1)[:, :, None, None]).log()
        torch.testing.assert_close(got[m].double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(target, maps)


@each("student_heads, teacher_heads", HEADS)
def test_convex_combines_probabilities(student_heads: int, teacher_heads: int) -> None:
    s = sizes(student_heads, teacher_heads)
    aligner = build("convex", s)
    weight = weight_of(aligner, 3, teacher_heads, student_heads)
    scores, maps = draw(s)
    got, target = aligner(scores, maps)
    for m in range(3):
        for h in range(teacher_heads):
            powers = [math.exp(float(w)) for w in weight[m, h]]
            shares = [p / sum(powers) for p in powers]
            heads = scores[m].double().softmax(-1)
            expected = sum(share * heads[:, i] for i, share in enumerate(shares))
            torch.testing.assert_close(got[m, :, h].double().exp(), expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(target, maps)


@each("name, stack", [("conv", "point"), ("conv", "all"), ("convex", "point"), ("convex", "all")])
@each("student_heads, teacher_heads", [(3, 6), (2, 5), (4, 1), (3, 3), (2, 4)])
def test_start_is_the_nearest_head_of_the_same_point(
    name: str, stack: str, student_heads: int, teacher_heads: int
) -> None:
    s = sizes(student_heads, teacher_heads)
    aligner = build(name, s, stack=stack)
    inputs = student_heads * (3 if stack == "all" else 1)
    weight = weight_of(aligner, 3, teacher_heads, inputs)
    if name == "convex":
        weight = weight.softmax(dim=-1)
    for m in range(3):
        for h in range(teacher_heads):
            nearest = h * student_heads // teacher_heads + (m * student_heads if stack == "all" else 0)
            own = float(weight[m, h, nearest])
            others = [float(w) for i, w in enumerate(weight[m, h]) if i != nearest]
            assert all(w < own for w in others)
            if name == "conv":
                assert abs(own - 1) < 0.1 and all(abs(w) < 0.1 for w in others)
            else:
                # the softmax still has a gradient
                assert own == pytest.approx(0.75, abs=0.03)


@each("name", ["conv", "convex"])
def test_stack_selects_the_points_that_are_read(name: str) -> None:
    s = sizes(2, 3)
    for stack in ("point", "all"):
        aligner = build(name, s, stack=stack)
        scores, maps = draw(s)
        scores.requires_grad_()
        got, _ = aligner(scores, maps)
        (grad,) = torch.autograd.grad((got[1] * torch.randn_like(got[1])).sum(), scores)
        assert grad[1].any() and bool(grad[0].any()) is bool(grad[2].any()) is (stack == "all"), stack
    # with one point both settings are the same computation
    s = sizes(2, 3, points=1)
    one, other = (build(name, s, stack=stack) for stack in ("point", "all"))
    scores, maps = draw(s)
    assert torch.equal(one(scores, maps)[0], other(scores, maps)[0])


@each("name", ["conv", "convex"])
@each("stack", ["point", "all"])
def test_heads_start_different_and_learn(name: str, stack: str) -> None:
    s = sizes(3, 6)
    aligner = build(name, s, stack=stack)
    scores, maps = draw(s)
    scores.requires_grad_()
    out, _ = aligner(scores, maps)
    heads = out.detach().transpose(1, 2).flatten(2)
    for m in range(3):
        assert len(heads[m].unique(dim=0)) == 6  # no two teacher heads start alike
    (out * torch.randn_like(out)).sum().backward()
    assert scores.grad is not None and scores.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in aligner.parameters())


def test_convex_finds_a_mixture_of_heads() -> None:
    """Where the teacher's heads are mixtures of the student's, training finds the shares."""
    s = sizes(3, 4, points=1)
    aligner = build("convex", s)
    scores, _ = draw(s, batch=4, gain=3)
    shares = torch.tensor([[0.1, 0.1, 0.8], [0.5, 0.5, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.0, 1.0, 0.0]])
    maps = torch.einsum("ts,mbsqk->mbtqk", shares, scores.softmax(-1))
    optimizer = torch.optim.Adam(aligner.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        log, target = aligner(scores, maps)
        F.kl_div(log, target, reduction="sum").backward()
        optimizer.step()
    found = weight_of(aligner, 4, 3).softmax(-1).float()
    torch.testing.assert_close(found, shares, rtol=0, atol=0.03)


@each("student_heads, teacher_heads", HEADS)
def test_mean_averages_both_sides(student_heads: int, teacher_heads: int) -> None:
    s = sizes(student_heads, teacher_heads)
    aligner = build("mean", s)
    assert not list(aligner.parameters()) and aligner.averages_heads
    scores, maps = draw(s)
    got, target = aligner(scores, maps)
    student = sum(scores[:, :, h].double().softmax(-1) for h in range(student_heads)) / student_heads
    teacher = sum(maps[:, :, h].double() for h in range(teacher_heads)) / teacher_heads
    torch.testing.assert_close(got[:, :, 0].double(), student.log(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(target[:, :, 0].double(), teacher, rtol=1e-4, atol=1e-7)


def test_none_is_the_identity() -> None:
    s = sizes(3, 3)
    aligner = build("none", s)
    scores, maps = draw(s)
    got, target = aligner(scores, maps)
    assert torch.equal(got, scores.log_softmax(-1)) and torch.equal(target, maps)
    assert not list(aligner.parameters())


# -- a2d --------------------------------------------------------------------------------------------------------------


@each("student_heads, teacher_heads", HEADS)
@each("points, depth", [(3, 2), (1, 4), (2, 1)])
def test_a2d_equals_loops(student_heads: int, teacher_heads: int, points: int, depth: int) -> None:
    s = sizes(student_heads, teacher_heads, points, depth)
    aligner = build("a2d", s)
    weight = weight_of(aligner, depth * teacher_heads, points * student_heads)
    bound = 1 / math.sqrt(points * student_heads)
    assert weight.abs().max() <= bound and (weight.numel() < 10 or weight.abs().max() > 0.7 * bound)
    scores, maps = draw(s, layers=depth)
    got, target = aligner(scores, maps)
    assert got.shape == target.shape == (1, 2, depth * teacher_heads, 1, 35)
    heads = [scores[m, :, h].double().softmax(-1) for m in range(points) for h in range(student_heads)]
    for layer in range(depth):
        for h in range(teacher_heads):
            out = layer * teacher_heads + h
            for b in range(2):
                mixed = sum(float(w) * head[b] for w, head in zip(weight[out], heads, strict=True))
                assert isinstance(mixed, Tensor)
                for side, entries in ((got.exp(), mixed), (target, maps[layer, b, h].double())):
                    powers = [math.exp(e) for e in entries.flatten().tolist()]
                    expected = [p / sum(powers) for p in powers]
                    assert side[0, b, out, 0].tolist() == pytest.approx(expected, rel=1e-4)


def test_a2d_reads_every_layer_and_decays() -> None:
    assert HEAD_ALIGNERS["a2d"].all_layers and not HEAD_ALIGNERS["conv"].all_layers
    s = sizes(2, 3)
    for name, config in HEAD_ALIGNERS.items():
        aligner = build(name, s)
        assert aligner.all_layers is config.all_layers
        assert aligner.decay == (0.9 if name == "a2d" else 1.0)
    assert build("a2d", s, decay=0.5).decay == 0.5


@each("queries, keys", [(10, 10), (26, 26), (60, 30), (197, 197)])
def test_the_published_a2d_target_is_nearly_uniform(queries: int, keys: int) -> None:
    """For any teacher the flattened target is within 1/K nats of uniform, where rows can be log K away."""
    s = sizes(2, 3, points=1, teacher_depth=1)
    aligner = build("a2d", s)
    scores = torch.zeros(1, 1, 2, queries, keys)
    g = torch.Generator().manual_seed(0)
    informations = {}
    for name, gain in (("diffuse", 1.0), ("sharp", 8.0), ("one key per query", 1e6)):
        maps = (gain * torch.randn(1, 1, 3, queries, keys, generator=g)).softmax(-1)
        _, target = aligner(scores, maps)
        whole = target.double() / target.double().sum(-1, keepdim=True)
        rows = maps.double()
        by_rows = float((torch.special.xlogy(rows, rows).sum(-1) + math.log(keys)).mean())
        informations[name] = float((whole * (whole * queries * keys).log()).sum(-1).mean())
        assert informations[name] < 1.05 / keys
        assert informations[name] < by_rows * 1.2 / keys
    assert informations["one key per query"] == max(informations.values())
    # in closed form: Q entries of weight e among Q·(K−1) of weight 1
    mass = keys - 1 + math.e
    exact = math.e / mass * math.log(math.e * keys / mass) + (keys - 1) / mass * math.log(keys / mass)
    assert informations["one key per query"] == pytest.approx(exact, rel=1e-3)
    assert exact < 0.1 * math.log(keys)


# -- all --------------------------------------------------------------------------------------------------------------


@each("name", HEAD_ALIGNERS)
@each("gain", [0.0, 1.0, 1e3, 1e6])
def test_both_sides_are_distributions_with_finite_gradients(name: str, gain: float) -> None:
    heads = 3
    s = sizes(heads, heads)
    aligner = build(name, s)
    scores, maps = draw(s, gain=gain, layers=s.teacher_depth if aligner.all_layers else None)
    scores.requires_grad_()
    got, target = aligner(scores, maps)
    assert got.shape == target.shape
    for side in (got.exp(), target):
        torch.testing.assert_close(side.sum(-1), torch.ones(side.shape[:-1]))
    # the teacher is sure of a key to which the student gives probability 0
    (torch.eye(got.shape[-1])[0] * got).sum().backward()
    for tensor in (scores, *aligner.parameters()):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all()
