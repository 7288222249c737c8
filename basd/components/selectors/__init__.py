"""Layer selectors: one mixture of teacher layers per extraction point. Name → configuration.

Every configuration says whether α is `learned`; only learned ones have an entropy term.
"""

from __future__ import annotations

from basd.components.selectors.adaptive_spectral import AdaptiveSpectralConfig
from basd.components.selectors.alp import AlpConfig
from basd.components.selectors.fixed import (
    AllToOneConfig,
    ForwardConfig,
    LastConfig,
    RandomConfig,
    ReverseConfig,
    UniformConfig,
)
from basd.components.selectors.spectral_similarity import SpectralSimilarityConfig
from basd.components.selectors.static import StaticConfig

SELECTORS: dict[str, type] = {
    "adaptive_spectral": AdaptiveSpectralConfig,
    "static": StaticConfig,
    "alp": AlpConfig,
    "spectral_similarity": SpectralSimilarityConfig,
    "uniform": UniformConfig,
    "forward": ForwardConfig,
    "reverse": ReverseConfig,
    "random": RandomConfig,
    "all_to_one": AllToOneConfig,
    "last": LastConfig,
}
