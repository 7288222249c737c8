"""VRM: edges between predictions on real and virtual views, as published; `losses.rel.vertices=logits`.

Source: VRM (arXiv:2502.20760). Vertices are the logits of a batch under two views: real (the clean view) and virtual (the
student's strong view). Its loss weights, Huber's δ and the pruning threshold are not established: they are settings
(`inter_sample_weight`, `inter_class_weight`, `huber_delta`, `prune`), whose defaults are not the paper's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basd.components.comparison import Comparison
from basd.distributed import all_reduce_sum, join_rows, rank, world

# Huber's δ where none is set.
DEFAULT_DELTA = 1.0
# Numbers in the edges of one block of real vertices; bounds what is held for a moment.
BLOCK = 2**24


def inverse_length(squared: Tensor, mean: Tensor) -> Tensor:
    """1/√(‖edge‖²+ε²), ε = 1e-3 of the mean edge length; `mean` broadcasts to `squared`."""
    # the tiny floor keeps the gradient finite where every edge is zero
    return (squared + (1e-3 * mean).square() + 1e-12).rsqrt()


def unit_edges(real: Tensor, virtual: Tensor, mean: Tensor) -> Tensor:
    """Unit differences from each of R real vertices (R, F) to each of V virtual ones (V, F), (R, V, F).

    mean: the mean edge length, a scalar. A vertex that is the same in both views has the edge 0.
    """
    edges = real.unsqueeze(1) - virtual.unsqueeze(0)
    return edges * inverse_length(edges.square().sum(dim=-1, keepdim=True), mean)


def edge_loss(
    real_student: Tensor,
    virtual_student: Tensor,
    real_teacher: Tensor,
    virtual_teacher: Tensor,
    delta: float,
    weight: Tensor | None = None,
) -> Tensor:
    """Huber distance of the student's and the teacher's unit edges, summed over components, mean over edges.

    All are (V, F) vertices; weight (V, V) of real × virtual, 1 without it. Returns a scalar. Edges within one view are not
    there. For the backward pass three tensors of V²·F numbers are kept. Several processes are given the same vertices, and
    each takes the edges of its part of the real ones.
    """
    with torch.no_grad():
        mean_s = torch.cdist(real_student, virtual_student).mean()
        mean_t = torch.cdist(real_teacher, virtual_teacher).mean()
    if weight is None:
        weight = real_student.new_ones(len(real_student), len(virtual_student))
    total = real_student.new_zeros(())
    rows = max(1, BLOCK // virtual_student.numel())
    own = (part[rank() :: world()].split(rows) for part in (real_student, real_teacher, weight))
    for real_s, real_t, weights in zip(*own, strict=True):
        edges_s = unit_edges(real_s, virtual_student, mean_s)
        edges_t = unit_edges(real_t, virtual_teacher, mean_t)
        distance = F.huber_loss(edges_s, edges_t, reduction="none", delta=delta).sum(dim=-1)
        total = total + (distance * weights).sum()
    return all_reduce_sum(total) / weight.sum()


@torch.no_grad()
def reliable(real: Tensor, virtual: Tensor, prune: float) -> Tensor:
    """1 for the edges that count, 0 for the share `prune` of highest joint entropy, (B, B).

    real, virtual: the teacher's logits (B, C). The joint distribution of an edge's ends is the outer product of their
    predictions, whose entropy is the sum of both entropies.
    """
    entropy = joint_entropy(real, virtual)
    rank = entropy.numel() - int(prune * entropy.numel())
    return (entropy <= entropy.flatten().kthvalue(rank).values).to(real.dtype)


def joint_entropy(real: Tensor, virtual: Tensor) -> Tensor:
    """H(p_i) + H(p_j) of real i and virtual j, in nats. Logits (B, C) → (B, B)."""
    entropies = []
    for logits in (real, virtual):
        log = logits.log_softmax(dim=-1)
        entropies.append(-(log.exp() * log).sum(dim=-1))
    return entropies[0].unsqueeze(1) + entropies[1].unsqueeze(0)


class VRMLoss(nn.Module):
    """L = α·Huber(inter-sample edges) + β·Huber(inter-class edges), each about 1 for unrelated logits and 0 for a match.

    Inter-sample: the B images are the vertices, in the space of the C classes; unreliable edges (`prune`) have no weight.
    Inter-class: the classes are the vertices, in the space of the B images; none is pruned. Cost: (B²·C + C²·B) numbers per
    kept tensor, three of them: 3.9 GB at B = 256, C = 1000, nearly all of it for the classes. With several processes B is
    the whole batch, whose logits each of them gathers; the edges are shared out.
    """

    def __init__(
        self, prune: float, huber_delta: float | None, inter_sample_weight: float, inter_class_weight: float
    ) -> None:
        super().__init__()
        self.prune = prune
        self.delta = DEFAULT_DELTA if huber_delta is None else huber_delta
        self.inter_sample_weight = inter_sample_weight
        self.inter_class_weight = inter_class_weight

    def compare(self, comparison: Comparison) -> Tensor:
        """The loss of one step."""
        return self(
            comparison.real_student_logits,
            comparison.student_logits,
            comparison.teacher_logits,
            comparison.virtual_teacher_logits,
        )

    def forward(
        self, real_student: Tensor, virtual_student: Tensor, real_teacher: Tensor, virtual_teacher: Tensor
    ) -> Tensor:
        """Logits (B, C). Returns a scalar."""
        shapes = {x.shape for x in (real_student, virtual_student, real_teacher, virtual_teacher)}
        assert len(shapes) == 1, shapes
        real_student, virtual_student = join_rows(real_student), join_rows(virtual_student)
        real_teacher, virtual_teacher = join_rows(real_teacher), join_rows(virtual_teacher)
        logits = (real_student, virtual_student, real_teacher, virtual_teacher)
        loss = real_student.new_zeros(())
        if self.inter_sample_weight > 0:
            weight = reliable(real_teacher, virtual_teacher, self.prune)
            loss = loss + self.inter_sample_weight * edge_loss(*logits, self.delta, weight)
        if self.inter_class_weight > 0:
            real_s, virtual_s, real_t, virtual_t = (x.T for x in logits)
            loss = loss + self.inter_class_weight * edge_loss(real_s, virtual_s, real_t, virtual_t, self.delta)
        return loss
