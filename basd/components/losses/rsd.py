"""rsd: the cross-correlation of student and teacher channels is driven to the identity.

Source: RSD (arXiv:2507.21844), after Barlow Twins (Zbontar et al. 2021, arXiv:2103.03230, eq. 1), here over patch
tokens. κ = 0.01, AAD projector Linear–BN–GELU–Linear on the student's side. As published: `samples=pre_logits`,
`reduction=sum`, weight 0.1; Barlow Twins' own form is `reduction=sum` with κ = 0.0051.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from basd.components.comparison import CLS, FEATURES, TOKENS, Comparison
from basd.components.sizes import Sizes
from basd.distributed import average, world
from basd.errors import UserError

READS = {
    "tokens": frozenset({TOKENS}),
    "cls": frozenset({CLS}),
    "mean_pool": frozenset({TOKENS}),
    "pre_logits": frozenset({FEATURES}),
}


@dataclass
class RSDLossConfig:
    enabled: bool = False
    # What is correlated over the batch: every patch token; or one vector an image, which is the class token, the mean
    # patch token or (at the last layer only, not at the points) the pre-logits feature.
    samples: str = field(default="tokens", metadata={"choices": tuple(READS)})
    # Weight κ of the off-diagonal terms.
    kappa: float = field(default=0.01, metadata={"min": 0.0})
    # Mean that samples are centred by: of their position over the batch, or of all samples. With one vector an image
    # both are the same.
    center: str = field(default="position", metadata={"choices": ("position", "global")})
    # What the cross-correlation is driven to: the identity, or the teacher's own correlation, which leaves no floor.
    target: str = field(default="identity", metadata={"choices": ("identity", "teacher_correlation")})
    # Student channels → teacher channels; none needs equal widths.
    projector: str = field(default="aad", metadata={"choices": ("aad", "linear", "none")})
    # Divided by the number of channels, or not, as published.
    reduction: str = field(default="per_dim", metadata={"choices": ("per_dim", "sum")})

    @property
    def reads(self) -> frozenset[str]:
        return READS[self.samples]

    @property
    def idle(self) -> tuple[str, ...]:
        """Settings without effect beside the others."""
        return () if self.samples == "tokens" else ("center",)

    def build(self, sizes: Sizes) -> RSDLoss:
        return RSDLoss(self, sizes)


def build_projector(kind: str, student_width: int, teacher_width: int) -> nn.Module:
    """Student channels → teacher channels; `UserError` for `none` between unequal widths."""
    if kind == "aad":
        hidden = 2 * teacher_width
        return nn.Sequential(
            nn.Linear(student_width, hidden, bias=False),
            # the projector only ever runs on training batches: running statistics would be dead state
            JoinedBatchNorm(hidden, track_running_stats=False),
            nn.GELU(),
            nn.Linear(hidden, teacher_width, bias=False),
        )
    if kind == "linear":
        return nn.Linear(student_width, teacher_width, bias=False)
    if student_width != teacher_width:
        raise UserError(
            f"losses.rsd.projector=none needs equal widths, but the student's is {student_width} and the teacher's "
            f"{teacher_width}; choose losses.rsd.projector=linear."
        )
    return nn.Identity()


class JoinedBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the batches of all processes, without running statistics; torch's SyncBatchNorm refuses CPUs."""

    def forward(self, input: Tensor) -> Tensor:
        """(n, D) → (n, D)."""
        assert not self.track_running_stats
        if world() == 1:
            return super().forward(input)
        centred = input - average(input.mean(dim=0))[0]
        scale = (average(centred.square().mean(dim=0))[0] + self.eps).rsqrt()
        return centred * (scale * self.weight) + self.bias


class _CentredMoments(torch.autograd.Function):
    """z_tᵀ z_s / n (M, D_t, D_s), mean z_s² (M, D_s) and mean z_t² (M, D_t) of samples (M, B, N, D) less the given means.

    The gradients are products of the centred samples, so their own means over what was centred are zero: none has to flow
    through the means. They are laid out like the samples; those of a transposed product would not be, which makes every
    later pass over them several times slower on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, mean_s: Tensor, mean_t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.places = student.shape[1:3]
        student = (student - mean_s).flatten(1, 2)
        teacher = (teacher - mean_t).flatten(1, 2)
        ctx.save_for_backward(student, teacher)
        product = (teacher.transpose(1, 2) @ student) / student.shape[1]
        return product, student.square().mean(dim=1), teacher.square().mean(dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        product, square_s, square_t = gradients
        student, teacher = ctx.saved_tensors
        count = student.shape[1]

        def gradient(own: Tensor, square: Tensor, other: Tensor, cross: Tensor) -> Tensor:
            from_square = own * (square * (2 / count)).unsqueeze(1)
            return torch.baddbmm(from_square, other, cross, alpha=1 / count).unflatten(1, ctx.places)

        to_student, to_teacher = ctx.needs_input_grad[:2]
        return (
            gradient(student, square_s, teacher, product) if to_student else None,
            gradient(teacher, square_t, student, product.transpose(1, 2)) if to_teacher else None,
            None,
            None,
        )


def cross_correlation(student: Tensor, teacher: Tensor, center: str) -> Tensor:
    """C = z_tᵀ z_s / n of centred, scaled channels. student, teacher: (M, B, N, D). Returns (M, D, D), rows teacher.

    Channels are scaled by 1/√(var + 1e-5), the variance taken over the B·N centred samples. The batch is that of all
    processes.
    """
    axes = (1,) if center == "position" else (1, 2)
    with torch.no_grad():
        mean_s, mean_t = average(student.mean(dim=axes, keepdim=True), teacher.mean(dim=axes, keepdim=True))
    product, variance_s, variance_t = average(*_CentredMoments.apply(student, teacher, mean_s, mean_t))
    scale_s = (variance_s + 1e-5).rsqrt()
    scale_t = (variance_t + 1e-5).rsqrt()
    return product * scale_t.unsqueeze(2) * scale_s.unsqueeze(1)


def correlation_floor(teacher: Tensor, center: str, kappa: float, reduction: str = "per_dim") -> Tensor:
    """κ·Σ_{i≠j} corr_t²/D: what the loss keeps with the identity as target, if the teacher's channels are correlated.

    teacher (M, B, N, D). Mean over points, a scalar; with `reduction=sum` not divided by D.
    """
    correlation = cross_correlation(teacher, teacher, center)
    off = correlation.square().sum(dim=(1, 2)) - correlation.diagonal(dim1=1, dim2=2).square().sum(dim=1)
    return (kappa * off / (correlation.shape[-1] if reduction == "per_dim" else 1)).mean()


class RSDLoss(nn.Module):
    """L = [Σ(1−C_ii)² + κ Σ_{i≠j} C_ij²]/D per point, then the mean over points.

    With `target=teacher_correlation` the teacher's own correlation, detached, takes the place of the identity; with
    `reduction=sum` nothing is divided by D.
    """

    def __init__(self, config: RSDLossConfig, sizes: Sizes) -> None:
        super().__init__()
        self.samples = config.samples
        self.kappa = config.kappa
        self.center = config.center
        self.target = config.target
        self.reduction = config.reduction
        places = 1 if config.samples == "pre_logits" else len(sizes.points)
        self.projectors = nn.ModuleList(
            build_projector(config.projector, sizes.student_width, sizes.teacher_width) for _ in range(places)
        )

    def compare(self, comparison: Comparison) -> Tensor:
        """The loss of one step."""
        student, teacher = self._samples(comparison)
        if comparison.diagnose and self.target == "identity":
            floor = correlation_floor(teacher.detach(), self.center, self.kappa, self.reduction)
            comparison.note({"rsd/floor": floor})
        return self(student, teacher)

    def _samples(self, comparison: Comparison) -> tuple[Tensor, Tensor]:
        """Student (M, B, N, D_s) and teacher (M, B, N, D_t); N = 1 where there is one sample an image."""
        if self.samples == "tokens":
            return comparison.student_tokens, comparison.target
        if self.samples == "cls":
            return comparison.student_cls.unsqueeze(2), comparison.target_cls.unsqueeze(2)
        if self.samples == "mean_pool":
            return comparison.student_tokens.mean(dim=2, keepdim=True), comparison.target.mean(dim=2, keepdim=True)
        return comparison.student_features[None, :, None], comparison.teacher_features[None, :, None]

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """student (M, B, N, D_s) raw samples, teacher (M, B, N, D_t); B·N at least 2. Returns a scalar."""
        shape = student.shape[1:3]
        projected = torch.stack(
            [
                project(tokens.flatten(0, 1)).unflatten(0, shape)
                for project, tokens in zip(self.projectors, student, strict=True)
            ]
        )
        assert projected.shape == teacher.shape, (projected.shape, teacher.shape)
        correlation = cross_correlation(projected, teacher, self.center)
        goal = 1.0
        if self.target == "teacher_correlation":
            correlation = correlation - cross_correlation(teacher, teacher, self.center).detach()
            goal = 0.0
        diagonal = correlation.diagonal(dim1=1, dim2=2)
        on = (goal - diagonal).square().sum(dim=1)
        off = correlation.square().sum(dim=(1, 2)) - diagonal.square().sum(dim=1)
        total = on + self.kappa * off
        return (total / correlation.shape[-1] if self.reduction == "per_dim" else total).mean()
