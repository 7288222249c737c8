"""cross_attention: every student position asks the teacher's tokens where to look."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basd.components.sizes import Sizes
from basd.models.resampling import row_resampling

# Share of the position code in a key, against tokens of unit variance: large enough that the start is local.
POSITION_GAIN = 4.0


@dataclass
class CrossAttentionConfig:
    name: str = "cross_attention"
    # identity: the target is made of the teacher's own tokens; projected: of tokens that a trained map has changed.
    values: str = field(default="identity", metadata={"choices": ("identity", "projected")})
    # Whether the losses train P and the value map (joint) or leave them as they start (detached).
    gradient: str = field(default="joint", metadata={"choices": ("joint", "detached")})
    student_mlp: ClassVar[bool] = False

    def build(self, sizes: Sizes) -> nn.Module:
        return CrossAttentionAligner(self, sizes)


def position_code(grid: tuple[int, int], width: int, cells: int) -> Tensor:
    """sin-cos code of the cell centres of a grid on the unit square, (N, width), float64; unused channels are 0.

    Frequencies run evenly up to one period per two of `cells` cells, so that ⟨code_i, code_j⟩ falls off within about a
    cell, whatever the grid it is read on.
    """
    bands = max(1, width // 4)
    # harmonics further apart than one period of the image would make distant cells look alike
    highest = math.pi * min(cells, 2 * bands)
    frequency = highest * (torch.arange(bands, dtype=torch.float64) + 1) / bands
    rows = (torch.arange(grid[0], dtype=torch.float64) + 0.5) / grid[0]
    columns = (torch.arange(grid[1], dtype=torch.float64) + 0.5) / grid[1]
    y = (rows[:, None] * frequency).repeat_interleave(grid[1], dim=0)
    x = (columns[:, None] * frequency).repeat(grid[0], 1)
    code = torch.cat([y.sin(), y.cos(), x.sin(), x.cos()], dim=1)
    if code.shape[1] > width:
        return code[:, :width]
    return F.pad(code, (0, width - code.shape[1]))


def local_scale(query: Tensor, key: Tensor, target: Tensor) -> float:
    """Factor s for which softmax(s·q kᵀ) lies closest (KL, averaged over rows) to the resampling `target`.

    P stays soft (mean row maximum at most 0.9): on equal grids the closest P is one-hot, which no gradient can move.
    """
    product = query @ key.T
    candidates = torch.logspace(-2, 2, 81, dtype=torch.float64) / product.abs().max().clamp_min(1e-12)
    best, least = float(candidates[0]), math.inf
    for scale in candidates.tolist():
        log_p = (scale * product).log_softmax(dim=1)
        if float(log_p.exp().max(dim=1).values.mean()) > 0.9:
            break
        divergence = float(-(target * log_p).sum(dim=1).mean())
        if divergence < least:
            best, least = scale, divergence
    return best


def local_start(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """Queries (N_s, D_t) and position keys (N_t, D_t), float64: softmax(q kᵀ) lies close to area-overlap resampling."""
    cells = max(*sizes.student_grid, *sizes.teacher_grid)
    key = position_code(sizes.teacher_grid, sizes.teacher_width, cells) * POSITION_GAIN
    query = position_code(sizes.student_grid, sizes.teacher_width, cells)
    scale = local_scale(query, key, row_resampling(sizes.student_grid, sizes.teacher_grid).double())
    return query * scale, key


class CrossAttentionAligner(nn.Module):
    """P = softmax(q_i · W(T_j + position_j)), output P·T: values are the teacher's own tokens; T is a LN0 mixture.

    Learned queries per student position (sin-cos start) and a key map W without bias per point (identity start); P
    starts close to area-overlap resampling. With `values=projected` the output is LN0(P·T·V), V a value map without
    bias per point (identity start): the losses can then make their own target easy, and it collapses.
    """

    position: Tensor

    def __init__(self, config: CrossAttentionConfig, sizes: Sizes) -> None:
        super().__init__()
        self.detached = config.gradient == "detached"
        points, width = len(sizes.points), sizes.teacher_width
        query, key = local_start(sizes)
        self.register_buffer("position", key.float(), persistent=False)
        self.queries = nn.Parameter(query.float().repeat(points, 1, 1))
        self.key_weight = nn.Parameter(torch.eye(width).repeat(points, 1, 1))
        projected = config.values == "projected"
        self.value_weight = nn.Parameter(torch.eye(width).repeat(points, 1, 1)) if projected else None

    def weights(self, tokens: Tensor) -> Tensor:
        """P (M, B, N_s, N_t), rows sum to 1, of layer-normalised mixtures tokens (M, B, N_t, D)."""
        # q·W(t + p) = (q W)·t + (q W)·p: mapping the few queries is cheaper than mapping every key
        queries = self.queries @ self.key_weight
        local = queries @ self.position.T
        return (queries.unsqueeze(1) @ tokens.transpose(-2, -1) + local.unsqueeze(1)).softmax(dim=-1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(M, B, N_t, D) → (M, B, N_s, D)."""
        weights = self.weights(tokens)
        aligned = (weights.detach() if self.detached else weights) @ tokens
        if self.value_weight is None:
            return aligned
        value_weight = self.value_weight.detach() if self.detached else self.value_weight
        # V after P: the student's positions are as a rule fewer than the teacher's
        projected = aligned @ value_weight.unsqueeze(1)
        return F.layer_norm(projected, projected.shape[-1:])
