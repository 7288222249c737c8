"""spectral: squared difference of the 2-D spectra of student and teacher tokens.

Source: SpectralKD (arXiv:2412.19055), here with the half-plane's multiplicity counted, so that Parseval holds: with all
bands weighted alike the value equals half the spatial mean squared error of the layer-normalised tokens. The published
form is `mode=half_spectrum`; the other modes see one part of the spectrum, and `spatial_mse` is the control.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basd.components.comparison import PROJECTION, TOKENS, Comparison
from basd.components.sizes import Sizes
from basd.components.spectrum import channel_groups, multiplicity, radii, real_bins, spatial_power, spatial_spectrum
from basd.distributed import all_reduce_sum, world

Grid = tuple[int, int]

# Added to the power of a bin where it is divided by or its logarithm taken; the mean power of LN0 tokens is 1.
FLOOR = 1e-4
# Variance of log|F| of a Gaussian bin: |F| is Rayleigh distributed, or half normal where the bin is real.
RAYLEIGH_LOG_VARIANCE, HALF_NORMAL_LOG_VARIANCE = math.pi**2 / 24, math.pi**2 / 8


def full(student: Tensor, teacher: Tensor, grid: Grid) -> Tensor:
    """Σ w·|Δ|²/(2·B·D·N), by Parseval's theorem: the orthonormal transform leaves Σ w·|Δ|² = Σ δ², so none is computed."""
    return spatial_mse(student, teacher, grid)


def spatial_mse(student: Tensor, teacher: Tensor, grid: Grid) -> Tensor:
    """Half the mean squared difference of the tokens: the control that never leaves the image, and the number that `full` is."""
    return F.mse_loss(student, teacher) / 2


def log_magnitude(student: Tensor, teacher: Tensor, grid: Grid) -> Tensor:
    """Σ w·(log|F_s| − log|F_t|)²/v over Σ w, v the variance of that difference for white tokens that are unrelated.

    v is π²/12, and π²/4 for the bins that are real (DC and Nyquist). Well above 1 where one side lacks a bin.
    """
    logarithm = [(spatial_spectrum(x, grid).square().sum(dim=-3) + FLOOR).log() / 2 for x in (student, teacher)]
    real = real_bins(grid).to(student.device)
    variance = 2 * torch.where(real, HALF_NORMAL_LOG_VARIANCE, RAYLEIGH_LOG_VARIANCE)
    weight = multiplicity(grid).to(student) / variance
    return ((logarithm[0] - logarithm[1]).square() * weight[:, None]).sum() / student.numel()


def phase(student: Tensor, teacher: Tensor, grid: Grid) -> Tensor:
    """Σ w·|F_t|(1 − cos Δφ)/Σ w·|F_t| per point, |F_t| detached as a weight. A real bin has the phases 0 and π only."""
    spectra = [spatial_spectrum(x, grid) for x in (student, teacher)]
    magnitude_s, magnitude_t = ((spectrum.square().sum(dim=-3) + FLOOR).sqrt() for spectrum in spectra)
    cosine = (spectra[0] * spectra[1]).sum(dim=-3) / (magnitude_s * magnitude_t)
    weight = magnitude_t.detach() * multiplicity(grid).to(student)[:, None]
    axes = (1, 2, 3)
    # a ratio of sums: over the batches of all processes
    return (all_reduce_sum(((1 - cosine) * weight).sum(dim=axes)) / all_reduce_sum(weight.sum(dim=axes))).mean()


def half_of_band(student: Tensor, teacher: Tensor, grid: Grid, *, high: bool) -> Tensor:
    """Band difference of the bins with radius above (high) or at most half the largest radius; DC is low."""
    radius = radii(grid).flatten()
    above = radius > radius.max() / 2
    return band_difference(student, teacher, grid, above if high else ~above)


def band_difference(student: Tensor, teacher: Tensor, grid: Grid, band: Tensor) -> Tensor:
    """Σ_band w|Δ|² / sg Σ_band w(|F_s|²+|F_t|²) per point, sums over all processes' batch. band: bool (h·(w//2+1),).

    The divisor gets a millionth of what the whole spectrum holds, so that a band empty on both sides counts 0.
    """
    band = band.to(student.device)

    def power(tokens: Tensor) -> Tensor:
        return all_reduce_sum((spatial_power(tokens, grid) * band).sum(dim=(1, 2)))

    present = power(student.detach()) + power(teacher.detach())
    return (power(student - teacher) / (present + 1e-6 * 2 * world() * student[0].numel())).mean()


def half_spectrum(student: Tensor, teacher: Tensor, grid: Grid) -> Tensor:
    """SpectralKD as published: mean squared error of the real and imaginary parts of rfft2, columns unweighted.

    student (M, B, N, D_s) as it is; the teacher's channels (M, B, N, D_t) are averaged in D_s groups.
    """
    grouped = teacher @ channel_groups(teacher.shape[-1], student.shape[-1]).to(teacher)
    return spatial_spectrum(student - grouped, grid).square().mean()


# Modes that compare LN0 tokens of equal width, in the teacher's channels.
NORMALIZED_MODES: dict[str, Callable[[Tensor, Tensor, Grid], Tensor]] = {
    "full": full,
    "log_magnitude": log_magnitude,
    "phase": phase,
    "high_band": partial(half_of_band, high=True),
    "low_band": partial(half_of_band, high=False),
    "spatial_mse": spatial_mse,
}


@dataclass
class SpectralLossConfig:
    enabled: bool = False
    # What of the spectra is compared; half_spectrum is SpectralKD as published, spatial_mse the control without them.
    mode: str = field(default="full", metadata={"choices": (*NORMALIZED_MODES, "half_spectrum")})

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({TOKENS}) if self.mode == "half_spectrum" else frozenset({TOKENS, PROJECTION})

    def build(self, sizes: Sizes) -> SpectralLoss:
        return SpectralLoss(self, sizes)


class SpectralLoss(nn.Module):
    """L = Σ w·|Δ|²/(2·B·D·N) per point, Δ the difference of the orthonormal rfft2 of LN0 tokens; mean over points.

    About 1 for unrelated inputs, 0 for a match, in every mode but `half_spectrum`, which keeps the published scale.
    """

    def __init__(self, config: SpectralLossConfig, sizes: Sizes) -> None:
        super().__init__()
        self.mode = config.mode
        self.grid = sizes.student_grid

    def compare(self, comparison: Comparison) -> Tensor:
        """The loss of one step."""
        student = comparison.student_tokens if self.mode == "half_spectrum" else comparison.projected
        return self(student, comparison.target)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """student, teacher (M, B, N, D), in the teacher's width but for `half_spectrum`. Returns a scalar."""
        assert student.shape[:3] == teacher.shape[:3] and student.shape[2] == self.grid[0] * self.grid[1], (
            f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)}, grid {self.grid}"
        )
        if self.mode == "half_spectrum":
            return half_spectrum(student, teacher, self.grid)
        assert student.shape == teacher.shape
        width = student.shape[-1:]
        return NORMALIZED_MODES[self.mode](F.layer_norm(student, width), F.layer_norm(teacher, width), self.grid)
