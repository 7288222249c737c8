"""Token aligners: teacher tokens → student positions. Name → configuration."""

from __future__ import annotations

from basd.components.token_aligners.cross_attention import CrossAttentionConfig
from basd.components.token_aligners.interpolate import InterpolateConfig

TOKEN_ALIGNERS: dict[str, type] = {"cross_attention": CrossAttentionConfig, "interpolate": InterpolateConfig}
