import math

import pytest
import torch
from each import each
from torch import Tensor

from basd.evaluation.classification import classification_metrics, evaluate, predict


def problem(n: int = 400, classes: int = 10, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (n,), generator=g)
    logits = scale * torch.randn(n, classes, generator=g)
    logits[torch.arange(n), labels] += scale
    return logits, labels


def reference(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Guo et al. (2017), a loop over samples."""
    n = len(labels)
    top1 = top5 = nll = 0.0
    bins: list[list[tuple[float, float]]] = [[] for _ in range(15)]
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        total = sum(math.exp(v - max(row)) for v in row)
        probabilities = [math.exp(v - max(row)) / total for v in row]
        ranked = sorted(range(len(row)), key=lambda i: -row[i])
        top1 += ranked[0] == label
        top5 += label in ranked[:5]
        nll -= math.log(probabilities[label])
        confidence = max(probabilities)
        for b in range(15):
            if b / 15 < confidence <= (b + 1) / 15 or (b == 14 and confidence > 1):
                bins[b].append((confidence, float(ranked[0] == label)))
    ece = sum(
        len(b) / n * abs(sum(hit for _, hit in b) / len(b) - sum(conf for conf, _ in b) / len(b)) for b in bins if b
    )
    return {"top1": top1 / n, "top5": top5 / n, "nll": nll / n, "ece": ece}


@each("scale", [0.1, 2.0, 30.0])
@each("classes", [3, 10])
def test_against_a_loop(classes: int, scale: float) -> None:
    logits, labels = problem(classes=classes, scale=scale)
    got = classification_metrics(logits, labels)
    assert got == pytest.approx(reference(logits, labels), rel=1e-9, abs=1e-12)
    assert all(type(value) is float for value in got.values())


def test_perfect_and_hopeless() -> None:
    labels = torch.arange(10)
    right = 1000 * torch.eye(10)
    assert classification_metrics(right, labels) == pytest.approx({"top1": 1, "top5": 1, "nll": 0, "ece": 0})
    wrong = classification_metrics(right, (labels + 1) % 10)
    assert wrong["top1"] == 0 and wrong["nll"] == pytest.approx(1000) and wrong["ece"] == pytest.approx(1)


def test_calibrated_by_construction() -> None:
    """Confidence 0.75, right three times in four."""
    logits = torch.tensor([[math.log(3.0), 0.0]]).expand(400, 2)
    labels = torch.tensor([0, 0, 0, 1]).repeat(100)
    metrics = classification_metrics(logits, labels)
    assert metrics["top1"] == 0.75 and metrics["ece"] == pytest.approx(0, abs=1e-7)
    assert metrics["top5"] == 1  # of two classes


def test_half_precision_is_read_exactly_and_the_order_does_not_matter() -> None:
    logits, labels = problem()
    half = logits.bfloat16()
    assert classification_metrics(half, labels) == classification_metrics(half.double(), labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    expected = classification_metrics(logits, labels)
    assert classification_metrics(logits[order], labels[order]) == pytest.approx(expected, rel=1e-12)


def test_non_finite_logits_are_wrong() -> None:
    logits, labels = problem(n=10)
    logits[:] = 0
    logits[torch.arange(10), labels] = 5
    logits[0] = float("nan")
    logits[1, labels[1]] = float("inf")
    metrics = classification_metrics(logits, labels)
    assert metrics["top1"] == metrics["top5"] == 0.8
    assert math.isnan(metrics["nll"]) and math.isnan(metrics["ece"])


def test_evaluate_in_batches() -> None:
    _, labels = problem(n=23)
    images = torch.randn(23, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    layer = torch.nn.Linear(48, 10)
    sizes: list[int] = []

    def forward(x: Tensor) -> Tensor:
        sizes.append(len(x))
        assert not torch.is_grad_enabled()
        result: Tensor = layer(x.flatten(1))
        return result

    metrics, logits = evaluate(forward, images, labels, 8)
    assert sizes == [8, 8, 7] and logits.shape == (23, 10) and not logits.requires_grad
    torch.testing.assert_close(logits, layer(images.flatten(1)).detach())
    assert metrics == classification_metrics(logits, labels)
    assert predict(lambda x: layer(x.flatten(1)).bfloat16(), images, 8).dtype == torch.float32
