import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from each import each
from torch import Tensor

from basd.components.losses import vrm
from basd.components.losses.vrm import VRMLoss, edge_loss, joint_entropy, reliable


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(
    prune: float = 0.1,
    huber_delta: float | None = None,
    inter_sample_weight: float = 1.0,
    inter_class_weight: float = 1.0,
) -> VRMLoss:
    return VRMLoss(prune, huber_delta, inter_sample_weight, inter_class_weight)


def logits(batch: int = 6, classes: int = 5, scale: float = 2.0) -> list[Tensor]:
    """Student real, student virtual, teacher real, teacher virtual: all different, none centred."""
    return [scale * randn(batch, classes, seed=k) + randn(batch, 1, seed=9 + k) for k in range(4)]


def naive_edges(real: np.ndarray, virtual: np.ndarray) -> list[list[np.ndarray]]:
    edges = [[r - v for v in virtual] for r in real]
    epsilon = 1e-3 * np.mean([np.linalg.norm(e) for row in edges for e in row])
    return [[e / math.sqrt(e @ e + epsilon**2) for e in row] for row in edges]


def naive_huber(x: float, delta: float) -> float:
    return 0.5 * x * x if abs(x) <= delta else delta * (abs(x) - 0.5 * delta)


def naive_entropy(row: np.ndarray) -> float:
    powers = [math.exp(x - max(row)) for x in row]
    return -sum(p / sum(powers) * math.log(p / sum(powers)) for p in powers)


def naive_vrm(inputs: list[Tensor], prune: float, delta: float, alpha: float, beta: float) -> float:
    real_s, virtual_s, real_t, virtual_t = (x.double().numpy() for x in inputs)
    batch, classes = real_s.shape
    student, teacher = naive_edges(real_s, virtual_s), naive_edges(real_t, virtual_t)
    joint = {}
    for i in range(batch):
        for j in range(batch):
            joint[i, j] = naive_entropy(real_t[i]) + naive_entropy(virtual_t[j])
    # the least certain edges do not count
    order = sorted(joint, key=lambda edge: joint[edge])
    kept = order[: len(order) - int(prune * len(order))]
    samples = [sum(naive_huber(x, delta) for x in student[i][j] - teacher[i][j]) for i, j in kept]
    student, teacher = naive_edges(real_s.T, virtual_s.T), naive_edges(real_t.T, virtual_t.T)
    by_class = [
        sum(naive_huber(x, delta) for x in student[a][b] - teacher[a][b])
        for a in range(classes)
        for b in range(classes)
    ]
    return float(alpha * np.mean(samples) + beta * np.mean(by_class))


@each("batch, classes", [(6, 5), (3, 11), (9, 2)])
@each("prune, delta", [(0.0, 1.0), (0.3, 0.2), (0.1, 10.0)])
@each("alpha, beta", [(1.0, 1.0), (0.5, 3.0), (0.0, 2.0), (2.0, 0.0)])
def test_vrm_equals_loops(batch: int, classes: int, prune: float, delta: float, alpha: float, beta: float) -> None:
    inputs = logits(batch, classes)
    expected = naive_vrm(inputs, prune, delta, alpha, beta)
    assert float(build(prune, delta, alpha, beta)(*inputs)) == pytest.approx(expected, rel=1e-4)


def test_delta_is_one_where_none_is_set() -> None:
    inputs = logits(6, 2)  # few components: some differ by more than one
    assert float(build()(*inputs)) == float(build(huber_delta=1.0)(*inputs))
    assert float(build()(*inputs)) < 0.999 * float(build(huber_delta=2.0)(*inputs))


@each("block", [1, 70, 10**9])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    inputs = logits(7, 4)
    given = [x.clone().requires_grad_() for x in inputs[:2]]
    monkeypatch.setattr(vrm, "BLOCK", block)
    value = build(0.2)(*given, *inputs[2:])
    value.backward()
    assert float(value.detach()) == pytest.approx(naive_vrm(inputs, 0.2, 1.0, 1.0, 1.0), rel=1e-4)
    monkeypatch.setattr(vrm, "BLOCK", 28)
    whole = [x.clone().requires_grad_() for x in inputs[:2]]
    build(0.2)(*whole, *inputs[2:]).backward()
    for one, other in zip(given, whole, strict=True):
        assert one.grad is not None and other.grad is not None and bool((one.grad != 0).any())
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_vrm_bounds() -> None:
    student, other, real, virtual = (randn(48, 64, seed=k) for k in range(4))
    unrelated = {"sample": build(inter_class_weight=0.0), "class": build(inter_sample_weight=0.0)}
    # edges go from real to virtual: a student that exchanges the teacher's views does not match
    assert float(build()(virtual, real, real, virtual)) > 0.1
    for loss in unrelated.values():
        assert float(loss(student, other, real, virtual)) == pytest.approx(1, abs=0.1)
        assert float(loss(real, virtual, real, virtual)) == pytest.approx(0, abs=1e-6)
        # edges of unit length: the scale of a side has no effect
        plain = float(loss(student, other, real, virtual))
        assert float(loss(5 * student, 5 * other, real, virtual)) == pytest.approx(plain, rel=1e-3)
    # nor has what all logits have in common
    moved = [x + randn(1, 64, seed=7) for x in (student, other)]
    plain = float(unrelated["sample"](student, other, real, virtual))
    assert float(unrelated["sample"](*moved, real, virtual)) == pytest.approx(plain, rel=1e-3)


def test_the_edges_of_highest_joint_entropy_are_pruned() -> None:
    real, virtual = 2 * randn(4, 3), 2 * randn(4, 3, seed=1)
    found = joint_entropy(real, virtual)
    for i in range(4):
        for j in range(4):
            joint = torch.outer(real[i].double().softmax(0), virtual[j].double().softmax(0)).flatten().tolist()
            assert float(found[i, j]) == pytest.approx(-sum(p * math.log(p) for p in joint), rel=1e-4)
    _, _, real, virtual = logits(8, 5)
    entropy = joint_entropy(real, virtual)
    for prune in (0.0, 0.25, 0.5, 0.99):
        kept = reliable(real, virtual, prune)
        assert int(kept.sum()) == 64 - int(prune * 64), prune
        assert not prune or float(entropy[kept > 0].max()) < float(entropy[kept == 0].min()), prune


def test_a_pruned_edge_does_not_count() -> None:
    """The teacher knows nothing about image 0: between samples the student's edges of that image are free."""
    real, virtual = 4 * torch.eye(5), 4 * torch.eye(5)
    real[0] = virtual[0] = torch.tensor([0.3, 0.1, 0.2, 0.3, 0.1])  # nine of 25 edges touch image 0
    student = [real + 0.0, virtual + 0.0]
    for x in student:
        x[0] = 3 * randn(5, seed=3)
    assert float(build(0.36, inter_class_weight=0.0)(*student, real, virtual)) == pytest.approx(0, abs=1e-5)
    assert float(build(0.0, inter_class_weight=0.0)(*student, real, virtual)) > 0.03


@each("case", ["random", "zero", "zero teacher", "same views", "match", "one class", "large"])
def test_gradients_are_finite(case: str) -> None:
    inputs = logits()
    if case == "zero":
        inputs = [torch.zeros(6, 5)] * 4
    elif case == "zero teacher":
        inputs[2] = inputs[3] = torch.zeros(6, 5)
    elif case == "same views":
        inputs[1], inputs[3] = inputs[0], inputs[2]
    elif case == "match":
        inputs[:2] = inputs[2:]
    elif case == "one class":
        inputs = [x[:, :1] for x in inputs]
    elif case == "large":
        inputs = [1e4 * x for x in inputs]
    given = [x.clone().requires_grad_() for x in inputs[:2]]
    value = build()(*given, *inputs[2:])
    value.backward()
    assert value.ndim == 0 and torch.isfinite(value)
    for x in given:
        assert x.grad is not None and torch.isfinite(x.grad).all()


def test_the_same_image_in_both_views_has_the_edge_zero() -> None:
    real_t, virtual_t = logits()[2:]
    same = randn(6, 5)
    value = float(build(0.0, 1.0, 1.0, 0.0)(same, same, real_t, virtual_t))
    assert value == pytest.approx(naive_vrm([same, same, real_t, virtual_t], 0.0, 1.0, 1.0, 0.0), rel=1e-4)


def test_memory_is_three_tensors_of_edges() -> None:
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    real_s, virtual_s, real_t, virtual_t = logits(20, 30)
    real_s.requires_grad_()
    virtual_s.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        held = edge_loss(real_s, virtual_s, real_t, virtual_t, 1.0)
    assert float(held.detach()) > 0
    assert 3 * 20 * 20 * 30 <= sum(kept.values()) < 4 * 20 * 20 * 30


def test_compare_reads_the_four_logits_only() -> None:
    real_s, virtual_s, real_t, virtual_t = logits()
    comparison: Any = SimpleNamespace(
        real_student_logits=real_s,
        student_logits=virtual_s,
        teacher_logits=real_t,
        virtual_teacher_logits=virtual_t,
    )
    loss = build()
    expected = naive_vrm([real_s, virtual_s, real_t, virtual_t], 0.1, 1.0, 1.0, 1.0)
    assert float(loss.compare(comparison)) == pytest.approx(expected, rel=1e-4)


def test_different_batches_are_noticed() -> None:
    real_s, virtual_s, real_t, virtual_t = logits()
    with pytest.raises(AssertionError):
        build()(real_s, virtual_s[:-1], real_t, virtual_t[:-1])
