"""spectral_similarity: teacher layers by how alike their spectra are to the student's, with nothing learned but how sharply.

The descriptors are adaptive_spectral's; what differs is that no query, key or prior is learned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basd.components.selectors.adaptive_spectral import band_count, spectral_descriptor, teacher_descriptors
from basd.components.selectors.learned import LearnedSelectorConfig
from basd.components.sizes import Sizes
from basd.models.teacher import TeacherOutput

# A layer whose cosine is 0.01 larger has all of α at this τ; the bound keeps cosine/τ finite however long training sharpens.
LEAST_TEMPERATURE = 1e-3
# Descriptors are logarithms of order 1: what is closer than this to the mean layer differs by rounding only.
LEAST_NORM = 1e-3


@dataclass
class SpectralSimilarityConfig(LearnedSelectorConfig):
    name: str = "spectral_similarity"
    # Where the learned temperature starts; cosines lie within ±1, so 1 would be nearly uniform.
    temperature: float = field(default=0.1, metadata={"min": LEAST_TEMPERATURE})

    def build(self, sizes: Sizes) -> nn.Module:
        return SpectralSimilaritySelector(self, sizes)


class SpectralSimilaritySelector(nn.Module):
    """α_{m,l} = softmax over layers of cos(d^s_m − c, d^t_l − c)/τ, c = mean_l d^t; τ is learned (its logarithm).

    Uncentred, a student has nearly the same cosine with all layers, since their spectra share one shape. Both sides
    have the same centre, so that a student that equals a layer has cosine 1 with it. Student descriptors are detached.
    """

    def __init__(self, config: SpectralSimilarityConfig, sizes: Sizes) -> None:
        super().__init__()
        self.student_grid = sizes.student_grid
        self.bands = band_count(sizes.student_grid, sizes.teacher_grid)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(config.temperature)))

    def forward(self, student: Tensor, teacher: TeacherOutput) -> Tensor:
        """student (M, B, N, D_s) tokens at the points. Returns α (M, L), rows sum to 1."""
        own = spectral_descriptor(student.detach(), self.student_grid, self.bands)
        layers = teacher_descriptors(teacher, self.bands)
        center = layers.mean(dim=0)
        cosine = F.cosine_similarity((own - center).unsqueeze(1), layers - center, dim=-1, eps=LEAST_NORM)
        # times 1/τ, which is finite for every τ: the gradient of a quotient by a huge τ is not
        sharpness = (-self.log_temperature.clamp_min(math.log(LEAST_TEMPERATURE))).exp()
        return (cosine * sharpness).softmax(dim=-1)
