"""attn: the share of the teacher's routing information that the student's attention misses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from basd.components.comparison import MAPS, Comparison, image_parts
from basd.components.in_parts import sum_in_parts
from basd.components.sizes import Sizes
from basd.distributed import all_reduce_sum, average, world
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


# Nats per row under which a teacher map counts as uniform: what float32 can still tell from a difference of sums.
UNIFORM = 1e-4
# Nats per row that are added where information divides.
EPSILON = 1e-8


def layer_information(attention: Tensor, uniform: Tensor) -> Tensor:
    """How far each layer's rows are from `uniform`, in nats. attention (L, B, H, Q, K), uniform (Q, K) → (L,).

    Half the mean χ² distance Σ (A−U)²/U of a row: what the KL divergence is of rows that are nearly uniform. Of any rows
    the divergence is at most twice that, and both are convex. `uniform` is a uniform map that was resampled like the
    teacher's: between unequal grids it is not quite uniform.
    """
    batch, heads = attention.shape[1:3]
    # Σ A²/U − 1, a few images at a time: without a second copy of the maps, and in the cache of a CPU
    squares = torch.zeros(len(attention), *attention.shape[3:], device=attention.device)
    for start, end in image_parts(attention):
        squares += attention[:, start:end].float().square().sum(dim=(1, 2))
    return ((squares.double() / uniform.double()).sum(dim=(1, 2)) / (batch * heads * uniform.shape[0]) - 1).float() / 2


def flat_information(maps: Tensor) -> Tensor:
    """Σ KL(A‖uniform) of whole maps, in nats. maps (M, B, H, 1, K) → (M,).

    The images are those of one process. Such maps are nearly uniform; with x = K·A each entry gives x·log x − x + 1 ≥ 0,
    which loses no digits to a difference of large sums, nor to a sum of A that is not quite 1.
    """
    ratio = maps * maps.shape[-1]
    return (torch.special.xlogy(ratio, ratio) - ratio + 1).flatten(1).sum(dim=1) / maps.shape[-1]


class AttentionLoss(nn.Module):
    """L = Σ KL(A_t‖A_s) / (sg Σ KL(A_t‖uniform) + ε), sums over all processes' batch, heads and query rows; mean over points.

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
            found = self._compare_all_layers(*aligner(comparison.scores.float(), comparison.target_maps))
            if found is None:
                comparison.note({"loss/attn_skipped_points": float(len(self.sizes.points))})
            return found
        shares = comparison.alpha.detach()
        layers = comparison.layer_maps
        averaged: bool = aligner.averages_heads
        key = ("information", averaged, self.sizes.student_grid)
        information = comparison.teacher.shared(key, lambda: self._information(layers, averaged))
        # it is convex, and the divergence is at most twice it: no more than this is in a mixture of the layers' maps
        informative = 2 * (shares @ information) > UNIFORM
        loss = None
        if informative.any():
            loss, informative = self.of_maps(aligner, comparison.scores, comparison.target_maps, informative)
        comparison.note({"loss/attn_skipped_points": float((~informative).sum())})
        return loss

    def of_maps(self, aligner: Any, scores: Tensor, maps: Tensor, informative: Tensor) -> tuple[Tensor | None, Tensor]:
        """`forward` of what a head aligner makes of scores (M, B, H_s, Q, K) and maps (M, B, H_t, Q, K), some images at a time.

        The student's log-probabilities of all points and images never lie side by side. informative (M,) bool: the points
        that may count; returned with those that do: layers that say something may cancel in a mixture. None if none does.
        """
        parts = image_parts(maps)
        negentropy = torch.zeros(len(maps), device=maps.device)
        for start, end in parts:
            part = maps[:, start:end]
            part = part.mean(dim=2) if aligner.averages_heads else part
            negentropy += torch.special.xlogy(part, part).flatten(1).sum(dim=1)
        heads = 1 if aligner.averages_heads else maps.shape[2]
        rows, images = maps.shape[1] * heads * maps.shape[3], maps.shape[1]
        log_keys = math.log(maps.shape[-1])
        information = all_reduce_sum(negentropy + rows * log_keys)
        informative = informative & (information > UNIFORM * world() * rows)
        if not informative.any():
            return None, informative
        share = informative / (self._unit(information, rows, images, log_keys) * informative.sum())

        def cross_entropy(part_scores: Tensor, part: slice) -> Tensor:
            student_log, teacher = aligner(part_scores.float(), maps[:, part])
            return -(torch.linalg.vecdot(teacher.flatten(1), student_log.flatten(1)) * share).sum()

        divergence = (negentropy * share).sum() + sum_in_parts(cross_entropy, parts, scores, aligner.parameters())
        return all_reduce_sum(divergence).clamp_min(0.0), informative

    def _unit(self, information: Tensor, rows: int, images: int, log_keys: float) -> Tensor:
        """What a point's divergence is divided by, (M,). information (M,): Σ KL(A‖uniform), of all processes' images."""
        if self.normalize == "teacher_information":
            return information.detach().clamp_min(0.0) + EPSILON * world() * rows
        number = {"log_n": rows * log_keys, "none": rows, "sum": images}[self.normalize]
        return torch.full_like(information, world() * number)

    def _compare_all_layers(self, student_log: Tensor, teacher: Tensor) -> Tensor | None:
        """No mixture and no point to skip: only a denominator that is nothing but ε is refused."""
        if self.normalize == "teacher_information":
            rows = world() * (teacher[0].numel() // teacher.shape[-1])
            if not (all_reduce_sum(flat_information(teacher)) > EPSILON * rows).all():
                return None
        return self(student_log, teacher)

    def _information(self, maps: Tensor, averaged: bool) -> Tensor:
        """Information of each layer, (L,): of each head's map, or of the mean of the heads where that is compared."""
        tokens = self.sizes.teacher_tokens + 1
        uniform = torch.full((tokens, tokens), 1 / tokens, device=maps.device)
        uniform = resample_attention(uniform, self.sizes.student_grid, self.sizes.teacher_grid)
        return average(layer_information(maps.mean(dim=2, keepdim=True) if averaged else maps, uniform))[0]

    def forward(self, student_log: Tensor, teacher: Tensor, informative: Tensor | None = None) -> Tensor:
        """student_log: log-probabilities, teacher: probabilities, both (M, B, H, Q, K). Returns a scalar.

        informative (M,) bool: the points that count, at least one; all without it. Q = 1 means one distribution over a
        whole map.
        """
        rows, images = teacher[0].numel() // teacher.shape[-1], teacher.shape[1]
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
        divergence = all_reduce_sum(divergence).clamp_min(0.0)
        information = flat_information(teacher) if flat else negentropy + rows * log_keys
        share = divergence / self._unit(all_reduce_sum(information.detach()), rows, images, log_keys)
        return (share if informative is None else share[informative]).mean()
