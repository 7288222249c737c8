"""Head aligners: student heads → teacher heads. Name → configuration."""

from __future__ import annotations

from basd.components.head_aligners.conv import ConvConfig
from basd.components.head_aligners.identity import IdentityConfig

HEAD_ALIGNERS: dict[str, type] = {"conv": ConvConfig, "none": IdentityConfig}
