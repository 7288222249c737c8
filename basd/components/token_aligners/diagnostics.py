"""What a token aligner does, as numbers: a uniform or constant P, and a collapsed value map, must be visible."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from basd.components.sizes import Sizes
from basd.distributed import average
from basd.models.resampling import row_resampling


@torch.no_grad()
def aligner_diagnostics(
    weights: Tensor, tokens: Tensor, sizes: Sizes, aligned: Tensor | None = None
) -> dict[str, Tensor]:
    """Per point, (M,): weights P (M|1, B|1, N_s, N_t), tokens T (M, B, N_t, D), aligned A (M, B, N_s, D).

    A is the aligner's output; without it P·T, which it is for every aligner without a value map.
    input_variance_share: variance of A between images (at a position) over its total variance. spatial_variance_share:
    variance of A across positions of an image over that of area-overlap resampling of T (a uniform P gives 0).
    row_entropy: entropy of P's rows over log N_t. effective_rank: exp of the entropy of the normalised singular values
    of the batch-mean P (Roy & Vetterli 2007), between 1 and N_s.
    """
    points = tokens.shape[0]
    weights = weights.float().expand(points, -1, -1, -1)
    aligned = weights @ tokens.float() if aligned is None else aligned.float()
    area = row_resampling(sizes.student_grid, sizes.teacher_grid).to(tokens.device) @ tokens.float()
    overall, position = average(aligned.mean(dim=(1, 2), keepdim=True), aligned.mean(dim=1, keepdim=True))
    total = (aligned - overall).square().mean(dim=(1, 2, 3))
    between = (aligned - position).square().mean(dim=(1, 2, 3))
    across = (aligned - aligned.mean(dim=2, keepdim=True)).square().mean(dim=(1, 2, 3))
    reference = (area - area.mean(dim=2, keepdim=True)).square().mean(dim=(1, 2, 3))
    entropy = -torch.special.xlogy(weights, weights).sum(dim=-1).mean(dim=(1, 2)) / math.log(max(2, weights.shape[-1]))
    total, between, across, reference, entropy, mean_weights = average(
        total, between, across, reference, entropy, weights.mean(dim=1)
    )
    singular = torch.linalg.svdvals(mean_weights)
    share = singular / singular.sum(dim=-1, keepdim=True)
    rank = torch.exp(-torch.special.xlogy(share, share).sum(dim=-1))
    return {
        "input_variance_share": between / total.clamp_min(1e-12),
        "spatial_variance_share": across / reference.clamp_min(1e-12),
        "row_entropy": entropy,
        "effective_rank": rank,
    }
