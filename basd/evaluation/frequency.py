"""Sensitivity by frequency band: how far noise of one energy moves the logits, by where in the spectrum it lies."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from basd.components.spectrum import radii

BANDS = ("low", "mid", "high")
# Root mean square of the noise, of pixels in [0, 1]: between what Yin et al. put into CIFAR's images and into ImageNet's.
NOISE = 0.05


@lru_cache(maxsize=32)
def band_of(size: int) -> Tensor:
    """Number of the band in `BANDS` of each bin of rfft2 of size×size pixels, −1 for the mean: (size, size//2+1).

    Bands are thirds of the radius up to the highest frequency along an axis; the corners beyond belong to the last.
    """
    radius = radii((size, size))
    thirds = torch.arange(1, len(BANDS), dtype=radius.dtype) / len(BANDS) * (size / 2)
    return torch.bucketize(radius, thirds).masked_fill(radius == 0, -1)


def band_noise(images: int, size: int, band: int, generator: torch.Generator) -> Tensor:
    """Noise (images, 3, size, size) whose spectrum is white within a band and empty outside, on the CPU.

    Every image's has root mean square `NOISE`, whatever the band; the channels are independent.
    """
    white = torch.fft.rfft2(torch.randn(images, 3, size, size, generator=generator))
    noise = torch.fft.irfft2(white * (band_of(size) == band), s=(size, size))
    energy = noise.square().mean(dim=(1, 2, 3), keepdim=True)
    # of a few pixels a band may hold no frequency
    return NOISE * noise / energy.sqrt().clamp_min(1e-12)


def sensitivity(logits: Tensor, disturbed: Tensor) -> float:
    """Root mean square change of the logits, in units of how far logits lie apart between images; 0 for a blind model.

    After Yin et al. (2019, arXiv:1906.08988), section 3: noise of fixed energy at one place of the Fourier domain. They count
    errors, which say little of a model that errs often, and take one frequency at a time; the change of the logits needs
    neither labels nor thousands of images. Logits are taken as softmax sees them, without their mean over classes.

    logits, disturbed: (n, C) of the same images. NaN where all images get the same logits.
    """
    clean, moved = (values.double() - values.double().mean(dim=-1, keepdim=True) for values in (logits, disturbed))
    spread = (clean - clean.mean(dim=0)).square().sum()
    return float(((moved - clean).square().sum() / spread).sqrt()) if spread > 0 else float("nan")
