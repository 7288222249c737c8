"""attn: the share of the teacher's routing information that the student's attention misses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from basd.components.sizes import Sizes


@dataclass
class AttentionLossConfig:
    enabled: bool = False
    # What the divergence is divided by: the teacher's own divergence from uniform, rows·log N, or rows.
    normalize: str = field(
        default="teacher_information", metadata={"choices": ("teacher_information", "log_n", "none")}
    )

    def build(self, sizes: Sizes) -> AttentionLoss:
        return AttentionLoss(self)


# Nats per row under which a teacher map counts as uniform.
UNIFORM = 1e-6


def layer_information(attention: Tensor, uniform: Tensor) -> Tensor:
    """Mean KL of each layer's rows from `uniform`, in nats. attention (L, B, H, Q, K), uniform (Q, K) → (L,).

    `uniform` is a uniform map that was resampled like the teacher's: between unequal grids it is not quite uniform.
    """
    rows = attention[0].numel() // attention.shape[-1]
    divergence = torch.special.xlogy(attention, attention) - attention * uniform.log()
    return divergence.flatten(1).sum(dim=1) / rows


class AttentionLoss(nn.Module):
    """L = Σ KL(A_t‖A_s) / (sg Σ KL(A_t‖uniform) + ε), sums over batch, heads and query rows; mean over points.

    1 for a student that attends everywhere alike, 0 for a match, unbounded above.
    """

    def __init__(self, config: AttentionLossConfig) -> None:
        super().__init__()
        self.normalize = config.normalize

    def forward(self, student_log: Tensor, teacher: Tensor, informative: Tensor | None = None) -> Tensor:
        """student_log: log-probabilities, teacher: probabilities, both (M, B, H_t, Q, K). Returns a scalar.

        informative (M,) bool: the points that count, at least one; all without it.
        """
        rows = teacher[0].numel() // teacher.shape[-1]
        axes = tuple(range(1, teacher.ndim))
        negentropy = torch.special.xlogy(teacher, teacher).sum(dim=axes)
        divergence = (negentropy - (teacher * student_log).sum(dim=axes)).clamp_min(0.0)
        log_keys = math.log(teacher.shape[-1])
        information = (negentropy + rows * log_keys).detach().clamp_min(0.0)
        if self.normalize == "teacher_information":
            share = divergence / (information + 1e-8 * rows)
        elif self.normalize == "log_n":
            share = divergence / (rows * log_keys)
        else:
            share = divergence / rows
        return (share if informative is None else share[informative]).mean()
