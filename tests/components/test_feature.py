from functools import cached_property
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from each import each
from torch import Tensor

from basd.components.comparison import CLS, PROJECTION, TOKENS, Bridges, Comparison
from basd.components.losses.feature import FeatureLoss, FeatureLossConfig
from basd.components.sizes import Sizes

SIZES = Sizes(
    points=(0, 2),
    image_size=24,
    student_depth=4,
    student_width=6,
    student_heads=2,
    student_grid=(3, 5),
    teacher_depth=3,
    teacher_width=8,
    teacher_heads=4,
    teacher_grid=(4, 3),
)
READS = {"patches": {PROJECTION, TOKENS}, "cls": {PROJECTION, CLS}, "both": {PROJECTION, TOKENS, CLS}}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(samples: str = "patches") -> FeatureLoss:
    return FeatureLossConfig(samples=samples).build(SIZES)


def comparison(**parts: Tensor) -> Comparison:
    """A comparison that has these parts only; reading another one fails."""
    nothing: Any = SimpleNamespace()
    made = Comparison(Bridges(), SIZES, nothing, nothing, labels=torch.zeros(0), generator=lambda _: torch.Generator())
    for name, value in parts.items():
        assert isinstance(vars(Comparison)[name], cached_property)
        setattr(made, name, value)
    return made


def mean_squared_error(student: Tensor, teacher: Tensor) -> float:
    pairs = zip(student.double().flatten().tolist(), teacher.double().flatten().tolist(), strict=True)
    return sum((a - b) ** 2 for a, b in pairs) / student.numel()


@each("samples", READS)
def test_feature_equals_loops(samples: str) -> None:
    """`both` is the mean of two means: the class token has the weight of all patches together."""
    patches, targets = 2 * randn(2, 3, 15, 8) + 1, randn(2, 3, 15, 8, seed=1)
    cls, target_cls = randn(2, 3, 8, seed=2) - 3, randn(2, 3, 8, seed=3)
    parts: dict[str, Tensor] = {}
    means: list[float] = []
    if samples in ("patches", "both"):
        parts |= {"projected": patches, "target": targets}
        means.append(mean_squared_error(patches, targets))
    if samples in ("cls", "both"):
        parts |= {"projected_cls": cls, "target_cls": target_cls}
        means.append(mean_squared_error(cls, target_cls))
    assert FeatureLossConfig(samples=samples).reads == READS[samples]
    assert float(build(samples).compare(comparison(**parts))) == pytest.approx(sum(means) / len(means), rel=1e-5)


def test_bounds_and_shapes() -> None:
    """For a layer-normalised target: 0 for a match, 1 for a student of zeros, 2 for an unrelated student."""
    student, teacher = (F.layer_norm(randn(2, 8, 15, 32, seed=seed), (32,)) for seed in range(2))
    loss = build()
    assert float(loss(teacher, teacher)) == 0
    assert float(loss(torch.zeros_like(teacher), teacher)) == pytest.approx(1, abs=1e-3)
    assert float(loss(student, teacher)) == pytest.approx(2, abs=0.1)
    for shape in ((2, 3, 16, 8), (2, 3, 1, 8), (2, 3, 15, 1), (1, 3, 15, 8)):
        with pytest.raises(AssertionError):
            loss(randn(*shape), randn(2, 3, 15, 8))


@each("case", ["random", "zeros", "match"])
def test_gradient_reaches_both_sides(case: str) -> None:
    student, teacher = randn(2, 3, 15, 8), randn(2, 3, 15, 8, seed=1)
    if case == "zeros":
        student, teacher = torch.zeros_like(student), torch.zeros_like(teacher)
    elif case == "match":
        student = teacher.clone()
    student.requires_grad_()
    teacher.requires_grad_()
    build()(student, teacher).backward()
    assert student.grad is not None and teacher.grad is not None
    torch.testing.assert_close(student.grad, 2 * (student - teacher).detach() / student.numel())
    torch.testing.assert_close(teacher.grad, -student.grad)
