"""Selectors without parameters, and what holds for every selector."""

import dataclasses
import io
import itertools
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from each import each
from selector_fakes import LAYERS, WIDTH, randn, sizes, small_teacher, student_tokens, teacher_with
from torch import Tensor, nn

from basd.components.selectors import SELECTORS
from basd.components.selectors.adaptive_spectral import normalized_entropy
from basd.components.selectors.fixed import AllToOneConfig
from basd.components.sizes import Sizes
from basd.errors import UserError
from basd.models.teacher import TeacherOutput

LEARNED = ["adaptive_spectral", "static", "alp", "spectral_similarity"]
FIXED = ["uniform", "forward", "reverse", "random", "all_to_one", "last"]
# (points, student depth, teacher depth): fewer, as many and more points than teacher layers; depths that do not divide
DEPTHS = [
    ((1, 3), 4, 5),
    ((0, 1, 2, 3, 4, 5), 6, 6),
    ((2, 5, 8, 11), 12, 12),
    ((0, 2, 4), 5, 7),
    ((0, 3, 4, 6), 7, 3),
    ((1, 4), 5, 12),
    ((2,), 3, 1),
]


@pytest.fixture(scope="module")
def teacher() -> TeacherOutput:
    return small_teacher()


def build(kind: str, s: Sizes, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return SELECTORS[kind](**options).build(s)


def perturb(module: nn.Module, amount: float = 0.3) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(amount * torch.randn_like(parameter))
    return module


def layers_of(alpha: Tensor) -> list[int]:
    """The layer of each point of a one-hot α."""
    assert set(alpha.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(alpha.sum(dim=1), torch.ones(alpha.shape[0]))
    return alpha.argmax(dim=1).tolist()


def selected(kind: str, depths: tuple[tuple[int, ...], int, int], seed: int = 0, **options: Any) -> list[int]:
    s = sizes(*depths)
    tokens = randn(s.teacher_depth, 2, s.teacher_tokens, WIDTH)
    selector = build(kind, s, seed, **options)
    return layers_of(selector(student_tokens(s, batch=2), teacher_with(tokens, s.teacher_grid)))


# -- every selector ---------------------------------------------------------------------------------------------------


def test_registry_and_entropy_settings() -> None:
    assert set(SELECTORS) == {*LEARNED, *FIXED}
    for kind, config in SELECTORS.items():
        assert config().name == kind
        assert config.learned == (kind in LEARNED), kind
        values = dataclasses.asdict(config())
        # a class attribute, not a setting
        assert "learned" not in values
        if kind in LEARNED:
            assert (values["entropy"], values["entropy_weight"]) == ("sparsify", 0.01), kind
            assert "temperature" in values, kind
        else:
            assert not {"entropy", "entropy_weight", "temperature"} & set(values), kind


@each("depths", DEPTHS)
def test_alpha_is_a_distribution_over_layers(depths: tuple[tuple[int, ...], int, int]) -> None:
    s = sizes(*depths)
    tokens = randn(s.teacher_depth, 3, s.teacher_tokens, WIDTH, seed=1)
    seen = teacher_with(tokens, s.teacher_grid)
    for kind, width in itertools.product(SELECTORS, (6, WIDTH)):
        s = sizes(*depths, student_width=width)
        alpha = perturb(build(kind, s))(student_tokens(s), seen)
        assert alpha.shape == (len(s.points), s.teacher_depth) and alpha.dtype == torch.float32, (kind, width)
        assert (alpha >= 0).all(), (kind, width)
        assert alpha.sum(dim=1).tolist() == pytest.approx([1] * len(s.points)), (kind, width)


def parameters_of(kind: str, s: Sizes) -> set[str]:
    return {
        "adaptive_spectral": {
            "bias",
            "query.weight",
            "key.weight",
            "student_norm.weight",
            "student_norm.bias",
            "teacher_norm.weight",
        },
        "static": {"bias"},
        "alp": {"projection.weight"} if s.student_width != s.teacher_width else set(),
        "spectral_similarity": {"log_temperature"},
    }.get(kind, set())


@each("kind", SELECTORS)
@each("width", [6, WIDTH])
def test_gradients_reach_the_learned_parameters_and_nothing_else(kind: str, width: int, teacher: TeacherOutput) -> None:
    s = sizes(student_width=width)
    selector = perturb(build(kind, s))
    parameters = dict(selector.named_parameters())
    assert set(parameters) == parameters_of(kind, s)
    student = student_tokens(s).requires_grad_()
    alpha = selector(student, teacher)
    assert alpha.requires_grad == bool(parameters)
    if parameters:
        (alpha * randn(2, LAYERS)).sum().backward()
    assert student.grad is None
    for name, parameter in parameters.items():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert float(parameter.grad.abs().max()) > 0, name


@each("kind", SELECTORS)
def test_a_checkpoint_gives_the_same_alpha(kind: str, teacher: TeacherOutput) -> None:
    s = sizes()
    student = student_tokens(s)
    trained = perturb(build(kind, s, seed=1))
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    restored = build(kind, s, seed=2)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(restored(student, teacher), trained(student, teacher))


@each("kind", LEARNED)
@each("temperature", [1e-3, 1.0, 1e3])
@each("case", ["random", "zero student", "zero teacher", "equal layers"])
def test_gradients_are_finite(kind: str, temperature: float, case: str) -> None:
    """The entropy too, where α underflows to 0 at low temperatures."""
    s = sizes()
    student, tokens = student_tokens(s), randn(LAYERS, 3, 15, WIDTH, seed=1)
    if case == "zero student":
        student = torch.zeros_like(student)
    elif case == "zero teacher":
        tokens = torch.zeros_like(tokens)
    elif case == "equal layers":
        tokens = tokens[:1].expand(LAYERS, -1, -1, -1)
    selector = perturb(build(kind, s, temperature=temperature), 3.0 if kind == "static" else 0.3)
    alpha = selector(student, teacher_with(tokens, s.teacher_grid))
    torch.testing.assert_close(alpha.sum(dim=1), torch.ones(2))
    ((alpha * randn(2, LAYERS, seed=2)).sum() + normalized_entropy(alpha).sum()).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in selector.parameters())


def test_entropy_has_a_gradient_where_a_share_is_zero() -> None:
    logits = torch.tensor([[0.0, -1.0, -200.0], [0.0, -300.0, -300.0]], requires_grad=True)
    normalized_entropy(logits.softmax(dim=1)).sum().backward()
    p = 1 / (1 + math.exp(-1.0))
    # dH/dz_i = −p_i (log p_i + H)
    nats = -p * math.log(p) - (1 - p) * math.log(1 - p)
    expected = [-p * (math.log(p) + nats), -(1 - p) * (math.log(1 - p) + nats), 0.0]
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0], torch.tensor(expected) / math.log(3))
    assert logits.grad[1].tolist() == [0, 0, 0]


# -- controls ---------------------------------------------------------------------------------------------------------


@each("kind", FIXED)
def test_controls_see_neither_student_nor_teacher(kind: str) -> None:
    s = sizes()
    selector = build(kind, s)
    alphas = [
        selector(student_tokens(s, seed=i), teacher_with(randn(LAYERS, 3, 15, WIDTH, seed=i), s.teacher_grid))
        for i in (1, 2)
    ]
    assert torch.equal(*alphas)
    assert not list(selector.parameters()) and set(selector.state_dict()) == {"alpha"}


@each("depths", DEPTHS)
def test_uniform_and_last(depths: tuple[tuple[int, ...], int, int]) -> None:
    s = sizes(*depths)
    tokens = teacher_with(randn(s.teacher_depth, 2, s.teacher_tokens, WIDTH), s.teacher_grid)
    uniform = build("uniform", s)(student_tokens(s, batch=2), tokens)
    assert torch.equal(uniform, torch.full((len(s.points), s.teacher_depth), 1 / s.teacher_depth))
    assert selected("last", depths) == [depths[2] - 1] * len(depths[0])


@each(
    "depths, layers",
    [
        (((2, 5, 8, 11), 12, 12), [2, 5, 8, 11]),
        (((2, 5, 8, 11), 12, 24), [5, 11, 17, 23]),
        (((0, 1, 2, 3), 4, 12), [2, 5, 8, 11]),
        (((0, 2, 4), 5, 7), [0, 3, 6]),
        (((0, 3), 4, 2), [0, 1]),
        (((0, 5), 12, 4), [0, 1]),
        (((2,), 3, 1), [0]),
        *((depths, None) for depths in DEPTHS),
    ],
)
def test_forward_and_reverse(depths: tuple[tuple[int, ...], int, int], layers: list[int] | None) -> None:
    """`forward` takes the nearest layer at proportional depth, `reverse` the same layers in reverse order."""
    points, student_depth, teacher_depth = depths
    forward = selected("forward", depths)
    assert layers is None or forward == layers
    assert selected("reverse", depths) == forward[::-1]
    for point, layer in zip(points, forward, strict=True):
        # shares of the depth, counted from 1
        distances = [
            abs(Fraction(k + 1, teacher_depth) - Fraction(point + 1, student_depth)) for k in range(teacher_depth)
        ]
        assert distances[layer] == min(distances)


@each("depths", DEPTHS)
def test_random_is_a_permutation(depths: tuple[tuple[int, ...], int, int]) -> None:
    points, _, teacher_depth = depths
    for seed in range(5):
        layers = selected("random", depths, seed)
        used = [layers.count(layer) for layer in range(teacher_depth)]
        assert max(used) <= math.ceil(len(points) / teacher_depth)
        assert min(used) >= len(points) // teacher_depth


def test_random_depends_on_the_seed_only() -> None:
    depths = (tuple(range(6)), 6, 6)
    drawn = [tuple(selected("random", depths, seed)) for seed in range(40)]
    assert len(set(drawn)) > 30  # of 720
    # over the seeds every point gets every layer
    assert all({layers[m] for layers in drawn} == set(range(6)) for m in range(6))
    for seed in (0, 7):
        s = sizes(*depths, student_width=9, teacher_width=12, student_grid=(2, 5), teacher_grid=(1, 4))
        tokens = teacher_with(randn(6, 1, 4, 12), (1, 4))
        assert layers_of(build("random", s, seed)(student_tokens(s, batch=1), tokens)) == list(drawn[seed])
        # fewer points get the first of these layers
        assert selected("random", ((1, 4), 6, 6), seed) == list(drawn[seed][:2])


def test_all_to_one() -> None:
    """The layer that is set, or the middle one; a layer that the teacher lacks is refused."""
    for depth, middle in ((12, 5), (24, 11), (5, 2), (4, 1), (1, 0)):
        assert selected("all_to_one", ((0, 2, 3), 4, depth)) == [middle] * 3, depth
    for layer in range(LAYERS):
        assert selected("all_to_one", ((1, 3), 4, LAYERS), layer=layer) == [layer] * 2
    for layer in (-1, LAYERS, 100):
        with pytest.raises(UserError, match=rf"selector.layer={layer} .* 5 blocks are 0 to 4; choose"):
            AllToOneConfig(layer=layer).build(sizes())
