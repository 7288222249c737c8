"""What every head aligner offers, and the mixing of heads that several share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basd.components.sizes import Sizes

# Which student heads a teacher head is made of: those of its point, or those of all points.
STACKS = ("point", "all")


class HeadAligner(nn.Module):
    """Brings the attention of student and teacher into one shape.

    `forward(scores, maps)` gets the student's pre-softmax scores at the points, (M, B, H_s, Q, K), and the teacher's
    maps, probabilities (M, B, H_t, Q, K), one mixture of layers per point; with `all_layers` they are (L, B, H_t, Q, K),
    every layer by itself. It returns student log-probabilities and teacher probabilities of one shape.
    """

    # compares every teacher layer by itself instead of a mixture of layers
    all_layers: bool = False
    # what is compared is the mean of the heads
    averages_heads: bool = False
    # the attention loss counts decay**epoch
    decay: float = 1.0

    def forward(self, scores: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


def stacks_points(stack: str, sizes: Sizes) -> bool:
    """Whether heads of all points are mixed; with one point both choices are the same."""
    return stack == "all" and len(sizes.points) > 1


def nearest_heads(sizes: Sizes, stacked: bool) -> Tensor:
    """One-hot (M, H_t, inputs): teacher head h and student head ⌊h·H_s/H_t⌋ of the same point.

    inputs: H_s, or M·H_s where the heads of all points are stacked.
    """
    points, heads = len(sizes.points), sizes.student_heads
    nearest = torch.arange(sizes.teacher_heads) * heads // sizes.teacher_heads
    if not stacked:
        return F.one_hot(nearest, heads).float().expand(points, -1, -1)
    return F.one_hot(nearest + heads * torch.arange(points)[:, None], points * heads).float()


def mix_heads(weight: Tensor, maps: Tensor) -> Tensor:
    """A 1×1 convolution over heads. weight (P, H_out, H_in), maps (M, B, H_s, Q, K) → (P, B, H_out, Q, K).

    H_in = H_s: every point mixes its own heads (P = M). H_in = M·H_s: each of P outputs mixes the heads of all points.
    """
    flat = maps.flatten(3)
    if weight.shape[2] == maps.shape[2]:
        mixed = weight.unsqueeze(1) @ flat
    else:
        stacked = flat.transpose(0, 1).flatten(1, 2)
        mixed = (weight.flatten(0, 1) @ stacked).unflatten(1, weight.shape[:2]).transpose(0, 1)
    return mixed.unflatten(3, maps.shape[3:])


def safe_log(probabilities: Tensor) -> Tensor:
    """Logarithm with a finite gradient where a probability has underflowed to 0."""
    return probabilities.clamp_min(1e-30).log()
