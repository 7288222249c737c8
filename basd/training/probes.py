"""Linear probes: multinomial logistic regression on a frozen teacher's features, the head of a teacher that has none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from basd.data.feed import evaluation_batches, worker_count
from basd.data.images import ImageSource, Splits
from basd.data.views import normalize
from basd.errors import UserError
from basd.evaluation.classification import classification_metrics, predict_batches

# strongest first: each fit starts from the one before, and the weakest would take longest from zero
L2_STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
FEATURE_BATCH = 64


class Probe(NamedTuple):
    """head: features (B, D) → logits (B, C), float32; l2: its chosen strength; top-1 in [0, 1]."""

    head: nn.Linear
    l2: float
    validation_top1: float
    # None where test images have no labels
    test_top1: float | None


class _Regression(NamedTuple):
    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)


def empty_probe(features: int, classes: int) -> nn.Linear:
    """A probe whose weights are not set yet; draws no random numbers."""
    return nn.utils.skip_init(nn.Linear, features, classes).eval().requires_grad_(False)


def lacks_labels(part: ImageSource) -> bool:
    labels = getattr(part, "labels", None)
    return labels is None or len(labels) == 0 or bool((labels < 0).any())


def check_labels(splits: Splits) -> None:
    """`UserError` unless every image that the probe is fitted or chosen on has a label; the test split needs none."""
    for name in ("train", "validation"):
        if lacks_labels(getattr(splits, name)):
            raise UserError(
                f"a linear probe as the teacher's head needs labels, but the {name} split lacks some; choose a teacher with "
                "a head of its own (teacher.head=own), or a method without the teacher's logits."
            )


def fit_probe(
    model: VisionTransformer,
    splits: Splits,
    image_size: int,
    statistics: tuple[Sequence[float], Sequence[float]],
    progress: Callable[[int, int], None] | None = None,
    share: float = 1.0,
) -> Probe:
    """Fit a probe on the clean evaluation view of the training split; the model comes back as it was, on its device.

    `share`: the view's side over the image's shorter side.

    The strength of L2 with the least negative log-likelihood on the validation split is chosen: the probabilities are what
    is distilled, and accuracies of few images tie. The test split is scored once, with that, if it has labels. No random
    numbers.
    """
    check_labels(splits)
    home = next(model.parameters()).device
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = sum(-(-len(part) // FEATURE_BATCH) for part in splits) + len(L2_STRENGTHS)
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, steps)

    model.to(device).eval()
    try:
        (train, train_labels), (validation, validation_labels), (test, test_labels) = (
            _features(model, part, image_size, share, statistics, device, advance) for part in splits
        )
    finally:
        model.to(home)
    mean, scale = train.mean(dim=0), _scale(train)
    standardised, labels = ((train - mean) / scale).to(device), train_labels.to(device)
    held_out, answers = ((validation - mean) / scale).to(device), validation_labels.to(device)
    chosen, best, l2 = None, math.inf, L2_STRENGTHS[0]
    regression = None
    for strength in L2_STRENGTHS:
        regression = logistic_regression(standardised, labels, splits.train.classes, strength, regression)
        loss = float(F.cross_entropy(F.linear(held_out, regression.weight, regression.bias), answers))
        if loss < best:
            chosen, best, l2 = regression, loss, strength
        advance()
    assert chosen is not None
    head = empty_probe(train.shape[1], splits.train.classes)
    # the standardisation of the features goes into the weights
    weight = chosen.weight.cpu() / scale
    head.weight.copy_(weight)
    head.bias.copy_(chosen.bias.cpu() - weight @ mean)

    def top1(features: Tensor, labels: Tensor) -> float:
        return classification_metrics(head(features.float()), labels)["top1"]

    test_top1 = None if lacks_labels(splits.test) else top1(test, test_labels)
    return Probe(head, l2, top1(validation, validation_labels), test_top1)


@torch.no_grad()
def _features(
    model: VisionTransformer,
    part: ImageSource,
    image_size: int,
    share: float,
    statistics: tuple[Sequence[float], Sequence[float]],
    device: torch.device,
    advance: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Pre-logits features (N, D), float64, and labels (N,) of the readable images of a split, on the CPU."""

    def forward(view: Tensor) -> Tensor:
        features = model.forward_head(model.forward_features(normalize(view, *statistics)), pre_logits=True)
        advance()
        return features

    views = evaluation_batches(part, image_size, share, FEATURE_BATCH, device, worker_count(-1, device))
    features, labels = predict_batches(forward, views)
    features, labels = features[labels >= 0].double(), labels[labels >= 0]
    if not features.isfinite().all():
        raise UserError("the teacher's features are not finite; check teacher.weights, teacher.mean and teacher.std.")
    return features, labels


def _scale(features: Tensor) -> Tensor:
    """Standard deviation of each feature, (D,); 1 where it hardly varies."""
    spread = features.std(dim=0, unbiased=False)
    return torch.where(spread > 1e-6 * features.abs().amax().clamp_min(1e-30), spread, 1.0)


def logistic_regression(
    features: Tensor, labels: Tensor, classes: int, l2: float, start: _Regression | None = None
) -> _Regression:
    """Minimises mean cross-entropy + l2/2·‖W‖² over W and b (b free) by full-batch LBFGS in float64.

    features: (N, D); labels: int64 (N,). The minimum is unique; `start` only shortens the way to it.
    """
    features = features.double()
    if start is None:
        start = _Regression(features.new_zeros(classes, features.shape[1]), features.new_zeros(classes))
    weight, bias = (value.clone().requires_grad_() for value in start)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=1000,
        history_size=20,
        # the objective is l2-strongly convex in W: an error of about 1e-3 at most
        tolerance_grad=1e-3 * l2,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels) + l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return _Regression(weight.detach(), bias.detach())
