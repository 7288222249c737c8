"""Head aligners: student heads → teacher heads. Name → configuration."""

from __future__ import annotations

from basd.components.head_aligners.a2d import A2DConfig
from basd.components.head_aligners.conv import ConvConfig
from basd.components.head_aligners.convex import ConvexConfig
from basd.components.head_aligners.identity import IdentityConfig
from basd.components.head_aligners.mean import MeanConfig

HEAD_ALIGNERS: dict[str, type] = {
    "conv": ConvConfig,
    "convex": ConvexConfig,
    "mean": MeanConfig,
    "a2d": A2DConfig,
    "none": IdentityConfig,
}
