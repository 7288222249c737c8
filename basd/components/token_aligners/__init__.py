"""Token aligners: teacher tokens → student positions. Name → configuration.

Every configuration says whether the student's projection is an MLP instead of a Linear (`student_mlp`).
"""

from __future__ import annotations

from basd.components.token_aligners.cross_attention import CrossAttentionConfig
from basd.components.token_aligners.frozen_random import FrozenRandomConfig
from basd.components.token_aligners.interpolate import InterpolateConfig
from basd.components.token_aligners.student_projection import StudentProjectionConfig

TOKEN_ALIGNERS: dict[str, type] = {
    "cross_attention": CrossAttentionConfig,
    "interpolate": InterpolateConfig,
    "student_projection": StudentProjectionConfig,
    "frozen_random": FrozenRandomConfig,
}
