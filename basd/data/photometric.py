"""Photometric augmentation of batches: RandAugment without its geometric operations, 3-Augment, and colour jitter.

Images are float32 (B,3,H,W) in [0,1]. Magnitudes follow timm's `rand-m9-mstd0.5-inc1`: the level, in 0..10, always
increases the strength. All random numbers are drawn on the CPU, in an order and amount fixed by the batch size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from basd.data.part import Part, whole

LEVEL_MAX = 10.0
BLUR_SIGMAS = (0.1, 2.0)  # pixels; the range of 3-Augment's blur
BLUR_REACH = 8  # pixels; 4 standard deviations of the widest blur

# PIL defines the first six by a table of the 256 levels, the other four blend with a degenerate image
TABLE_OPERATIONS = ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd")
BLEND_OPERATIONS = ("Color", "Contrast", "Brightness", "Sharpness")
OPERATIONS = TABLE_OPERATIONS + BLEND_OPERATIONS
_NONE = len(OPERATIONS)  # a sample whose layer was not drawn
_POSTERIZE, _SOLARIZE, _SOLARIZE_ADD = (OPERATIONS.index(name) for name in ("Posterize", "Solarize", "SolarizeAdd"))


def operation_arguments(operation: Tensor, level: Tensor, negate: Tensor) -> Tensor:
    """What each operation takes at its level: bits kept, threshold, addend (all in 256 levels) or blend factor.

    operation: int64, indices into OPERATIONS; level: float64 in 0..10; negate: bool, the side of 1 that a blend factor
    lies on. All of one shape, which is the result's (float64). Operations without an argument get a factor too.
    """
    strength = level / LEVEL_MAX
    bits = (4 - (strength * 4).trunc()).clamp_min(1)  # timm's 0 bits at level 10 would be a black image
    threshold = 256 - (strength * 256).trunc().clamp_max(256)
    addend = (strength * 110).trunc().clamp_max(128)
    factor = (1 + torch.where(negate, -strength, strength) * 0.9).clamp_min(0.1)
    arguments = torch.where(operation == _POSTERIZE, bits, factor)
    arguments = torch.where(operation == _SOLARIZE, threshold, arguments)
    return torch.where(operation == _SOLARIZE_ADD, addend, arguments)


def apply_operations_(images: Tensor, operation: Tensor, arguments: Tensor) -> Tensor:
    """Apply in place to each image (B,3,H,W) its operation (B,) with its argument (B,), both on the CPU.

    Operation 10 leaves an image alone. Images with one operation are worked on together. Table operations see the
    image rounded to 256 levels.
    """
    order = operation.argsort(stable=True)
    counts = torch.bincount(operation, minlength=_NONE + 1)[:_NONE].tolist()
    n_table, n = sum(counts[: len(TABLE_OPERATIONS)]), sum(counts)
    if n == 0:
        return images
    # one transfer each: a copy per operation would stall an accelerator
    index = order[:n].to(images.device)
    values = arguments[order[:n]].to(device=images.device, dtype=torch.float32).view(-1, 1, 1, 1)
    chosen = images.index_select(0, index)
    levels = chosen[:n_table].mul(255).round_().to(torch.uint8)
    start = 0
    for name, count in zip(OPERATIONS, counts, strict=True):
        rows = slice(start, start + count)
        start += count
        if count and name in TABLE_OPERATIONS:
            levels[rows] = _table_operation(name, levels[rows], values[rows])
        elif count:
            x = chosen[rows]
            x.lerp_(_degenerate(name, x), 1 - values[rows]).clamp_(0, 1)
    chosen[:n_table] = levels.to(images.dtype).div_(255)
    return images.index_copy_(0, index, chosen)


def _table_operation(name: str, levels: Tensor, value: Tensor) -> Tensor:
    """One table operation on levels uint8 (n,3,H,W), with its argument (n,1,1,1)."""
    # its import takes a second, also where no image is looked at
    from torchvision.transforms.v2 import functional as TF

    if name == "AutoContrast":
        result: Tensor = TF.autocontrast(levels)
        return result
    if name == "Equalize":
        result = TF.equalize(levels)
        return result
    if name == "Invert":
        return 255 - levels
    value = value.to(torch.int16)  # the threshold 256 does not fit a byte
    if name == "Posterize":
        return levels & (256 - (1 << (8 - value))).to(torch.uint8)
    if name == "Solarize":
        return torch.where(levels < value, levels, 255 - levels)
    assert name == "SolarizeAdd", name
    return torch.where(levels < 128, (levels.to(torch.int16) + value).clamp_max(255).to(torch.uint8), levels)


def _degenerate(name: str, x: Tensor) -> Tensor:
    """The image that a blend operation moves away from as its factor grows; broadcasts with x (n,3,H,W)."""
    if name == "Color":
        return grey(x)
    if name == "Contrast":
        return grey(x).mean(dim=(-2, -1), keepdim=True)
    if name == "Brightness":
        return torch.zeros_like(x)
    assert name == "Sharpness", name
    # PIL's smoothing filter [[1,1,1],[1,5,1],[1,1,1]]/13, which leaves the border alone; sums beat pooling on a CPU
    smooth = x.clone()
    inner = smooth[..., 1:-1, 1:-1]
    across = x[..., :-2] + x[..., 1:-1] + x[..., 2:]
    around = across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :]
    inner.mul_(4 / 13).add_(around, alpha=1 / 13)
    return smooth


def grey(x: Tensor) -> Tensor:
    """Luma (B,1,H,W) of (B,3,H,W), weighted as PIL's mode L."""
    red, green, blue = torch.split(x, 1, dim=1)
    luma: Tensor = red.mul(0.299).add_(green, alpha=0.587).add_(blue, alpha=0.114)
    return luma


def rand_augment(
    images: Tensor,
    num_ops: int,
    magnitude: float,
    magnitude_std: float,
    op_probability: float,
    generator: torch.Generator,
    part: Part | None = None,
) -> Tensor:
    """`num_ops` operations in a row per image (with replacement), each done with `op_probability`.

    The level is normal around `magnitude`, cut to 0..10. images: (B,3,H,W) in [0,1], returned likewise; where they are
    `part` of a batch, the same as there.
    """
    operation, level, negate = draw_operations(
        len(OPERATIONS), num_ops, part or whole(images), magnitude, magnitude_std, op_probability, generator
    )
    arguments = operation_arguments(operation, level, negate)
    images = images.clone()
    for layer in range(num_ops):
        apply_operations_(images, operation[layer], arguments[layer])
    return images


def draw_operations(
    kinds: int,
    layers: int,
    part: Part,
    magnitude: float,
    magnitude_std: float,
    op_probability: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """RandAugment's operations, their levels in 0..10 and whether their sign is turned; each (layers, B).

    Operations are uniform in 0..kinds−1, or `kinds` where none is done. As many numbers are drawn whatever `kinds` is.
    """
    shape = (layers, part.whole)
    operation = torch.randint(kinds, shape, generator=generator)
    done = torch.rand(shape, generator=generator) < op_probability
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    negate = torch.rand(shape, generator=generator) < 0.5
    level = (magnitude + magnitude_std * noise).clamp(0, LEVEL_MAX)
    return part.take(torch.where(done, operation, kinds), 1), part.take(level, 1), part.take(negate, 1)


def three_augment(images: Tensor, generator: torch.Generator, part: Part | None = None) -> Tensor:
    """One of greyscale, solarisation and Gaussian blur per image, each as likely; DeiT III's 3-Augment (2204.07118).

    Solarisation inverts the levels from 128 up. The blur's standard deviation is uniform in 0.1 to 2 pixels whatever
    the image's size. images: (B,3,H,W) in [0,1], returned likewise; where they are `part` of a batch, the same as there.
    """
    part = part or whole(images)
    choice = part.take(torch.randint(3, (part.whole,), generator=generator))
    narrow, wide = BLUR_SIGMAS
    sigma = part.take(narrow + (wide - narrow) * torch.rand(part.whole, generator=generator))
    # greyscale is the blend with factor 0
    operation = torch.tensor([OPERATIONS.index("Color"), _SOLARIZE, _NONE])[choice]
    images = apply_operations_(images.clone(), operation, torch.tensor([0.0, 128.0, 0.0])[choice])
    blurred = (choice == 2).nonzero().flatten()
    if len(blurred) == 0:
        return images
    index = blurred.to(images.device)
    return images.index_copy_(0, index, gaussian_blur(images.index_select(0, index), sigma[blurred]))


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Each image of (B,3,H,W) blurred with its own standard deviation in pixels, sigma (B,) > 0, at most 2.

    Pixels beyond the border have the border's value, as in Pillow.
    """
    offset = torch.arange(-BLUR_REACH, BLUR_REACH + 1, device=images.device)
    weights = torch.exp(-0.5 * (offset / sigma.to(images.device).view(-1, 1)) ** 2)
    weights = (weights / weights.sum(dim=1, keepdim=True)).view(-1, 2 * BLUR_REACH + 1, 1, 1, 1).to(images.dtype)
    height, width = images.shape[-2:]
    # sums of shifted images: a convolution may round to fewer bits on an accelerator
    wide = F.pad(images, (BLUR_REACH, BLUR_REACH, 0, 0), mode="replicate")
    x = torch.zeros_like(images)
    for k in range(2 * BLUR_REACH + 1):
        x.addcmul_(wide[..., k : k + width], weights[:, k])
    tall = F.pad(x, (0, 0, BLUR_REACH, BLUR_REACH), mode="replicate")
    x = torch.zeros_like(images)
    for k in range(2 * BLUR_REACH + 1):
        x.addcmul_(tall[..., k : k + height, :], weights[:, k])
    return x.clamp_(0, 1)


def color_jitter(images: Tensor, strength: float, generator: torch.Generator, part: Part | None = None) -> Tensor:
    """Brightness, contrast and saturation, each by a factor in [1−strength, 1+strength], in an order drawn per image.

    images: (B,3,H,W) in [0,1], returned likewise; where they are `part` of a batch, the same as there. No hue, as in timm's
    default.
    """
    part, batch = part or whole(images), images.shape[0]
    uniform = part.take(torch.rand(part.whole, 3, generator=generator))
    order = part.take(torch.rand(part.whole, 3, generator=generator).argsort(dim=1))
    if strength == 0:
        return images
    low = max(0.0, 1 - strength)
    factor = (low + (1 + strength - low) * uniform).gather(1, order)
    # each step blends with black, the mean grey or the grey image: x ← factor·x + (1−factor)·(a·mean + b·grey)
    weights = torch.stack((factor, (order == 1).float(), (order == 2).float())).to(images.device)
    images = images.clone()
    for step in range(3):
        scale, of_mean, of_grey = weights[:, :, step].reshape(3, batch, 1, 1, 1)
        luma = grey(images)
        reference = luma.mean(dim=(-2, -1), keepdim=True).mul_(of_mean) + luma.mul_(of_grey)
        images.lerp_(reference, 1 - scale).clamp_(0, 1)
    return images
