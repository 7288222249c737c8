"""Shift consistency: whether an answer stays when the image moves by less than a patch."""

from __future__ import annotations

import torch
from torch import Tensor

# Shifts are this part of the image's side: 7 of 224 pixels, where a patch of 16 is cut most differently.
PARTS = 32


def shift_offsets(size: int) -> tuple[tuple[int, int], ...]:
    """The shifts (rows, columns) in pixels that are tried on images of `size` pixels a side: down, up, right, left."""
    step = max(1, round(size / PARTS))
    return ((step, 0), (-step, 0), (0, step), (0, -step))


def shifted(images: Tensor, offset: tuple[int, int]) -> Tensor:
    """Images (B, 3, H, W) moved circularly: what leaves on one side comes in on the other, and nothing is lost."""
    return torch.roll(images, offset, dims=(-2, -1))


def shift_consistency(logits: Tensor, moved: Tensor) -> float:
    """Share of (image, shift) pairs whose top-1 class is that of the unmoved image, in [0, 1].

    The "classification consistency" of Zhang (2019, arXiv:1904.11486), P[argmax f(x) = argmax f(shift(x))], between an image
    and each of a fixed list of shifts instead of two random ones. Of labels it knows nothing: a model that always says the same scores 1.

    logits (n, C) of images, moved (n, S, C) of their S shifts.
    """
    same = moved.argmax(dim=-1) == logits.argmax(dim=-1, keepdim=True)
    return float(same.double().mean())
