"""What ECE does not say of calibration: in which direction a model errs, and what one number cannot mend."""

from __future__ import annotations

import math

from torch import Tensor

from basd.evaluation.classification import classification_metrics

HOTTEST = 1e3
HALVINGS = 60


def overconfidence(logits: Tensor, labels: Tensor) -> float:
    """Mean confidence less accuracy, in [−1, 1]: above 0 a model says more than it knows.

    The signed counterpart of the expected calibration error (Guo et al. 2017, arXiv:1706.04599, equations 2 and 3, all
    samples in one bin). logits (n, C), labels int64 (n,). NaN where a logit is not finite.
    """
    if not logits.isfinite().all():
        return math.nan
    confidence = logits.double().softmax(dim=1).amax(dim=1).mean()
    return float(confidence) - classification_metrics(logits, labels)["top1"]


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature with the least negative log-likelihood of logits/T: Guo et al. (2017), section 4.2; within 1e±3.

    logits (n, C), labels int64 (n,), of images that the result is not measured on. The likelihood is concave in 1/T, so its
    slope, the mean logit less the label's, is halved in on.
    """
    logits = logits.double()
    own = logits.gather(1, labels.view(-1, 1)).mean()
    low, high = -math.log(HOTTEST), math.log(HOTTEST)  # of log 1/T
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        expected = ((math.exp(middle) * logits).softmax(dim=1) * logits).sum(dim=1).mean()
        low, high = (low, middle) if expected > own else (middle, high)
    return math.exp(-(low + high) / 2)


def calibration(logits: Tensor, labels: Tensor, held_out: Tensor, held_out_labels: Tensor) -> dict[str, float]:
    """`overconfidence` of logits (n, C) with labels (n,), and `ece_scaled`.

    ece_scaled: the expected calibration error, in [0, 1], left after temperature scaling fitted on other, held-out, logits
    and labels (Guo et al. 2017, section 4.2). Label smoothing and soft targets move the temperature of all logits; this is
    what they do beyond that. NaN where a logit is not finite.
    """
    scaled = math.nan
    if logits.isfinite().all() and held_out.isfinite().all():
        temperature = fit_temperature(held_out, held_out_labels)
        scaled = classification_metrics(logits.double() / temperature, labels)["ece"]
    return {"overconfidence": overconfidence(logits, labels), "ece_scaled": scaled}
