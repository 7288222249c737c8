"""The losses: name → configuration. A new loss is one file and one line here and in `LossesConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field

from basd.components.losses.attn import AttentionLossConfig
from basd.components.losses.feature import FeatureLossConfig
from basd.components.losses.logit import LogitLossConfig
from basd.components.losses.rel import RelationLossConfig
from basd.components.losses.rsd import RSDLossConfig
from basd.components.losses.spectral import SpectralLossConfig

LOSSES: dict[str, type] = {
    "rsd": RSDLossConfig,
    "rel": RelationLossConfig,
    "attn": AttentionLossConfig,
    "spectral": SpectralLossConfig,
    "logit": LogitLossConfig,
    "feature": FeatureLossConfig,
}


@dataclass
class LossesConfig:
    """`losses.<name>.*`."""

    rsd: RSDLossConfig = field(default_factory=RSDLossConfig)
    rel: RelationLossConfig = field(default_factory=RelationLossConfig)
    attn: AttentionLossConfig = field(default_factory=AttentionLossConfig)
    spectral: SpectralLossConfig = field(default_factory=SpectralLossConfig)
    logit: LogitLossConfig = field(default_factory=LogitLossConfig)
    feature: FeatureLossConfig = field(default_factory=FeatureLossConfig)


def enabled_losses(config: LossesConfig) -> tuple[str, ...]:
    """Names of the losses that are on, in the order of `LOSSES`."""
    return tuple(name for name in LOSSES if getattr(config, name).enabled)
