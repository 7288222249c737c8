"""static: a learned preference for layers that sees neither student nor teacher."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from basd.components.selectors.depth import gaussian_prior
from basd.components.selectors.learned import LearnedSelectorConfig
from basd.components.sizes import Sizes
from basd.models.teacher import TeacherOutput


@dataclass
class StaticConfig(LearnedSelectorConfig):
    """adaptive_spectral without its spectra: what is left when the descriptors are taken away."""

    name: str = "static"

    def build(self, sizes: Sizes) -> nn.Module:
        return StaticSelector(self, sizes)


class StaticSelector(nn.Module):
    """α = softmax(bias/τ) over layers; the bias starts as adaptive_spectral's Gaussian prior at proportional depth."""

    def __init__(self, config: StaticConfig, sizes: Sizes) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.bias = nn.Parameter(gaussian_prior(sizes))

    def forward(self, student: Tensor, teacher: TeacherOutput) -> Tensor:
        """Returns α (M, L), rows sum to 1."""
        return (self.bias / self.temperature).softmax(dim=-1)
