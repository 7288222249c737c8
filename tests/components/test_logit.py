import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from each import each
from torch import Tensor

from basd.components.comparison import LOGITS
from basd.components.losses.logit import LogitLoss, LogitLossConfig
from basd.components.sizes import Sizes

SIZES = Sizes(
    points=(1, 3),
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


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(**options: Any) -> LogitLoss:
    return LogitLossConfig(**options).build(SIZES)


def naive_softmax(row: np.ndarray) -> list[float]:
    powers = [math.exp(x - max(row)) for x in row]
    return [p / sum(powers) for p in powers]


def naive_kd(student: Tensor, target: Tensor, temperature: float) -> float:
    """T² times the mean over images of KL(target ‖ softmax(student/T))."""
    values = []
    for row, p in zip(student.double().numpy(), target.double().tolist(), strict=True):
        q = naive_softmax(row / temperature)
        values.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))
    return temperature**2 * float(np.mean(values))


@each("kind", ["kd", "deit_soft"])
@each("temperature", [1.0, 3.0, 4.0])
@each("batch, classes", [(6, 5), (1, 3), (4, 11)])
def test_divergence_equals_loops(kind: str, temperature: float, batch: int, classes: int) -> None:
    student, target = 3 * randn(batch, classes), (2 * randn(batch, classes, seed=1)).softmax(-1)
    target[0] = torch.eye(classes)[1]  # a row with zeros
    expected = naive_kd(student, target, temperature)
    value = float(build(kind=kind, temperature=temperature)(student, target))
    assert value == pytest.approx(expected, rel=1e-4)
    by_element = float(build(kind=kind, temperature=temperature, reduction="elements")(student, target))
    assert by_element == pytest.approx(expected / classes, rel=1e-4)


@each("lam", [1.0, 0.3])
def test_hard_distillation_equals_loops(lam: float) -> None:
    student = 3 * randn(6, 5)
    decisions = torch.eye(5)[torch.tensor([0, 3, 3, 1, 4, 2])]
    target = lam * decisions + (1 - lam) * decisions.flip(0)
    expected = 0.0
    for row, p in zip(student.double().numpy(), target.tolist(), strict=True):
        expected -= sum(a * math.log(b) for a, b in zip(p, naive_softmax(row), strict=True)) / 6
    # neither the temperature nor the reduction has an effect
    for options in ({}, {"temperature": 9.0}, {"reduction": "elements"}):
        assert float(build(kind="deit_hard", **options)(student, target)) == pytest.approx(expected, rel=1e-4)


@each("temperature", [1.0, 4.0])
def test_a_match_of_mixed_targets_is_zero(temperature: float) -> None:
    probabilities = (2 * randn(6, 5)).softmax(-1)
    mixed = 0.3 * probabilities + 0.7 * probabilities.flip(0)
    student = (temperature * mixed.log() + randn(6, 1, seed=2)).requires_grad_()
    value = build(temperature=temperature)(student, mixed)
    value.backward()
    assert float(value.detach()) == pytest.approx(0, abs=1e-5) and float(value.detach()) >= 0
    assert student.grad is not None and float(student.grad.abs().max()) < 1e-5
    assert float(build(temperature=temperature)(student.detach() + randn(6, 5, seed=3), mixed)) > 0.05


def test_at_high_temperature_logits_are_matched() -> None:
    """Hinton et al. 2015, eq. 4: the gradient of T²KL tends to (z − v)/C of logits without mean, per image."""
    student, teacher = randn(4, 7).double(), randn(4, 7, seed=1).double()
    student.requires_grad_()
    build(temperature=1e3)(student, (teacher / 1e3).softmax(-1)).backward()
    z, v = student.detach(), teacher
    expected = ((z - z.mean(1, keepdim=True)) - (v - v.mean(1, keepdim=True))) / 7 / 4
    assert student.grad is not None
    torch.testing.assert_close(student.grad, expected, rtol=1e-2, atol=1e-4)


@each("kind", ["kd", "deit_soft", "deit_hard"])
@each("temperature", [1.0, 4.0])
@each("scale", [0.0, 1.0, 1e4])
def test_gradients_are_finite(kind: str, temperature: float, scale: float) -> None:
    student = (scale * randn(6, 5)).requires_grad_()
    teacher = (scale * randn(6, 5, seed=1) / temperature).softmax(-1)
    value = build(kind=kind, temperature=temperature)(student, teacher)
    value.backward()
    assert value.ndim == 0 and torch.isfinite(value)
    assert student.grad is not None and torch.isfinite(student.grad).all()


class Fake:
    """A comparison with logits only; it records the temperatures and decisions that the loss asks for."""

    def __init__(self, token: bool) -> None:
        self.asked: list[Any] = []
        self.class_logits, self.token_logits, self.logits = randn(4, 5), randn(4, 5, seed=1), 2 * randn(4, 5, seed=2)
        self.student_logits = self.class_logits
        self.student = SimpleNamespace(distillation_logits=self.token_logits if token else None)

    def teacher_probabilities(self, temperature: float) -> Tensor:
        self.asked.append(temperature)
        return (self.logits / temperature).softmax(-1)

    def teacher_decisions(self) -> Tensor:
        self.asked.append("decisions")
        return torch.eye(5)[self.logits.argmax(-1)]


@each("token", [False, True])
@each("kind", ["kd", "deit_soft", "deit_hard"])
def test_compare_picks_the_head_and_the_target(kind: str, token: bool) -> None:
    """The distillation token's head for the DeiT forms, the class token's otherwise."""
    config = LogitLossConfig()
    assert not config.enabled and config.reads == {LOGITS}
    assert (config.kind, config.temperature, config.reduction) == ("kd", 4.0, "batch")
    fake: Any = Fake(token)
    loss = build(kind=kind, temperature=3.0)
    value = float(loss.compare(fake))
    head = fake.token_logits if token and kind != "kd" else fake.class_logits
    if kind == "deit_hard":
        expected = float(torch.nn.functional.cross_entropy(head, fake.logits.argmax(-1)))
        assert fake.asked == ["decisions"]
    else:
        expected = naive_kd(head, (fake.logits / 3).softmax(-1), 3.0)
        assert fake.asked == [3.0]
    assert value == pytest.approx(expected, rel=1e-4)


def test_different_class_counts_are_noticed() -> None:
    with pytest.raises(AssertionError):
        build()(randn(4, 5), randn(4, 1, seed=1).softmax(-1))
