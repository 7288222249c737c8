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


class AttentionLoss(nn.Module):
    """L = Σ KL(A_t‖A_s) / (sg Σ KL(A_t‖uniform) + ε), sums over batch, heads and query rows; mean over points.

    1 for a student that attends everywhere alike, 0 for a match, unbounded above. A point whose teacher map is uniform
    (mean information under 1e-6 nats a row) is skipped and counted in `skipped_points`.
    """

    def __init__(self, config: AttentionLossConfig) -> None:
        super().__init__()
        self.normalize = config.normalize
        self.skipped_points = 0

    def forward(self, student_log: Tensor, teacher: Tensor) -> Tensor:
        """student_log: log-probabilities, teacher: probabilities, both (M, B, H_t, Q, K). Returns a scalar."""
        rows = teacher[0].numel() // teacher.shape[-1]
        axes = tuple(range(1, teacher.ndim))
        negentropy = torch.special.xlogy(teacher, teacher).sum(dim=axes)
        divergence = negentropy - (teacher * student_log).sum(dim=axes)
        log_keys = math.log(teacher.shape[-1])
        information = (negentropy + rows * log_keys).detach().clamp_min(0.0)
        informative = information > 1e-6 * rows
        self.skipped_points = int((~informative).sum())
        if self.normalize == "teacher_information":
            share = divergence / (information + 1e-8 * rows)
        elif self.normalize == "log_n":
            share = divergence / (rows * log_keys)
        else:
            share = divergence / rows
        if self.skipped_points == len(share):
            return share.sum() * 0.0
        return share[informative].mean()
