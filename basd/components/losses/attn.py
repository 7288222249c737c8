"""attn: the share of the teacher's routing information that the student's attention misses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from basd.components.comparison import MAPS, Comparison
from basd.components.sizes import Sizes
from basd.models.resampling import resample_attention


@dataclass
class AttentionLossConfig:
    enabled: bool = False
    # What the divergence is divided by: the teacher's own divergence from uniform, rows·log N, or rows; or by the number
    # of images only (sum), as Align-to-Distill (arXiv:2403.01479) publishes it.
    normalize: str = field(
        default="teacher_information", metadata={"choices": ("teacher_information", "log_n", "none", "sum")}
    )

    reads: ClassVar[frozenset[str]] = frozenset({MAPS})

    def build(self, sizes: Sizes) -> AttentionLoss:
        return AttentionLoss(self, sizes)


# Nats per row under which a teacher map counts as uniform.
UNIFORM = 1e-6
# Nats per row that are added where information divides.
EPSILON = 1e-8


def layer_information(attention: Tensor, uniform: Tensor) -> Tensor:
    """Mean KL of each layer's rows from `uniform`, in nats. attention (L, B, H, Q, K), uniform (Q, K) → (L,).

    `uniform` is a uniform map that was resampled like the teacher's: between unequal grids it is not quite uniform.
    """
    rows = attention[0].numel() // attention.shape[-1]
    divergence = torch.special.xlogy(attention, attention) - attention * uniform.log()
    return divergence.flatten(1).sum(dim=1) / rows


def flat_information(maps: Tensor) -> Tensor:
    """Σ KL(A‖uniform) of whole maps, in nats. maps (M, B, H, 1, K) → (M,).

    Such maps are nearly uniform; with x = K·A each entry gives x·log x − x + 1 ≥ 0, which loses no digits to a difference
    of large sums, nor to a sum of A that is not quite 1.
    """
    ratio = maps * maps.shape[-1]
    return (torch.special.xlogy(ratio, ratio) - ratio + 1).flatten(1).sum(dim=1) / maps.shape[-1]


class AttentionLoss(nn.Module):
    """L = Σ KL(A_t‖A_s) / (sg Σ KL(A_t‖uniform) + ε), sums over batch, heads and query rows; mean over points.

    1 for a student that attends everywhere alike, 0 for a match, unbounded above. Only `normalize=sum` depends on the
    number of heads and rows.
    """

    def __init__(self, config: AttentionLossConfig, sizes: Sizes) -> None:
        super().__init__()
        self.normalize = config.normalize
        self.sizes = sizes

    def compare(self, comparison: Comparison) -> Tensor | None:
        """The loss of one step; None if the teacher's maps say nothing."""
        aligner: Any = comparison.bridges.head_aligner
        if aligner.all_layers:
            return self._compare_all_layers(*comparison.aligned_maps)
        shares = comparison.alpha.detach()
        layers = comparison.layer_maps
        averaged: bool = aligner.averages_heads
        key = ("information", averaged, self.sizes.student_grid)
        information = comparison.teacher.shared(key, lambda: self._information(layers, averaged))
        # KL is convex: at most this much is in a mixture of the layers' maps
        informative = shares @ information > UNIFORM
        comparison.note({"loss/attn_skipped_points": float((~informative).sum())})
        if not informative.any():
            return None
        return self(*comparison.aligned_maps, informative)

    def _compare_all_layers(self, student_log: Tensor, teacher: Tensor) -> Tensor | None:
        """No mixture and no point to skip: only a denominator that is nothing but ε is refused."""
        if self.normalize == "teacher_information":
            rows = teacher[0].numel() // teacher.shape[-1]
            if not (flat_information(teacher) > EPSILON * rows).all():
                return None
        return self(student_log, teacher)

    def _information(self, maps: Tensor, averaged: bool) -> Tensor:
        """Information of each layer, (L,): of each head's map, or of the mean of the heads where that is compared."""
        tokens = self.sizes.teacher_tokens + 1
        uniform = torch.full((tokens, tokens), 1 / tokens, device=maps.device)
        uniform = resample_attention(uniform, self.sizes.student_grid, self.sizes.teacher_grid)
        return layer_information(maps.mean(dim=2, keepdim=True) if averaged else maps, uniform)

    def forward(self, student_log: Tensor, teacher: Tensor, informative: Tensor | None = None) -> Tensor:
        """student_log: log-probabilities, teacher: probabilities, both (M, B, H, Q, K). Returns a scalar.

        informative (M,) bool: the points that count, at least one; all without it. Q = 1 means one distribution over a
        whole map.
        """
        rows = teacher[0].numel() // teacher.shape[-1]
        axes = tuple(range(1, teacher.ndim))
        log_keys = math.log(teacher.shape[-1])
        flat = teacher.shape[-2] == 1
        if flat:
            # nearly uniform on both sides: the difference of the logarithms keeps its digits, that of the sums does not,
            # and softmaxes over so many entries sum to 1 with an error that has to be taken out
            divergence = (teacher * (teacher.clamp_min(1e-30).log() - student_log)).sum(dim=axes)
            divergence = divergence + (student_log.detach().exp() - teacher.detach()).sum(dim=axes)
        else:
            negentropy = torch.special.xlogy(teacher, teacher).sum(dim=axes)
            divergence = negentropy - (teacher * student_log).sum(dim=axes)
        divergence = divergence.clamp_min(0.0)
        if self.normalize == "teacher_information":
            information = flat_information(teacher) if flat else negentropy + rows * log_keys
            share = divergence / (information.detach().clamp_min(0.0) + EPSILON * rows)
        elif self.normalize == "log_n":
            share = divergence / (rows * log_keys)
        elif self.normalize == "none":
            share = divergence / rows
        else:
            share = divergence / teacher.shape[1]
        return (share if informative is None else share[informative]).mean()
