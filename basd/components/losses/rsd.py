"""rsd: the cross-correlation of student and teacher channels is driven to the identity.

Source: RSD (arXiv:2507.21844), after Barlow Twins (Zbontar et al. 2021, arXiv:2103.03230, eq. 1), here over patch
tokens. κ = 0.01, AAD projector Linear–BN–GELU–Linear on the student's side.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from basd.components.sizes import Sizes


@dataclass
class RSDLossConfig:
    enabled: bool = False
    # Weight κ of the off-diagonal terms.
    kappa: float = field(default=0.01, metadata={"min": 0.0})
    # Mean that samples are centred by: of their position over the batch, or of all samples.
    center: str = field(default="position", metadata={"choices": ("position", "global")})

    def build(self, sizes: Sizes) -> RSDLoss:
        return RSDLoss(self, sizes)


def correlation_floor(teacher: Tensor, center: str, kappa: float) -> Tensor:
    """κ·Σ_{i≠j} corr_t²/D: what the loss keeps, with the identity as target, when the teacher's channels are correlated.

    teacher (M, B, N, D). Mean over points, a scalar.
    """
    correlation = cross_correlation(teacher, teacher, center)
    off = correlation.square().sum(dim=(1, 2)) - correlation.diagonal(dim1=1, dim2=2).square().sum(dim=1)
    return (kappa * off / correlation.shape[-1]).mean()


def cross_correlation(student: Tensor, teacher: Tensor, center: str) -> Tensor:
    """C = z_tᵀ z_s / n of centred, scaled channels. student, teacher: (M, B, N, D). Returns (M, D, D), rows teacher.

    Channels are scaled by 1/√(var + 1e-5), the variance taken over the B·N centred samples.
    """
    axes = (1,) if center == "position" else (1, 2)
    student = (student - student.mean(dim=axes, keepdim=True)).flatten(1, 2)
    teacher = (teacher - teacher.mean(dim=axes, keepdim=True)).flatten(1, 2)
    count = student.shape[1]
    scale_s = (student.square().mean(dim=1) + 1e-5).rsqrt()
    scale_t = (teacher.square().mean(dim=1) + 1e-5).rsqrt()
    return (teacher.transpose(1, 2) @ student) / count * scale_t.unsqueeze(2) * scale_s.unsqueeze(1)


class RSDLoss(nn.Module):
    """L = [Σ(1−C_ii)² + κ Σ_{i≠j} C_ij²]/D per point, then the mean over points."""

    def __init__(self, config: RSDLossConfig, sizes: Sizes) -> None:
        super().__init__()
        self.kappa = config.kappa
        self.center = config.center
        hidden = 2 * sizes.teacher_width
        self.projectors = nn.ModuleList(
            nn.Sequential(
                nn.Linear(sizes.student_width, hidden, bias=False),
                # the projector only ever runs on training batches: running statistics would be dead state
                nn.BatchNorm1d(hidden, track_running_stats=False),
                nn.GELU(),
                nn.Linear(hidden, sizes.teacher_width, bias=False),
            )
            for _ in sizes.points
        )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """student (M, B, N, D_s) raw tokens, teacher (M, B, N, D_t) aligned tokens. Returns a scalar."""
        shape = student.shape[1:3]
        projected = torch.stack(
            [
                project(tokens.flatten(0, 1)).unflatten(0, shape)
                for project, tokens in zip(self.projectors, student, strict=True)
            ]
        )
        correlation = cross_correlation(projected, teacher, self.center)
        diagonal = correlation.diagonal(dim1=1, dim2=2)
        on = (1 - diagonal).square().sum(dim=1)
        off = correlation.square().sum(dim=(1, 2)) - diagonal.square().sum(dim=1)
        return ((on + self.kappa * off) / correlation.shape[-1]).mean()
