"""The energy of a band's noise lies in its band; the sensitivity of models that are known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from each import each
from torch import Tensor

from basd.evaluation.frequency import BANDS, NOISE, band_noise, sensitivity


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@each("size", [20, 33])
@each("band", range(len(BANDS)))
def test_the_energy_lies_in_the_band(band: int, size: int) -> None:
    noise = band_noise(4, size, band, generator()).double().numpy()
    assert np.sqrt((noise**2).mean(axis=(1, 2, 3))) == pytest.approx(NOISE, rel=1e-5)
    power = (np.abs(np.fft.fft2(noise)) ** 2).sum(axis=(0, 1))
    frequencies = np.fft.fftfreq(size) * size
    inside = 0.0
    for row, y in enumerate(frequencies):
        for column, x in enumerate(frequencies):
            radius = math.hypot(y, x)
            low, high = band * size / 6, (band + 1) * size / 6 if band < 2 else math.inf
            inside += power[row, column] if low < radius <= high else 0.0
    assert inside / power.sum() == pytest.approx(1, abs=1e-9)
    assert abs(noise.mean(axis=(2, 3))).max() < 1e-8, "brightness stays"


def test_noise_is_a_function_of_its_stream() -> None:
    assert torch.equal(band_noise(2, 20, 1, generator()), band_noise(2, 20, 1, generator()))
    draws = generator()
    assert not torch.equal(band_noise(2, 20, 1, draws), band_noise(2, 20, 1, draws))


def test_sensitivity_against_a_loop() -> None:
    logits, disturbed = torch.randn(2, 7, 5, generator=generator()).double()
    a, b = (values.numpy() - values.numpy().mean(axis=1, keepdims=True) for values in (logits, disturbed))
    change = sum(float(((b[i] - a[i]) ** 2).sum()) for i in range(7))
    spread = sum(float(((a[i] - a.mean(axis=0)) ** 2).sum()) for i in range(7))
    assert sensitivity(logits, disturbed) == pytest.approx(math.sqrt(change / spread))
    # neither a constant added to all logits nor their scale has an effect
    assert sensitivity(3 * logits + 1, 3 * disturbed + 2) == pytest.approx(sensitivity(logits, disturbed))
    assert sensitivity(logits, logits) == 0
    assert math.isnan(sensitivity(torch.ones(3, 2), torch.ones(3, 2)))


def test_a_blurring_model_is_sensitive_to_low_frequencies_only() -> None:
    size = 20
    wave = torch.cos(2 * math.pi * 2 * torch.arange(size) / size)

    def model(images: Tensor) -> Tensor:
        answer = (images * wave).sum(dim=(1, 2, 3))
        return torch.stack([answer, -answer], dim=1)

    images = torch.rand(200, 3, size, size, generator=generator())
    low, mid, high = (
        sensitivity(model(images), model(images + band_noise(200, size, b, generator()))) for b in range(3)
    )
    assert low > 0.1 and max(mid, high) < 1e-4
