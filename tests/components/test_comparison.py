"""The teacher's targets besides its patch tokens, against loops over images, points and layers in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from each import each
from objective_fakes import BATCH, CLASSES, MIXES, POINTS, build_student, build_teacher, data, generator, sizes
from torch import Tensor, nn

from basd.components.comparison import Bridges, Comparison
from basd.models.student import TappedStudent
from basd.models.teacher import Teacher

# a share for each of three layers at each of two points
ALPHA = [[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]]
assert len(ALPHA) == len(POINTS) != BATCH


class FixedSelector(nn.Module):
    def forward(self, _tokens: Tensor, _teacher: object) -> Tensor:
        return torch.tensor(ALPHA)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    made = build_teacher()
    torch.manual_seed(2)
    head = nn.Linear(16, CLASSES)
    with torch.no_grad():
        # the images get different classes
        head.weight.mul_(4)
        head.bias.copy_(-head.weight @ made(data()[1]).features.mean(0))
    return Teacher(made.model, head=head)


def comparison(teacher: Teacher, mix: str, normalize: bool = True) -> Comparison:
    images, clean, labels = data()
    student = TappedStudent(build_student(), POINTS, False)(images)
    bridges = Bridges(selector=FixedSelector())
    parts = (bridges, sizes(), student, teacher(clean))
    return Comparison(*parts, labels=labels, mix=MIXES[mix], generator=generator, normalize=normalize)


def mixed(rows: np.ndarray, mix: str) -> np.ndarray:
    """λ·own + (1−λ)·partner along the first axis; the partner of image b is image B−1−b."""
    chosen = MIXES[mix]
    if chosen is None:
        return rows
    return np.stack([chosen.lam * rows[b] + (1 - chosen.lam) * rows[BATCH - 1 - b] for b in range(BATCH)])


def features_of(teacher: Teacher) -> np.ndarray:
    """The class token after the final norm, (B, D), from the model itself."""
    with torch.no_grad():
        return teacher.model.norm(teacher(data()[1]).cls[-1]).double().numpy()


def logits_of(teacher: Teacher) -> np.ndarray:
    assert isinstance(teacher.head, nn.Linear)
    weight, bias = teacher.head.weight.double().numpy(), teacher.head.bias.double().numpy()
    return np.stack([weight @ row + bias for row in features_of(teacher)])


def close(got: Tensor, expected: np.ndarray) -> None:
    assert got.dtype == torch.float32 and tuple(got.shape) == expected.shape
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-5)


@each("mix", MIXES)
def test_teacher_features_and_logits_are_mixed_like_the_labels(mix: str, teacher: Teacher) -> None:
    close(comparison(teacher, mix).teacher_features, mixed(features_of(teacher), mix))
    close(comparison(teacher, mix).teacher_logits, mixed(logits_of(teacher), mix))


@each("mix", MIXES)
def test_teacher_probabilities_and_decisions_are_mixed_after_the_softmax(mix: str, teacher: Teacher) -> None:
    made, logits = comparison(teacher, mix), logits_of(teacher)
    for temperature in (1.0, 4.0):
        powers = np.array([[math.exp(value / temperature) for value in row] for row in logits])
        got = made.teacher_probabilities(temperature)
        close(got, mixed(powers / powers.sum(axis=1, keepdims=True), mix))
        torch.testing.assert_close(got.sum(-1), torch.ones(BATCH))
    assert torch.equal(made.teacher_probabilities(), made.teacher_probabilities(1.0))
    rows = np.zeros((BATCH, CLASSES))
    for b, row in enumerate(logits):
        rows[b, list(row).index(max(row))] = 1
    assert (rows != rows[::-1]).any()
    close(made.teacher_decisions(), mixed(rows, mix))


def normalised(row: np.ndarray) -> np.ndarray:
    return (row - row.mean()) / math.sqrt(row.var() + 1e-5)


@each("mix", MIXES)
def test_target_cls_mixes_layers_then_images(mix: str, teacher: Teacher) -> None:
    cls = teacher(data()[1]).cls.double().numpy()
    points = []
    for m in range(len(POINTS)):
        rows = [
            normalised(sum(ALPHA[m][layer] * normalised(cls[layer, b]) for layer in range(3)))  # type: ignore[arg-type]
            for b in range(BATCH)
        ]
        points.append(mixed(np.stack(rows), mix))
    close(comparison(teacher, mix).target_cls, np.stack(points))


@each("mix", MIXES)
def test_without_normalisation_targets_are_the_teachers_own_states(mix: str, teacher: Teacher) -> None:
    out = teacher(data()[1])
    tokens, cls = out.tokens.double().numpy(), out.cls.double().numpy()
    made = comparison(teacher, mix, normalize=False)
    close(made.mixture, np.stack([sum(row[layer] * tokens[layer] for layer in range(3)) for row in ALPHA]))
    points = [mixed(np.asarray(sum(row[layer] * cls[layer] for layer in range(3))), mix) for row in ALPHA]
    close(made.target_cls, np.stack(points))
