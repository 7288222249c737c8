"""Loss weighting. Name → configuration."""

from __future__ import annotations

from basd.components.weighting.dwa import DWAConfig
from basd.components.weighting.equal import EqualConfig
from basd.components.weighting.fixed import FixedConfig
from basd.components.weighting.gls import GLSConfig
from basd.components.weighting.imtl_l import IMTLLConfig
from basd.components.weighting.rlw import RLWConfig
from basd.components.weighting.uncertainty import UncertaintyConfig
from basd.components.weighting.uwo import UWOConfig
from basd.components.weighting.uwso import UWSOConfig

WEIGHTINGS: dict[str, type] = {
    "uwso": UWSOConfig,
    "equal": EqualConfig,
    "fixed": FixedConfig,
    "uwo": UWOConfig,
    "uncertainty": UncertaintyConfig,
    "dwa": DWAConfig,
    "rlw": RLWConfig,
    "gls": GLSConfig,
    "imtl_l": IMTLLConfig,
}
