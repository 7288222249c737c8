"""frozen_random: a P that nobody trains and that looks at random places; the control for where a target comes from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from basd.components.sizes import Sizes
from basd.components.token_aligners.cross_attention import local_start


@dataclass
class FrozenRandomConfig:
    name: str = "frozen_random"
    student_mlp: ClassVar[bool] = False

    def build(self, sizes: Sizes) -> nn.Module:
        return FrozenRandomAligner(sizes)


def mean_row_entropy(logits: Tensor) -> float:
    """Entropy of softmax(logits) over the last axis, in nats, averaged over rows."""
    log_p = logits.log_softmax(dim=-1)
    return float(-(log_p.exp() * log_p).sum(dim=-1).mean())


def entropy_scale(logits: Tensor, entropy: float) -> float:
    """Factor s ≥ 0 for which the rows of softmax(s·logits) have this entropy on average, by bisection."""
    low, high = 0.0, 1.0
    # entropy falls as s grows; ties or a single column may keep it above any bound
    while mean_row_entropy(high * logits) > entropy and high < 1e4:
        low, high = high, 2 * high
    for _ in range(24):
        middle = (low + high) / 2
        if mean_row_entropy(middle * logits) > entropy:
            low = middle
        else:
            high = middle
    return high


class FrozenRandomAligner(nn.Module):
    """P = softmax(s·Q Kᵀ/√D) per point, Q and K standard normal and drawn once; output P·T. P is kept in the checkpoint.

    P depends on the position only: like `interpolate` it reads every image alike, so the two differ in nothing but
    whether a student position is shown its own place. A P that also read random features of the tokens would differ in
    two things, and how sharp it is would depend on the teacher. s gives P's rows the entropy with which
    cross_attention starts: a flatter P would be a control for blurring instead.
    """

    attention: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        points, width = len(sizes.points), sizes.teacher_width
        queries = torch.randn(points, sizes.student_tokens, width, dtype=torch.float64)
        keys = torch.randn(points, sizes.teacher_tokens, width, dtype=torch.float64)
        logits = queries @ keys.transpose(1, 2) / math.sqrt(width)
        query, key = local_start(sizes)
        scale = entropy_scale(logits, mean_row_entropy(query @ key.T))
        self.register_buffer("attention", (scale * logits).softmax(dim=-1).float().unsqueeze(1))

    def weights(self, tokens: Tensor) -> Tensor:
        """P (M, 1, N_s, N_t), rows sum to 1, the same for every image."""
        return self.attention

    def forward(self, tokens: Tensor) -> Tensor:
        """(M, B, N_t, D) → (M, B, N_s, D)."""
        return self.attention @ tokens
