"""The views of an image: a clean random crop, the student's strong view of it, and the view for evaluation.

Everything works on whole batches on the images' device. Random parameters are drawn on the CPU from the generator
handed in, in a fixed order and (but for the erasing noise, drawn last) a fixed amount.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from basd.data.geometric import GREY, rand_augment_full
from basd.data.part import Part, whole
from basd.data.photometric import color_jitter, rand_augment, three_augment

CROP_TRIES = 10
STRONG = ("photometric", "randaugment_full", "three_augment")


class CropSettings(Protocol):
    """The fields of a data set's configuration that the random crop reads."""

    crop_scale: list[float]
    crop_ratio: list[float]
    horizontal_flip: float


class StatisticsSettings(CropSettings, Protocol):
    """The crop's fields and the channel statistics."""

    mean: list[float]
    std: list[float]


@dataclass
class DualViewsConfig:
    """Teacher and student see one crop: the teacher clean, the student after strong augmentation.

    `geometry=independent` gives the student a crop of its own. `strong` is what comes before colour jitter and
    erasing. `photometric`: RandAugment without its geometric operations. `randaugment_full`: all of timm's
    `rand-m9-mstd0.5-inc1`, which moves the content of 30.6 % of the student's views (5 operations in 15, done with
    probability ½, twice) away from the teacher's places. `three_augment`: one of greyscale, solarisation and blur
    (DeiT III, arXiv:2204.07118), which erases nothing in the paper: add `views.erasing=0` for its recipe.

    `num_ops`, `magnitude`, `magnitude_std` and `op_probability` are RandAugment's, without effect on `three_augment`;
    `color_jitter` is the half-width of its factors; `erasing` is a probability.
    """

    name: str = "dual"
    geometry: str = field(default="shared", metadata={"choices": ("shared", "independent")})
    strong: str = field(default="photometric", metadata={"choices": STRONG})
    num_ops: int = field(default=2, metadata={"min": 0, "max": 10})
    magnitude: float = field(default=9.0, metadata={"min": 0.0, "max": 10.0})
    magnitude_std: float = field(default=0.5, metadata={"min": 0.0})
    op_probability: float = field(default=0.5, metadata={"min": 0.0, "max": 1.0})
    color_jitter: float = field(default=0.3, metadata={"min": 0.0, "max": 1.0})
    erasing: float = field(default=0.25, metadata={"min": 0.0, "max": 1.0})

    @property
    def idle(self) -> tuple[str, ...]:
        """Settings without effect beside the others."""
        if self.strong == "three_augment":
            return ("num_ops", "magnitude", "magnitude_std", "op_probability")
        if self.num_ops == 0:
            return ("strong", "magnitude", "magnitude_std", "op_probability")
        if self.op_probability == 0:
            return ("strong", "magnitude", "magnitude_std")
        return ()


@dataclass
class SingleViewsConfig:
    """The student sees the teacher's clean view."""

    name: str = "single"


VIEWS: dict[str, type[Any]] = {"dual": DualViewsConfig, "single": SingleViewsConfig}


class Geometry(NamedTuple):
    """Where a view comes from: boxes int64 (B,4) as (y, x, height, width) in pixels, flips bool (B,); on the CPU."""

    boxes: Tensor
    flips: Tensor


class CropDraws(NamedTuple):
    """The random numbers of crops, before the images' sizes are known: float64 in [0,1), on the CPU."""

    tries: Tensor  # (2,B,CROP_TRIES): area and ratio
    places: Tensor  # (3,B): y, x and flip

    def take(self, rows: Tensor | slice) -> CropDraws:
        """Those of some images."""
        return CropDraws(self.tries[:, rows], self.places[:, rows])


def draw_crops(batch: int, generator: torch.Generator) -> CropDraws:
    """What `place_crops` needs for `batch` images."""
    tries = torch.rand(2, batch, CROP_TRIES, generator=generator, dtype=torch.float64)
    return CropDraws(tries, torch.rand(3, batch, generator=generator, dtype=torch.float64))


def draw_geometry(
    batch: int, height: int, width: int, data: CropSettings, generator: torch.Generator, part: Part | None = None
) -> Geometry:
    """RandomResizedCrop's boxes and horizontal flips, with torchvision's distribution; `part`: of a batch's rows."""
    part = part or Part(batch)
    draws = draw_crops(part.whole, generator)
    return place_crops(draws if part.rows is None else draws.take(part.rows), height, width, data)


def place_crops(draws: CropDraws, height: int, width: int, data: CropSettings) -> Geometry:
    """Boxes and flips of images of one size from their random numbers.

    Up to 10 tries per image of an area share uniform in `crop_scale` and a width-to-height ratio log-uniform in
    `crop_ratio`; if none fits, the largest centred box within the ratios.
    """
    area_draw, ratio_draw = draws.tries
    y_draw, x_draw, flip_draw = draws.places
    (low, high), (narrow, wide) = data.crop_scale, data.crop_ratio
    area = height * width * (low + (high - low) * area_draw)
    ratio = torch.exp(math.log(narrow) + (math.log(wide) - math.log(narrow)) * ratio_draw)
    w = (area * ratio).sqrt().round()
    h = (area / ratio).sqrt().round()
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)  # 0 where none fits
    found = fits.any(dim=1)
    centre_h, centre_w = _largest_box(height, width, narrow, wide)
    h = torch.where(found, h.gather(1, first).squeeze(1), centre_h)
    w = torch.where(found, w.gather(1, first).squeeze(1), centre_w)
    y = torch.where(found, (y_draw * (height - h + 1)).floor(), (height - centre_h) // 2)
    x = torch.where(found, (x_draw * (width - w + 1)).floor(), (width - centre_w) // 2)
    return Geometry(torch.stack((y, x, h, w), dim=1).long(), flip_draw < data.horizontal_flip)


def _largest_box(height: int, width: int, narrow: float, wide: float) -> tuple[int, int]:
    """Height and width of torchvision's fallback box."""
    if width / height < narrow:
        return max(1, round(width / narrow)), width
    if width / height > wide:
        return height, max(1, round(height * wide))
    return height, width


def crop(images: Tensor, geometry: Geometry, size: int) -> Tensor:
    """The boxes of images uint8 (B,3,H,W), resized to (B,3,size,size) and flipped; float32 in [0,1].

    Bilinear with antialiasing (the triangle widens when a box shrinks), as torchvision resizes, but not rounded to
    bytes. Written as two products with per-image matrices, so boxes of different sizes go in one batch. Where a box
    already has the size asked for, the pixels come through unchanged.
    """
    batch, channels, height, width = images.shape
    boxes = geometry.boxes.to(device=images.device, dtype=torch.float32)
    rows = _resize_matrix(boxes[:, 0], boxes[:, 2], height, size)
    columns = _resize_matrix(boxes[:, 1], boxes[:, 3], width, size)
    flips = geometry.flips.to(images.device).view(batch, 1, 1)
    columns = torch.where(flips, columns.flip(1), columns)
    # autocast would round pixels to 8 bits of mantissa
    with torch.autocast(images.device.type, enabled=False):
        x = images.to(torch.float32).div_(255).view(batch, channels * height, width)
        x = torch.bmm(x, columns.transpose(1, 2)).view(batch, channels, height, size)
        x = torch.matmul(rows.unsqueeze(1), x)
    return x.clamp_(0, 1)


def _resize_matrix(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """Weights (B,size,pixels) that resize the stretch [start, start+length) of a line of `pixels`; rows sum to 1."""
    start, length = start.view(-1, 1, 1), length.view(-1, 1, 1)
    scale = length / size
    position = torch.arange(pixels, device=start.device, dtype=torch.float32) + 0.5
    target = torch.arange(size, device=start.device, dtype=torch.float32).view(-1, 1) + 0.5
    weights = (1 - (position - (start + target * scale)).abs_() / scale.clamp_min(1)).clamp_min_(0)
    weights = weights * ((position > start) & (position < start + length))
    return weights / weights.sum(dim=-1, keepdim=True)


def clean_view(
    images: Tensor, data: CropSettings, size: int, generator: torch.Generator, part: Part | None = None
) -> tuple[Tensor, Geometry]:
    """A random crop and flip of images uint8 (B,3,H,W): float32 (B,3,size,size) in [0,1], and where it lies.

    `crop(images, geometry, other_size)` gives the same view at another size.
    """
    geometry = draw_geometry(images.shape[0], images.shape[2], images.shape[3], data, generator, part)
    return crop(images, geometry, size), geometry


def resized(crops: Tensor, size: int) -> Tensor:
    """Finished crops uint8 (B,3,S,S) as float32 (B,3,size,size) in [0,1]; exact where S is `size`."""
    return eval_view(crops, size)


def eval_view(images: Tensor, size: int, share: float = 1.0) -> Tensor:
    """The central square of images uint8 (B,3,H,W) as float32 (B,3,size,size) in [0,1]; exact if it has that size.

    `share`: its side over the image's shorter side, which is the same as resizing to size/share and cutting the centre.
    """
    batch, _, height, width = images.shape
    if height == width == size and share == 1:
        return images.to(torch.float32).div_(255)
    side = max(1, round(min(height, width) * share))
    box = torch.tensor([(height - side) // 2, (width - side) // 2, side, side])
    return crop(images, Geometry(box.expand(batch, 4), torch.zeros(batch, dtype=torch.bool)), size)


def strong_view(
    clean: Tensor,
    config: DualViewsConfig,
    generator: torch.Generator,
    fill: Sequence[float] = GREY,
    part: Part | None = None,
) -> Tensor:
    """The augmentation that `config.strong` names, then colour jitter, of (B,3,S,S) in [0,1].

    Only `randaugment_full` moves pixels; `fill`, a colour in [0,1], is what it shows beyond the image. `part`:
    which rows of a batch these are.
    """
    settings = (config.num_ops, config.magnitude, config.magnitude_std, config.op_probability)
    if config.strong == "photometric":
        augmented = rand_augment(clean, *settings, generator, part)
    elif config.strong == "randaugment_full":
        augmented = rand_augment_full(clean, *settings, fill, generator, part)
    else:
        assert config.strong == "three_augment", config.strong
        augmented = three_augment(clean, generator, part)
    return color_jitter(augmented, config.color_jitter, generator, part)


def normalize(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x − mean)/std per channel of (B,3,H,W)."""
    statistics = torch.tensor([mean, std], dtype=x.dtype).to(x.device).view(2, 1, -1, 1, 1)
    return (x - statistics[0]) / statistics[1]


def resize_normalised(
    x: Tensor,
    size: int,
    from_mean: Sequence[float],
    from_std: Sequence[float],
    to_mean: Sequence[float],
    to_std: Sequence[float],
) -> Tensor:
    """A normalised view (B,3,S,S) at another size and in other statistics, (B,3,size,size): what a model with an input
    of its own makes of it.

    Bilinear with antialiasing, as the crops are resized. The statistics are per channel, for images in [0,1]. Where
    size and statistics are the same, x itself.
    """
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    if tuple(from_mean) == tuple(to_mean) and tuple(from_std) == tuple(to_std):
        return x
    # one product and one sum: the image in [0,1] need not be made
    scale = [old / new for old, new in zip(from_std, to_std, strict=True)]
    shift = [(old - new) / std for old, new, std in zip(from_mean, to_mean, to_std, strict=True)]
    factors = torch.tensor([scale, shift], dtype=x.dtype).to(x.device).view(2, 1, -1, 1, 1)
    return x * factors[0] + factors[1]


def random_erasing(
    normalised: Tensor, probability: float, generator: torch.Generator, part: Part | None = None
) -> Tensor:
    """With `probability` per image, a box of (B,3,H,W) filled with standard normal noise, as timm's pixel mode.

    Area share uniform in [0.02, 1/3], height-to-width ratio log-uniform in [0.3, 1/0.3], up to 10 tries of a box
    strictly smaller than the image. Returns a new tensor; where the images are `part` of a batch, the same as there.
    """
    part = part or whole(normalised)
    batch, (channels, height, width) = part.whole, normalised.shape[1:]
    area_draw, ratio_draw = torch.rand(2, batch, CROP_TRIES, generator=generator, dtype=torch.float64)
    done_draw, y_draw, x_draw = torch.rand(3, batch, generator=generator, dtype=torch.float64)
    area = height * width * (0.02 + (1 / 3 - 0.02) * area_draw)
    ratio = torch.exp(math.log(0.3) * (1 - 2 * ratio_draw))
    h = (area * ratio).sqrt().round()
    w = (area / ratio).sqrt().round()
    fits = (h < height) & (w < width)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    done = (done_draw < probability) & fits.any(dim=1)
    h, w = h.gather(1, first).squeeze(1), w.gather(1, first).squeeze(1)
    y = (y_draw * (height - h + 1)).floor()
    x = (x_draw * (width - w + 1)).floor()
    # only the erased pixels need noise: a few per cent of the batch
    pixels = int((h * w)[done].sum()) * channels
    if pixels == 0:
        return normalised.clone()
    noise = torch.randn(pixels, generator=generator)
    if part.rows is not None:
        noise = _own_noise(noise, (h * w).long() * channels, done, part.rows)
        done, y, x, h, w = (part.take(drawn) for drawn in (done, y, x, h, w))
        if not done.any():
            return normalised.clone()
    noise = noise.to(device=normalised.device, dtype=normalised.dtype)
    index = done.nonzero().flatten().to(normalised.device)
    top, left, tall, broad = torch.stack((y, x, h, w))[:, done].to(normalised.device).view(4, -1, 1, 1)
    row = torch.arange(height, device=normalised.device).view(1, -1, 1)
    column = torch.arange(width, device=normalised.device).view(1, 1, -1)
    mask = (row >= top) & (row < top + tall) & (column >= left) & (column < left + broad)
    erased = normalised.index_select(0, index).masked_scatter(mask.unsqueeze(1), noise)
    return normalised.index_copy(0, index, erased)


def _own_noise(noise: Tensor, amounts: Tensor, done: Tensor, rows: Tensor) -> Tensor:
    """What the erased images among `rows` take of the noise of a whole batch, which lies image after image."""
    amounts = torch.where(done, amounts, 0)
    pieces = noise.split(amounts.tolist())
    return torch.cat([pieces[row] for row in rows.tolist()])


OwnCrop = Callable[[torch.Generator], Tensor]


def student_view(
    images: Tensor | OwnCrop,
    clean: Tensor,
    data: StatisticsSettings,
    config: DualViewsConfig | SingleViewsConfig,
    generator: torch.Generator,
    part: Part | None = None,
) -> Tensor:
    """What a student sees before mixing, normalised (B,3,S,S): the clean view, or its strong view with erasing.

    images: uint8 (B,3,H,W), read only for a geometry of the student's own, or what makes the student's own crop,
    (B,3,S,S) in [0,1], from the generator; clean: (B,3,S,S) in [0,1], left as it is. `part`: which rows of a batch.
    """
    if isinstance(config, SingleViewsConfig):
        return normalize(clean, data.mean, data.std)
    if config.geometry == "independent":
        if isinstance(images, Tensor):
            clean, _ = clean_view(images, data, clean.shape[-1], generator, part)
        else:
            clean = images(generator)
    # filled with the mean, as timm's training transform fills: zero for the student
    strong = normalize(strong_view(clean, config, generator, data.mean, part), data.mean, data.std)
    return random_erasing(strong, config.erasing, generator, part)
