"""Layer selectors: one mixture of teacher layers per extraction point. Name → configuration."""

from __future__ import annotations

from basd.components.selectors.adaptive_spectral import AdaptiveSpectralConfig
from basd.components.selectors.fixed import ForwardConfig, UniformConfig

SELECTORS: dict[str, type] = {
    "adaptive_spectral": AdaptiveSpectralConfig,
    "uniform": UniformConfig,
    "forward": ForwardConfig,
}
