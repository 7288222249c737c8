"""rel: directions of the edges between tokens agree.

Source: VRM (arXiv:2502.20760), its unit-difference edges taken here between K pairs of patch tokens of an image, with
weak edges of the teacher pruned.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from basd.components.sizes import Sizes

# Purpose of the random stream that pairs are drawn from.
PAIRS_STREAM = "rel_pairs"


@dataclass
class RelationLossConfig:
    enabled: bool = False
    # Token pairs (i < j) drawn each step, the same for student and teacher.
    num_pairs: int = field(default=128, metadata={"min": 1})
    # Quantile of teacher edge lengths below which an edge has no weight.
    prune: float = field(default=0.1, metadata={"min": 0.0, "max": 0.999})

    def build(self, sizes: Sizes) -> RelationLoss:
        return RelationLoss(self, sizes)


def draw_pairs(tokens: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` different pairs i < j out of N(N−1)/2, as two index tensors."""
    first, second = torch.triu_indices(tokens, tokens, offset=1)
    chosen = torch.randperm(first.numel(), generator=generator)[:count]
    return first[chosen], second[chosen]


def edge_products(a: Tensor, b: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """⟨a_i−a_j, b_i−b_j⟩ of each pair (i, j). a, b (M, B, N, D) → (M, B, K).

    On small grids from the Gram matrix of tokens centred per image, which needs no (M, B, K, D) tensor; where N² is
    large against K, from the differences themselves.
    """
    if a.shape[2] ** 2 > 16 * first.numel():
        difference_a = a.index_select(2, first) - a.index_select(2, second)
        difference_b = b.index_select(2, first) - b.index_select(2, second)
        return (difference_a * difference_b).sum(dim=-1)
    gram = a @ b.transpose(-2, -1)
    tokens = gram.shape[-1]
    flat = gram.flatten(2)
    index = torch.stack(
        [first * tokens + first, second * tokens + second, first * tokens + second, second * tokens + first]
    )
    picked = flat.index_select(2, index.flatten()).unflatten(2, (4, -1))
    return picked[:, :, 0] + picked[:, :, 1] - picked[:, :, 2] - picked[:, :, 3]


def edge_agreement(student: Tensor, teacher: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """⟨e^s, e^t⟩ of unit differences e = (z_i−z_j)/√(‖z_i−z_j‖²+ε²), ε = 1e-3 of the mean edge of the point.

    student, teacher (M, B, N, D) → agreement and the teacher's edge lengths, (M, B, K).
    """
    # edges do not feel a shift; small norms keep the Gram form exact
    student = student - student.mean(dim=2, keepdim=True)
    teacher = teacher - teacher.mean(dim=2, keepdim=True)
    squared_s = edge_products(student, student, first, second).clamp_min(0.0)
    squared_t = edge_products(teacher, teacher, first, second).clamp_min(0.0)
    agreement = edge_products(student, teacher, first, second)
    return agreement * inverse_length(squared_s) * inverse_length(squared_t), squared_t.detach().sqrt()


def inverse_length(squared: Tensor) -> Tensor:
    """1/√(‖edge‖²+ε²), (M, B, K)."""
    epsilon = 1e-3 * squared.detach().sqrt().mean(dim=(1, 2), keepdim=True)
    # the tiny floor keeps the gradient finite where every edge of a point is zero
    return (squared + epsilon.square() + 1e-12).rsqrt()


class RelationLoss(nn.Module):
    """L = Σ w (1−⟨e^s,e^t⟩)/Σ w per point, then the mean over points."""

    def __init__(self, config: RelationLossConfig, sizes: Sizes) -> None:
        super().__init__()
        self.num_pairs = config.num_pairs
        self.prune = config.prune
        self.tokens = sizes.student_tokens

    def forward(self, student: Tensor, teacher: Tensor, generator: torch.Generator) -> Tensor:
        """student, teacher (M, B, N, D) in the teacher's width. Returns a scalar."""
        assert student.shape[2] == teacher.shape[2] == self.tokens, (student.shape, teacher.shape, self.tokens)
        first, second = (index.to(student.device) for index in draw_pairs(self.tokens, self.num_pairs, generator))
        agreement, length = edge_agreement(student, teacher, first, second)
        with torch.no_grad():
            flat = length.flatten(1)
            rank = int(self.prune * flat.shape[1]) + 1
            weight = (length >= flat.kthvalue(rank, dim=1).values[:, None, None]).to(student.dtype)
        return (((1 - agreement) * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2))).mean()
