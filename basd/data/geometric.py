"""RandAugment with its whole set of operations: those of `photometric`, and the geometric ones, which move pixels.

Images are float32 (B,3,H,W) in [0,1]. Operations and magnitudes are those of timm's `rand-m9-mstd0.5-inc1` (RandAugment:
arXiv:1909.13719). Interpolation is always bilinear, where timm draws bilinear or bicubic for each image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from basd.data.part import Part, whole
from basd.data.photometric import LEVEL_MAX, OPERATIONS, apply_operations_, draw_operations, operation_arguments

GEOMETRIC_OPERATIONS = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
FULL_OPERATIONS = OPERATIONS + GEOMETRIC_OPERATIONS
GREY = (128 / 255,) * 3  # what timm shows beyond the image when it is told nothing

# at level 10: degrees, pixels sideways per pixel, share of the image's width or height
MAX_ANGLE, MAX_SHEAR, MAX_SHIFT = 30.0, 0.3, 0.45


def affine_matrices(operation: Tensor, level: Tensor, negate: Tensor, height: int, width: int) -> Tensor:
    """Where each pixel of a result comes from: (x, y) of the source = matrix · (x, y, 1) of the result.

    operation: int64 (n,), indices into GEOMETRIC_OPERATIONS; level: float64 (n,) in 0..10; negate: bool (n,), turns the
    sign. Coordinates are in pixels, (0, 0) the image's upper left corner. Returns float64 (n,2,3).
    """
    strength = torch.where(negate, -level, level) / LEVEL_MAX
    rotate, shear_x, shear_y, shift_x, shift_y = ((operation == k) for k in range(len(GEOMETRIC_OPERATIONS)))
    angle = torch.where(rotate, strength * math.radians(MAX_ANGLE), 0.0)
    cos, sin = angle.cos(), angle.sin()
    # anticlockwise on the screen, where y points down, about the image's centre
    x_by_y = torch.where(shear_x, strength * MAX_SHEAR, -sin)
    y_by_x = torch.where(shear_y, strength * MAX_SHEAR, sin)
    centre_x, centre_y = width / 2, height / 2
    dx = torch.where(rotate, centre_x - cos * centre_x + sin * centre_y, 0.0)
    dy = torch.where(rotate, centre_y - sin * centre_x - cos * centre_y, 0.0)
    dx = torch.where(shift_x, strength * MAX_SHIFT * width, dx)
    dy = torch.where(shift_y, strength * MAX_SHIFT * height, dy)
    return torch.stack((cos, x_by_y, dx, y_by_x, cos, dy), dim=-1).view(-1, 2, 3)


def affine(images: Tensor, matrices: Tensor, fill: Sequence[float]) -> Tensor:
    """Each image (n,3,H,W) looked up through its matrix (n,2,3) from `affine_matrices`; bilinear, a new tensor.

    A pixel whose centre comes from outside the image is `fill` (3 values in [0,1]), as in Pillow.
    """
    height, width = images.shape[-2:]
    m = matrices.to(device=images.device, dtype=torch.float32).view(-1, 6, 1, 1)
    x = torch.arange(width, device=images.device, dtype=torch.float32) + 0.5
    y = torch.arange(height, device=images.device, dtype=torch.float32).view(-1, 1) + 0.5
    # no matrix product: autocast would round the coordinates
    source_x = m[:, 0] * x + m[:, 1] * y + m[:, 2]
    source_y = m[:, 3] * x + m[:, 4] * y + m[:, 5]
    inside = (source_x >= 0) & (source_x < width) & (source_y >= 0) & (source_y < height)
    grid = torch.stack((source_x * (2 / width) - 1, source_y * (2 / height) - 1), dim=-1)
    with torch.autocast(images.device.type, enabled=False):
        moved = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
    colour = torch.tensor(fill, dtype=images.dtype).to(images.device).view(1, -1, 1, 1)
    return torch.where(inside.unsqueeze(1), moved, colour)


def rand_augment_full(
    images: Tensor,
    num_ops: int,
    magnitude: float,
    magnitude_std: float,
    op_probability: float,
    fill: Sequence[float],
    generator: torch.Generator,
    part: Part | None = None,
) -> Tensor:
    """`num_ops` of the 15 operations in a row per image (with replacement), each done with `op_probability`.

    The level is normal around `magnitude`, cut to 0..10. images: (B,3,H,W) in [0,1], returned likewise; where
    they are `part` of a batch, the same as there. Draws as many random numbers as `rand_augment`, so what is drawn
    afterwards is the same for both.
    """
    n_photometric, n_all = len(OPERATIONS), len(FULL_OPERATIONS)
    operation, level, negate = draw_operations(
        n_all, num_ops, part or whole(images), magnitude, magnitude_std, op_probability, generator
    )
    arguments = operation_arguments(operation, level, negate)
    height, width = images.shape[-2:]
    images = images.clone()
    for layer in range(num_ops):
        # an image has one operation a layer, so the order of the two kinds does not matter
        apply_operations_(images, operation[layer].clamp_max(n_photometric), arguments[layer])
        moved = ((operation[layer] >= n_photometric) & (operation[layer] < n_all)).nonzero().flatten()
        if len(moved):
            matrices = affine_matrices(
                operation[layer, moved] - n_photometric, level[layer, moved], negate[layer, moved], height, width
            )
            index = moved.to(images.device)
            images.index_copy_(0, index, affine(images.index_select(0, index), matrices, fill))
    return images
