"""logit: the teacher's predictions as targets.

Sources: Hinton et al. 2015 (arXiv:1503.02531) for `kd`; DeiT (Touvron et al. 2021, arXiv:2012.12877, eqs. 2 and 3) for
`deit_soft` and `deit_hard`. The share of the labels, λ or ½, is `objective.ce_weight` and `weighting=fixed`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from basd.components.comparison import LOGITS, Comparison
from basd.components.sizes import Sizes


@dataclass
class LogitLossConfig:
    enabled: bool = False
    # Divergence from the teacher's distribution (kd, deit_soft) or cross-entropy with its decisions (deit_hard). The deit
    # kinds train the distillation head where the student has one.
    kind: str = field(default="kd", metadata={"choices": ("kd", "deit_hard", "deit_soft")})
    # T of the divergence. 4 is usual for kd; DeiT takes 3.
    temperature: float = field(default=4.0, metadata={"min": 1e-3})
    # The divergence is divided by the images (batch) or, as in DeiT's released code, by images times classes (elements).
    reduction: str = field(default="batch", metadata={"choices": ("batch", "elements")})

    reads: ClassVar[frozenset[str]] = frozenset({LOGITS})

    @property
    def idle(self) -> tuple[str, ...]:
        """Settings without effect beside the others."""
        return ("temperature", "reduction") if self.kind == "deit_hard" else ()

    def build(self, sizes: Sizes) -> LogitLoss:
        return LogitLoss(self)


class LogitLoss(nn.Module):
    """kd, deit_soft: T²·Σ p (log p − log q)/B, q = softmax(student/T); deit_hard: −Σ p log q/B with T = 1.

    p is the teacher's softmax(logits/T), or one-hot of its decision, mixed like the labels; the divergence is 0 for q = p.
    """

    def __init__(self, config: LogitLossConfig) -> None:
        super().__init__()
        self.hard = config.kind == "deit_hard"
        self.distillation_head = config.kind != "kd"
        self.temperature = config.temperature
        self.reduction = config.reduction

    def compare(self, comparison: Comparison) -> Tensor:
        """The loss of one step."""
        student = comparison.student.distillation_logits if self.distillation_head else None
        # a student without a distillation token has only the class head
        logits = comparison.student_logits if student is None else student.float()
        teacher = comparison.teacher_decisions() if self.hard else comparison.teacher_probabilities(self.temperature)
        return self(logits, teacher)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """student: logits (B, C); teacher: probabilities (B, C), at the temperature of the loss. Returns a scalar."""
        assert student.shape == teacher.shape, (student.shape, teacher.shape)
        target = teacher.detach()
        if self.hard:
            return -(target * student.log_softmax(dim=-1)).sum(dim=-1).mean()
        log = (student / self.temperature).log_softmax(dim=-1)
        divergence = (torch.special.xlogy(target, target) - target * log).sum().clamp_min(0.0)
        count = len(student) if self.reduction == "batch" else student.numel()
        return self.temperature**2 * divergence / count
