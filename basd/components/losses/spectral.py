"""spectral: squared difference of the 2-D spectra of student and teacher tokens.

Source: SpectralKD (arXiv:2412.19055), here with the half-plane's multiplicity counted, so that Parseval holds: with all
bands weighted alike the value equals half the spatial mean squared error of the layer-normalised tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from basd.components.sizes import Sizes
from basd.components.spectrum import spatial_power


@dataclass
class SpectralLossConfig:
    enabled: bool = False

    def build(self, sizes: Sizes) -> SpectralLoss:
        return SpectralLoss(sizes)


class SpectralLoss(nn.Module):
    """L = Σ w·|Δ|²/(2·B·D·N) per point, Δ the difference of the orthonormal rfft2 of LN0 tokens; mean over points.

    About 1 for unrelated inputs, 0 for a match.
    """

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.grid = sizes.student_grid

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """student, teacher (M, B, N, D) in the teacher's width. Returns a scalar."""
        width = student.shape[-1:]
        # the transform is linear: one transform of the difference serves both sides
        difference = F.layer_norm(student, width) - F.layer_norm(teacher, width)
        return spatial_power(difference, self.grid).sum() / (2 * difference.numel())
