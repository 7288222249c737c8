"""Overconfidence, and calibration after temperature scaling, against grids and constructions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from basd.evaluation.calibration import calibration, fit_temperature, overconfidence
from basd.evaluation.classification import classification_metrics


def sampled(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibrated logits: the labels are drawn from their softmax."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, 5, generator=generator)
    return logits, torch.multinomial(logits.softmax(dim=1), 1, generator=generator)[:, 0]


def test_the_temperature_is_the_best_of_a_grid() -> None:
    logits, labels = sampled(300, 0)
    found = fit_temperature(3 * logits, labels)
    grid = [2 + 0.01 * step for step in range(200)]
    best = min(grid, key=lambda t: float(F.cross_entropy(3 * logits.double() / t, labels)))
    assert found == pytest.approx(best, abs=0.011)
    # where all answers are right or all are wrong the temperature is at an end of its range
    assert fit_temperature(torch.eye(3), torch.arange(3)) == pytest.approx(1e-3)
    assert fit_temperature(torch.eye(3), torch.tensor([1, 2, 0])) == pytest.approx(1e3)


def test_overconfidence_has_a_sign() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0]]).expand(400, 2)
    for right, expected in ((300, 0.0), (200, 0.25), (400, -0.25)):
        labels = (torch.arange(400) >= right).long()
        assert overconfidence(logits, labels) == pytest.approx(expected, abs=1e-6)


def test_scaling_corrects_a_temperature_and_nothing_else() -> None:
    logits, labels = sampled(4000, 0)
    other, other_labels = sampled(4000, 1)
    hot = calibration(4 * logits, labels, 4 * other, other_labels)
    assert hot["overconfidence"] > 0.1 and classification_metrics(4 * logits, labels)["ece"] > 0.1
    plain = classification_metrics(logits, labels)["ece"]
    assert hot["ece_scaled"] == pytest.approx(plain, abs=0.01) and hot["ece_scaled"] < 0.03
    shuffled = labels.roll(2000)
    shuffled[:2000] = labels[:2000]
    assert calibration(logits, shuffled, other, other_labels)["ece_scaled"] > 0.1


def test_a_logit_that_is_not_finite_gives_nan() -> None:
    logits, labels = sampled(10, 0)
    broken = logits.clone()
    broken[0, 0] = math.inf
    assert all(map(math.isnan, calibration(broken, labels, logits, labels).values()))
    values = calibration(logits, labels, broken, labels)
    assert math.isnan(values["ece_scaled"]) and math.isfinite(values["overconfidence"])
