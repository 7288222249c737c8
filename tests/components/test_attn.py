import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from each import each
from torch import Tensor, nn

from basd.components.comparison import MAPS, image_parts
from basd.components.head_aligners import HEAD_ALIGNERS
from basd.components.losses.attn import UNIFORM, AttentionLoss, AttentionLossConfig, flat_information, layer_information
from basd.components.sizes import Sizes
from basd.models.resampling import resample_attention

NORMALIZE = ("teacher_information", "log_n", "none", "sum")


def sizes(
    heads: tuple[int, int] = (2, 3),
    grids: tuple[tuple[int, int], tuple[int, int]] = ((1, 5), (1, 5)),
    points: int = 2,
    depth: int = 3,
) -> Sizes:
    """heads and grids: (student's, teacher's)."""
    return Sizes(
        points=tuple(range(points)),
        image_size=24,
        student_depth=4,
        student_width=6,
        student_heads=heads[0],
        student_grid=grids[0],
        teacher_depth=depth,
        teacher_width=12,
        teacher_heads=heads[1],
        teacher_grid=grids[1],
        total_steps=10,
    )


def build(normalize: str = "teacher_information", s: Sizes | None = None) -> AttentionLoss:
    return AttentionLossConfig(normalize=normalize).build(s or sizes())


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(*shape: int, seed: int, gain: float = 1.0) -> Tensor:
    return (gain * randn(*shape, seed=seed)).softmax(-1)


# -- the mathematics --------------------------------------------------------------------------------------------------


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
        by = {
            "teacher_information": information,
            "log_n": rows * math.log(keys),
            "none": rows,
            "sum": t.shape[1],
        }[normalize]
        values.append(divergence / by)
    return float(np.mean(values))


@each("normalize", NORMALIZE)
@each("shape", [(2, 2, 3, 6, 6), (1, 4, 1, 3, 5), (3, 1, 2, 5, 2), (1, 3, 4, 1, 9)])
def test_attn_equals_loops(normalize: str, shape: tuple[int, ...]) -> None:
    student, teacher = attention(*shape, seed=0), attention(*shape, seed=1, gain=3)
    teacher[0, 0, 0, 0] = torch.eye(shape[-1])[1]  # a row with zeros
    value = float(build(normalize)(student.log(), teacher))
    assert value == pytest.approx(naive_attn(student, teacher, normalize), rel=1e-4)


@each("gain", [0.05, 1.0, 20.0])
@each("tokens", [3, 40])
def test_bounds_of_the_default(gain: float, tokens: int) -> None:
    """1 for a uniform student, 0 for a match, above 1 for a student that is surely wrong."""
    loss = build()
    teacher = attention(2, 2, 3, tokens, tokens, seed=1, gain=gain)
    uniform = torch.full_like(teacher, 1 / tokens).log()
    assert float(loss(uniform, teacher)) == pytest.approx(1, abs=5e-3)
    assert float(loss(teacher.clamp_min(1e-30).log(), teacher)) == pytest.approx(0, abs=5e-3)
    assert float(loss(attention(2, 2, 3, tokens, tokens, seed=2, gain=30).clamp_min(1e-30).log(), teacher)) > 1


def test_bounds_of_the_variants_and_only_sum_grows_with_the_heads() -> None:
    teacher = torch.eye(6).expand(2, 5, 3, 6, 6)
    uniform = torch.full_like(teacher, 1 / 6).log()
    match = teacher.clamp_min(1e-30).log()
    for normalize, expected in {"log_n": 1, "none": math.log(6), "sum": 3 * 6 * math.log(6)}.items():
        assert float(build(normalize)(uniform, teacher)) == pytest.approx(expected, rel=1e-5), normalize
        assert float(build(normalize)(match, teacher)) == pytest.approx(0, abs=1e-5), normalize
    student, teacher = attention(1, 2, 3, 6, 6, seed=0).log(), attention(1, 2, 3, 6, 6, seed=1)
    for normalize in NORMALIZE:
        once = float(build(normalize)(student, teacher))
        heads = float(build(normalize)(student.repeat(1, 1, 2, 1, 1), teacher.repeat(1, 1, 2, 1, 1)))
        images = float(build(normalize)(student.repeat(1, 2, 1, 1, 1), teacher.repeat(1, 2, 1, 1, 1)))
        assert heads == pytest.approx((2 if normalize == "sum" else 1) * once, rel=1e-5), normalize
        assert images == pytest.approx(once, rel=1e-5), normalize


@each("gain", [0.01, 0.1, 1.0])
def test_nearly_uniform_maps_keep_their_digits(gain: float) -> None:
    """One distribution over 40000 entries with gain²/2 nats of information, down to 5e-5."""
    entries = gain * randn(1, 2, 2, 1, 40000)
    other = 0.5 * entries + 0.5 * gain * randn(1, 2, 2, 1, 40000, seed=1)
    teacher, student_log = entries.softmax(-1), other.log_softmax(-1)
    exact_t, exact_s = entries.double().log_softmax(-1), other.double().log_softmax(-1)
    information = (exact_t.exp() * (exact_t + math.log(40000))).sum((1, 2, 3, 4))
    expected = (exact_t.exp() * (exact_t - exact_s)).sum((1, 2, 3, 4)) / information
    assert flat_information(teacher).tolist() == pytest.approx(information.tolist(), rel=1e-3)
    # softmaxes over many entries may sum to 1 with an error as large as the information
    assert flat_information(teacher * (1 + 2e-5)).tolist() == pytest.approx(information.tolist(), rel=1e-3)
    assert float(build()(student_log, teacher)) == pytest.approx(float(expected), rel=5e-3)
    assert float(build()(entries.log_softmax(-1), teacher)) == pytest.approx(0, abs=1e-3)
    assert float(build()(torch.zeros_like(entries).log_softmax(-1), teacher)) == pytest.approx(1, abs=1e-2)


@each("queries", [1, 6])
def test_gradient_is_that_of_the_divergence(queries: int) -> None:
    scores, teacher = randn(2, 2, 3, queries, 6), attention(2, 2, 3, queries, 6, seed=1)
    for normalize in NORMALIZE:
        given = scores.clone().requires_grad_()
        build(normalize)(given.log_softmax(-1), teacher).backward()
        plain = scores.double().requires_grad_()
        t = teacher.double()
        divergence = (t * (t.log() - plain.log_softmax(-1))).sum((1, 2, 3, 4))
        rows = 2 * 3 * queries
        by = {
            "teacher_information": (t * (6 * t).log()).sum((1, 2, 3, 4)),
            "log_n": rows * math.log(6),
            "none": rows,
            "sum": 2,
        }[normalize]
        (divergence / by).mean().backward()
        assert given.grad is not None and plain.grad is not None
        torch.testing.assert_close(given.grad.double(), plain.grad, rtol=1e-4, atol=1e-7)


def test_informative_points_only_are_counted() -> None:
    loss = build()
    teacher = attention(3, 2, 3, 6, 6, seed=1, gain=2)
    teacher[1] = 1 / 6
    scores = randn(3, 2, 3, 6, 6).requires_grad_()
    student = scores.log_softmax(-1)
    value = loss(student, teacher, torch.tensor([True, False, True]))
    value.backward()
    kept = torch.tensor([0, 2])
    assert float(value.detach()) == pytest.approx(float(loss(student.detach()[kept], teacher[kept])))
    assert scores.grad is not None and torch.isfinite(scores.grad).all() and not scores.grad[1].any()


def test_layer_information_is_half_the_distance_from_a_resampled_uniform_map() -> None:
    uniform = resample_attention(torch.full((10, 10), 1 / 10), (2, 2), (3, 3))
    nearly = uniform * (1 + 0.05 * randn(2, 3, 5, 5, seed=3))
    nearly = nearly / nearly.sum(-1, keepdim=True)
    layers = torch.stack([uniform.expand(2, 3, 5, 5), attention(2, 3, 5, 5, seed=1, gain=2), nearly])
    found = layer_information(layers, uniform)
    assert float(found[0]) == pytest.approx(0, abs=1e-7)
    assert float(found[0]) < UNIFORM < float(found[1])
    distance, divergence = [0.0] * 3, [0.0] * 3
    for layer in range(3):
        for row, reference in zip(layers[layer].double().flatten(0, 2), uniform.double().repeat(6, 1), strict=True):
            for p, q in zip(row.tolist(), reference.tolist(), strict=True):
                distance[layer] += (p - q) ** 2 / q / 30
                divergence[layer] += p * math.log(p / q) / 30
    assert found[1:].tolist() == pytest.approx([d / 2 for d in distance[1:]], rel=1e-4)
    assert float(found[2]) == pytest.approx(divergence[2], rel=0.1)
    assert divergence[1] <= 2 * float(found[1])


def test_denominator_is_detached() -> None:
    loss = build()
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


# -- one step ---------------------------------------------------------------------------------------------------------


class Step:
    """The part of a comparison that the loss may read: the teacher's maps of every layer, their mixture, the student's scores."""

    def __init__(
        self, aligner: nn.Module, maps: Tensor, alpha: Tensor | None, scores: Tensor, memo: dict | None = None
    ):
        self.bridges = SimpleNamespace(head_aligner=aligner)
        self.layer_maps = maps
        self.scores = scores
        self.notes: dict[str, Any] = {}
        self._alpha = alpha
        self._memo: dict[Any, Any] = {} if memo is None else memo
        self.teacher = SimpleNamespace(shared=self._shared)

    def _shared(self, key: Any, compute: Any) -> Any:
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    @property
    def alpha(self) -> Tensor:
        assert self._alpha is not None, "there is no mixture"
        return self._alpha

    @property
    def aligned_maps(self) -> tuple[Tensor, Tensor]:
        aligner: Any = self.bridges.head_aligner
        return aligner(self.scores, self.target_maps)

    @property
    def target_maps(self) -> Tensor:
        if self.bridges.head_aligner.all_layers:
            return self.layer_maps
        return torch.einsum("ml,lbhqk->mbhqk", self.alpha, self.layer_maps)

    def note(self, values: dict) -> None:
        self.notes.update(values)


def make(name: str, s: Sizes) -> nn.Module:
    torch.manual_seed(0)
    return HEAD_ALIGNERS[name]().build(s)


def compare(loss: AttentionLoss, step: Step) -> Tensor | None:
    return loss.compare(step)  # type: ignore[arg-type]


@each("name", ["conv", "convex", "mean"])
def test_points_without_information_are_skipped(name: str) -> None:
    assert AttentionLossConfig().reads == {MAPS}
    s = sizes()
    loss, aligner = build(s=s), make(name, s)
    maps = attention(3, 2, 3, 6, 6, seed=1, gain=2)
    maps[1] = 1 / 6
    scores = randn(2, 2, 2, 6, 6)
    step = Step(aligner, maps, torch.tensor([[0.5, 0.2, 0.3], [0.0, 1.0, 0.0]]), scores)
    value = compare(loss, step)
    assert value is not None and step.notes == {"loss/attn_skipped_points": 1.0}
    student, teacher = step.aligned_maps
    assert float(value.detach()) == pytest.approx(float(loss(student[:1], teacher[:1]).detach()), rel=1e-5)
    step = Step(aligner, maps, torch.eye(3)[[1, 1]], scores)
    assert compare(loss, step) is None and step.notes == {"loss/attn_skipped_points": 2.0}


def test_a_point_whose_mixture_is_uniform_is_skipped() -> None:
    """The mean of two sharp layers is uniform: that point is skipped, the other one counts."""
    s = sizes()
    even = torch.tensor([1.0, 0.0] * 3).expand(6, 6) / 3
    maps = torch.stack([even, even.roll(1, 1), attention(6, 6, seed=1, gain=2)])[:, None, None].expand(3, 2, 3, 6, 6)
    scores, aligner = randn(2, 2, 2, 6, 6), make("conv", s)
    step = Step(aligner, maps, torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]), scores)
    value = compare(build(s=s), step)
    assert step.notes == {"loss/attn_skipped_points": 1.0}
    student, teacher = step.aligned_maps
    assert value is not None
    assert float(value.detach()) == pytest.approx(float(build(s=s)(student[1:], teacher[1:]).detach()), rel=1e-5)
    step = Step(aligner, maps, torch.tensor([[0.5, 0.5, 0.0]] * 2), scores)
    assert compare(build(s=s), step) is None and step.notes == {"loss/attn_skipped_points": 2.0}
    # uniform maps that were resampled between unequal grids are not quite uniform
    s = sizes(grids=((2, 2), (3, 3)))
    maps = resample_attention(torch.full((3, 2, 3, 10, 10), 1 / 10), (2, 2), (3, 3))
    for name in ("conv", "mean"):
        step = Step(make(name, s), maps, torch.full((2, 3), 1 / 3), randn(2, 2, 2, 5, 5))
        assert compare(build(s=s), step) is None, name


@each("gain", [0.02, 0.05])
def test_float32_resolves_what_is_not_skipped(gain: float) -> None:
    """At DeiT's size, a map just above the threshold: uniform student 1, match 0."""
    entries = gain * randn(1, 2, 6, 197, 197)
    teacher = entries.softmax(-1)
    nats = float((teacher.double() * (teacher.double() * 197).log()).sum() / (2 * 6 * 197))
    assert UNIFORM < nats < 20 * UNIFORM
    assert float(build()(torch.zeros_like(entries).log_softmax(-1), teacher)) == pytest.approx(1, abs=0.02)
    assert float(build()(entries.log_softmax(-1), teacher)) == pytest.approx(0, abs=0.02)


@each("name", ["conv", "convex", "mean"])
@each("normalize, queries, keys, parts", [*((name, 256, 64, 2) for name in NORMALIZE), (NORMALIZE[0], 181, 181, 3)])
def test_some_images_at_a_time_give_the_loss_of_all(
    name: str, normalize: str, queries: int, keys: int, parts: int
) -> None:
    """Maps that are too large to be worked on at once: value and gradients are those of the plain formula."""
    s = sizes(heads=(2, 8))
    loss, aligner = build(normalize, s), make(name, s)
    maps, informative = attention(2, 3, 8, queries, keys, seed=1), torch.tensor([True, False])
    assert len(image_parts(maps)) == parts
    found = []
    for plain in (True, False):
        scores = randn(2, 3, 2, queries, keys).requires_grad_()
        aligner.zero_grad()
        value = (
            loss(*aligner(scores, maps), informative) if plain else loss.of_maps(aligner, scores, maps, informative)[0]
        )
        (3 * value).backward()
        found.append([value.detach(), scores.grad, *(p.grad for p in aligner.parameters())])
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_mean_skips_heads_that_cancel() -> None:
    """Every head is sharp, their mean is uniform: `mean` has no information to compare with, `conv` has."""
    s = sizes(heads=(2, 6))
    maps = torch.stack([torch.eye(6).roll(h, 1) for h in range(6)]).expand(3, 2, 6, 6, 6)
    alpha, scores, memo = torch.full((2, 3), 1 / 3), randn(2, 2, 2, 6, 6), {}
    assert compare(build(s=s), Step(make("mean", s), maps, alpha, scores, memo)) is None
    # arms of a cohort share the teacher's output, but not the information of averaged heads
    value = compare(build(s=s), Step(make("conv", s), maps, alpha, scores, memo))
    assert value is not None and torch.isfinite(value)


@each("seed", range(20))
def test_information_of_the_layers_bounds_that_of_the_mixture(seed: int) -> None:
    """So a point can be skipped before its mixture is computed."""
    uniform = resample_attention(torch.full((10, 10), 1 / 10), (2, 2), (3, 3))
    maps = attention(3, 2, 3, 5, 5, seed=seed, gain=0.3 * seed)
    alpha = (3 * randn(2, 3, seed=seed)).softmax(-1)
    bound = alpha @ layer_information(maps, uniform)
    mixture = torch.einsum("ml,lbhqk->mbhqk", alpha, maps)
    assert (layer_information(mixture, uniform) <= bound + 1e-6).all()
    divergence = (mixture * (mixture / uniform).log()).flatten(1).sum(1) / (mixture[0].numel() / 5)
    assert (divergence <= 2 * bound + 1e-6).all()


@each("normalize", NORMALIZE)
def test_a2d_compares_every_layer_without_a_mixture(normalize: str) -> None:
    s = sizes()
    loss, aligner = build(normalize, s), make("a2d", s)
    maps, scores = attention(3, 2, 3, 6, 6, seed=1, gain=3), 3 * randn(2, 2, 2, 6, 6)
    maps[1] = 1 / 6  # a layer without information is compared like any other
    step = Step(aligner, maps, None, scores)
    value = compare(loss, step)
    assert value is not None and not step.notes
    student, teacher = aligner(scores, maps)
    expected = naive_attn(student.detach().double().exp(), teacher.double(), normalize)
    assert float(value.detach()) == pytest.approx(expected, rel=2e-3)
    match = loss(teacher.log(), teacher)
    assert float(match) == pytest.approx(0, abs=1e-4)
    if normalize == "teacher_information":
        uniform = torch.full_like(teacher, 1 / 36).log()
        assert float(loss(uniform, teacher)) == pytest.approx(1, abs=5e-3)


def test_a2d_of_uniform_layers() -> None:
    """The information of a uniform teacher is rounding error: no loss is divided by it. The other variants have a loss."""
    s = sizes()
    maps, scores = torch.full((3, 2, 3, 6, 6), 1 / 6), 3 * randn(2, 2, 2, 6, 6)
    for normalize in NORMALIZE:
        step = Step(make("a2d", s), maps, None, scores)
        value = compare(build(normalize, s), step)
        if normalize == "teacher_information":
            assert value is None and step.notes == {"loss/attn_skipped_points": len(s.points)}
        else:
            assert value is not None and 0 < float(value.detach()) < 1, normalize


@each("name", HEAD_ALIGNERS)
@each("normalize", NORMALIZE)
@each("case", ["zeros", "huge", "sharp teacher", "one image"])
def test_gradients_are_finite(name: str, normalize: str, case: str) -> None:
    s = sizes(heads=(3, 3))
    aligner = make(name, s)
    maps, scores = attention(3, 2, 3, 6, 6, seed=1), randn(2, 2, 3, 6, 6)
    if case == "zeros":
        scores = torch.zeros_like(scores)
    elif case == "huge":
        scores = 1e5 * scores
    elif case == "sharp teacher":
        maps = torch.eye(6).expand(3, 2, 3, 6, 6)
    elif case == "one image":
        maps, scores = maps[:, :1], scores[:, :1]
    scores.requires_grad_()
    value = compare(build(normalize, s), Step(aligner, maps, torch.full((2, 3), 1 / 3), scores))
    assert value is not None and value.ndim == 0 and torch.isfinite(value)
    value.backward()
    for tensor in (scores, *aligner.parameters()):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all()
