"""The teacher's targets follow the student's MixUp or CutMix, on the student's grid.

The partner of image b is image B−1−b (the flipped batch, as in timm's Mixup).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mix_tokens(tokens: Tensor, share: Tensor) -> Tensor:
    """Convex combination of a token map with its partner's. tokens (M, B, N, D), share (N,) of the own image per token."""
    own = share.to(tokens)[:, None]
    return own * tokens + (1 - own) * tokens.flip(1)


def mix_attention(attention: Tensor, share: Tensor, label_share: float, masked: bool) -> Tensor:
    """Attention maps of mixed images. attention (M, B, H, 1+N, 1+N), rows sum to 1, class token first.

    MixUp (`masked=False`): the λ-convex combination. CutMix: a patch query takes the row of the image it shows (partly
    covered: convex by coverage); keys are weighted by how much of them is shown and the row is renormalised; the class
    row is the λ-convex combination of both masked rows; the class key is always kept; a row left without mass keeps its
    unmasked form. share (N,) of the own image per patch, label_share λ. Returns a new tensor; not differentiable.
    """
    if not masked:
        return label_share * attention + (1 - label_share) * attention.flip(1)
    own_keys, own_rows = _weights(share.to(attention), label_share)
    partner_keys, partner_rows = _weights(1 - share.to(attention), 1 - label_share)
    own = _masked_rows(attention, own_keys, own_rows)
    return own.add_(_masked_rows(attention, partner_keys, partner_rows).flip(1))


def _weights(share: Tensor, label_share: float) -> tuple[Tensor, Tensor]:
    """What an image's keys count and its rows, (1+N,) each, class token first; the class key is always kept."""
    keys = F.pad(share, (1, 0), value=1.0)
    return keys, F.pad(share, (1, 0), value=label_share)


def _masked_rows(attention: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
    """Keys weighted, rows renormalised and then weighted; a new tensor."""
    masked = attention * keys
    mass = masked.sum(dim=-1, keepdim=True)
    # the quotient by a tiny mass is noise; such a row keeps its unmasked form
    empty = mass < 1e-12
    masked.mul_(rows[:, None] / mass.masked_fill(empty, 1.0))
    return torch.where(empty, attention * rows[:, None], masked) if empty.any() else masked
