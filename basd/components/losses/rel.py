"""rel: directions of the edges between tokens agree.

Source: VRM (arXiv:2502.20760), its unit-difference edges taken here between K pairs of patch tokens of an image, with
weak edges of the teacher pruned. `vertices=logits` is the published form (vrm.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basd.components.comparison import PROJECTION, TOKENS, TWO_VIEWS, Comparison
from basd.components.losses.vrm import VRMLoss, inverse_length
from basd.components.sizes import Sizes
from basd.distributed import all_reduce_sum, average, join_rows

# Purpose of the random stream that pairs are drawn from.
PAIRS_STREAM = "rel_pairs"


@dataclass
class RelationLossConfig:
    enabled: bool = False
    # What edges join: patch tokens of an image, images of the batch (means of their tokens), or predictions (VRM as published).
    vertices: str = field(default="tokens", metadata={"choices": ("tokens", "pooled", "logits")})
    # What is compared of a pair: unit difference, difference over the root mean square of all, cosine of centred vertices.
    edge: str = field(default="unit_difference", metadata={"choices": ("unit_difference", "difference", "cosine_gram")})
    # Pairs (i < j) drawn anew each step, the same for student and teacher, or every pair.
    pairs: str = field(default="random", metadata={"choices": ("random", "all")})
    num_pairs: int = field(default=128, metadata={"min": 1})
    # Quantile of teacher edge lengths below which an edge has no weight; for logits the share of edges of highest entropy.
    prune: float = field(default=0.1, metadata={"min": 0.0, "max": 0.999})
    # Huber's δ in the place of the squared difference; null: squared, for logits δ = 1.
    huber_delta: float | None = field(default=None, metadata={"min": 1e-6})
    # Weights α and β of the two kinds of edges of vertices=logits.
    inter_sample_weight: float = field(default=1.0, metadata={"min": 0.0})
    inter_class_weight: float = field(default=1.0, metadata={"min": 0.0})

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({TWO_VIEWS}) if self.vertices == "logits" else frozenset({TOKENS, PROJECTION})

    @property
    def idle(self) -> tuple[str, ...]:
        """Settings without effect beside the others."""
        if self.vertices == "logits":
            pruned = () if self.inter_sample_weight > 0 else ("prune",)
            return ("pairs", "num_pairs", "edge", *pruned)
        return ("inter_sample_weight", "inter_class_weight", *(("num_pairs",) if self.pairs == "all" else ()))

    def build(self, sizes: Sizes) -> RelationLoss | VRMLoss:
        if self.vertices == "logits":
            return VRMLoss(self.prune, self.huber_delta, self.inter_sample_weight, self.inter_class_weight)
        return RelationLoss(self, sizes)


def all_pairs(vertices: int) -> tuple[Tensor, Tensor]:
    """All N(N−1)/2 pairs i < j, as two index tensors."""
    first, second = torch.triu_indices(vertices, vertices, offset=1)
    return first, second


def draw_pairs(vertices: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` different pairs i < j out of N(N−1)/2, as two index tensors."""
    first, second = all_pairs(vertices)
    chosen = torch.randperm(first.numel(), generator=generator)[:count]
    return first[chosen], second[chosen]


def differences(z: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """z_i − z_j of each pair (i, j). z (M, B, N, D) → (M, B, K, D)."""
    if z.device.type == "cpu" or first.numel() > z.shape[2]:
        return z.index_select(2, first) - z.index_select(2, second)
    return differences_by_product(z, first, second)


def differences_by_product(z: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The same as a product with ±1, for few pairs on CUDA: its backward is a product too, not a scattered sum in any order."""
    incidence = z.new_zeros(first.numel(), z.shape[2])
    incidence.scatter_(1, first[:, None], 1.0).scatter_(1, second[:, None], -1.0)
    return incidence @ z


def edge_products(a: Tensor, b: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """⟨a_i−a_j, a_i−a_j⟩, ⟨b_i−b_j, b_i−b_j⟩ and ⟨a_i−a_j, b_i−b_j⟩ of each pair (i, j). a, b (M, B, N, D) → (M, B, K).

    On small grids from Gram matrices of tokens centred per image, which needs no (M, B, K, D) tensor; where N² is large
    against K, from the differences themselves.
    """
    if a.shape[2] ** 2 > 16 * first.numel():
        a, b = differences(a, first, second), differences(b, first, second)
        return a.square().sum(dim=-1), b.square().sum(dim=-1), (a * b).sum(dim=-1)
    a, b = centred(a), centred(b)
    return (
        gram_products(a, a, first, second).clamp_min(0.0),
        gram_products(b, b, first, second).clamp_min(0.0),
        gram_products(a, b, first, second),
    )


def centred(z: Tensor) -> Tensor:
    """Vertices less their mean: edges do not feel a shift, and small norms keep Gram forms exact. (M, B, N, D)."""
    return z - z.mean(dim=2, keepdim=True)


def gram_products(a: Tensor, b: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """⟨a_i−a_j, b_i−b_j⟩ of each pair from the Gram matrix of centred vertices. (M, B, N, D) → (M, B, K)."""
    gram = a @ b.transpose(-2, -1)
    tokens = gram.shape[-1]
    flat = gram.flatten(2)
    index = torch.stack(
        [first * tokens + first, second * tokens + second, first * tokens + second, second * tokens + first]
    )
    picked = flat.index_select(2, index.flatten()).unflatten(2, (4, -1))
    return picked[:, :, 0] + picked[:, :, 1] - picked[:, :, 2] - picked[:, :, 3]


def cosines(z: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Cosine of each pair of centred vertices, 0 with a vertex that is zero. z (M, B, N, D) → (M, B, K)."""
    unit = z * inverse_length_of(z.square().sum(dim=-1)).unsqueeze(-1)
    gram = unit @ unit.transpose(-2, -1)
    return gram.flatten(2).index_select(2, first * gram.shape[-1] + second)


def inverse_length_of(squared: Tensor) -> Tensor:
    """1/√(‖edge‖²+ε²) of (M, B, K) squared lengths, ε = 1e-3 of the mean edge of the point, over all processes."""
    return inverse_length(squared, average(squared.detach().sqrt().mean(dim=(1, 2), keepdim=True))[0])


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Σ w·v/Σ w of each point, over the batches of all processes. (M, B, K) → (M,)."""
    return all_reduce_sum((values * weight).sum(dim=(1, 2))) / all_reduce_sum(weight.sum(dim=(1, 2)))


class RelationLoss(nn.Module):
    """L = Σ w·error/Σ w over pairs and images per point, then the mean over points; w = 0 for pruned edges, else 1.

    error of a pair, by `edge`:
    - unit_difference: 1−⟨e^s,e^t⟩ = ½‖e^s−e^t‖² of unit edges e = (z_i−z_j)/√(‖z_i−z_j‖²+ε²);
    - difference: the same with e = (z_i−z_j)/r, r the root mean square length of the edges that count: L = 1 − correlation;
    - cosine_gram: (c^s−c^t)²/(sg mean (c^t)² + 1e-6), c the cosine of the vertices, centred over the image (pooled: over the
      batch). 1 for a student whose cosines are all 0, about 2 for unrelated ones that are as spread as the teacher's.
    The first two are 1 for unrelated inputs, 0 for a match, and do not feel the scale of either side.
    `huber_delta` takes Huber's function of the components of e^s−e^t, summed, for ½‖e^s−e^t‖² (for cosines, twice Huber's
    function of c^s−c^t): for a large δ the same loss. It needs the differences themselves, M·B·K·D numbers a tensor, where
    the squared forms need M·B·N²: with pairs=all on large grids that is far too much.
    """

    def __init__(self, config: RelationLossConfig, sizes: Sizes) -> None:
        super().__init__()
        self.vertices = config.vertices
        self.edge = config.edge
        self.num_pairs = config.num_pairs if config.pairs == "random" else None
        self.prune = config.prune
        self.delta = config.huber_delta
        self.tokens = sizes.student_tokens

    def compare(self, comparison: Comparison) -> Tensor:
        """The loss of one step."""
        return self(comparison.projected, comparison.target, comparison.generator(PAIRS_STREAM))

    def forward(self, student: Tensor, teacher: Tensor, generator: torch.Generator) -> Tensor:
        """student, teacher (M, B, N, D) in the teacher's width. Returns a scalar."""
        assert student.shape[2] == teacher.shape[2] == self.tokens, (student.shape, teacher.shape, self.tokens)
        if self.vertices == "pooled":
            # one set of vertices, the batch of all processes: (M, 1, B, D)
            student, teacher = (join_rows(tokens.mean(dim=2), dim=1).unsqueeze(1) for tokens in (student, teacher))
        first, second = (index.to(student.device) for index in self._pairs(student.shape[2], generator))
        errors = self._cosine_errors if self.edge == "cosine_gram" else self._edge_errors
        return weighted_mean(*errors(student, teacher, first, second)).mean()

    def _pairs(self, vertices: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return all_pairs(vertices) if self.num_pairs is None else draw_pairs(vertices, self.num_pairs, generator)

    def _edge_errors(self, student: Tensor, teacher: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """½‖e^s−e^t‖² or its Huber form, and the weight of each edge, both (M, B, K)."""
        squared_s, squared_t, agreement = edge_products(student, teacher, first, second)
        weight = self._weight(squared_t)
        if self.delta is None:
            return 1 - agreement * self._scale(squared_s, weight) * self._scale(squared_t, weight), weight
        edges_s = differences(student, first, second) * self._scale(squared_s, weight).unsqueeze(-1)
        edges_t = differences(teacher, first, second) * self._scale(squared_t, weight).unsqueeze(-1)
        return F.huber_loss(edges_s, edges_t, reduction="none", delta=self.delta).sum(dim=-1), weight

    def _cosine_errors(self, student: Tensor, teacher: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """(c^s−c^t)² over the teacher's mean square, or its Huber form, and the weight of each pair, both (M, B, K)."""
        student, teacher = centred(student), centred(teacher)
        weight = self._weight(gram_products(teacher, teacher, first, second).clamp_min(0.0))
        cosines_s, cosines_t = cosines(student, first, second), cosines(teacher, first, second)
        if self.delta is None:
            error = (cosines_s - cosines_t).square()
        else:
            error = 2 * F.huber_loss(cosines_s, cosines_t, reduction="none", delta=self.delta)
        spread = weighted_mean(cosines_t.detach().square(), weight)
        return error / (spread + 1e-6)[:, None, None], weight

    def _scale(self, squared: Tensor, weight: Tensor) -> Tensor:
        """What makes edges of these squared lengths (M, B, K) unit edges, or (M, 1, 1) of unit mean square."""
        if self.edge == "unit_difference":
            return inverse_length_of(squared)
        return (weighted_mean(squared, weight) + 1e-12).rsqrt()[:, None, None]

    @torch.no_grad()
    def _weight(self, squared: Tensor) -> Tensor:
        """0 for edges of the teacher that are shorter than the quantile `prune` of their point, else 1. (M, B, K)."""
        length = squared.sqrt()
        # the quantile is that of all processes; every one has all pooled vertices as it is
        flat = (length if self.vertices == "pooled" else join_rows(length, dim=1)).flatten(1)
        rank = int(self.prune * flat.shape[1]) + 1
        return (length >= flat.kthvalue(rank, dim=1).values[:, None, None]).to(squared.dtype)
