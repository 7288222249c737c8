"""Loss weighting. Name → configuration."""

from __future__ import annotations

from basd.components.weighting.equal import EqualConfig
from basd.components.weighting.fixed import FixedConfig
from basd.components.weighting.uwso import UWSOConfig

WEIGHTINGS: dict[str, type] = {"uwso": UWSOConfig, "equal": EqualConfig, "fixed": FixedConfig}
