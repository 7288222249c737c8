"""Accuracy and calibration of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CALIBRATION_BINS = 15


class Evaluation(NamedTuple):
    """metrics: see `classification_metrics`; logits: float32 (N,C) on the CPU."""

    metrics: dict[str, float]
    logits: Tensor


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """top1, top5 (top-min(5,C)), nll (nats) and ece of logits (N,C) against labels int64 (N,); shares in [0,1].

    ece is the expected calibration error of Guo et al. (2017): 15 equal-width bins of confidence, closed above. A row
    with a non-finite logit counts as wrong, and nll and ece are then NaN. Computed in float64 on the CPU.
    """
    assert logits.ndim == 2 and labels.shape == logits.shape[:1] and len(labels) > 0, (logits.shape, labels.shape)
    logits = logits.detach().cpu().double()
    labels = labels.cpu()
    finite = logits.isfinite().all(dim=1, keepdim=True)
    hits = (logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.view(-1, 1)) & finite
    if finite.all():
        nll = float(F.cross_entropy(logits, labels))
        ece = _calibration_error(logits.softmax(dim=1).amax(dim=1), hits[:, 0])
    else:
        nll = ece = float("nan")
    return {
        "top1": float(hits[:, 0].double().mean()),
        "top5": float(hits.any(dim=1).double().mean()),
        "nll": nll,
        "ece": ece,
    }


def _calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Mean over samples of |accuracy − confidence| of the sample's bin."""
    edges = torch.arange(1, CALIBRATION_BINS, dtype=confidence.dtype) / CALIBRATION_BINS
    bins = torch.bucketize(confidence, edges)  # an edge belongs to the bin below it
    gaps = torch.bincount(bins, weights=correct.to(confidence.dtype) - confidence, minlength=CALIBRATION_BINS)
    return float(gaps.abs().sum() / len(confidence))


@torch.no_grad()
def predict(forward: Callable[[Tensor], Tensor], images: Tensor, batch_size: int) -> Tensor:
    """Logits float32 (N,C) on the CPU of images (N,…), `forward` being given up to `batch_size` of them at a time.

    No gradients are kept. Eval mode, preprocessing and moving to a device are the caller's, inside `forward`.
    """
    return torch.cat([forward(part).float().cpu() for part in torch.split(images, batch_size)])


@torch.no_grad()
def predict_batches(
    forward: Callable[[Tensor], Tensor], batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Logits float32 (N,C) and labels int64 (N,), both on the CPU, of batches of preprocessed images and labels."""
    logits, labels = zip(*((forward(images).float().cpu(), answers.cpu()) for images, answers in batches), strict=True)
    return torch.cat(logits), torch.cat(labels)


def evaluate(forward: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, batch_size: int) -> Evaluation:
    """Metrics and logits of `forward` (see `predict`) on images (N,…) with labels int64 (N,)."""
    logits = predict(forward, images, batch_size)
    return Evaluation(classification_metrics(logits, labels), logits)
