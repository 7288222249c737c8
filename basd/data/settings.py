"""The settings that data sets have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from basd.errors import UserError

# channel statistics of ImageNet, the ones that timm and torchvision use
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CORRUPT = ("stop", "skip")


def view_problems(config: Any) -> list[str]:
    """What is wrong with the crop and the statistics, one sentence each; empty when all is well."""
    found = []
    if len(config.crop_scale) != 2 or not 0 < config.crop_scale[0] <= config.crop_scale[1] <= 1:
        found.append(f"data.crop_scale must be [low, high] with 0 < low <= high <= 1, not {config.crop_scale}.")
    if len(config.crop_ratio) != 2 or not 0 < config.crop_ratio[0] <= config.crop_ratio[1]:
        found.append(f"data.crop_ratio must be [low, high] with 0 < low <= high, not {config.crop_ratio}.")
    if len(config.mean) != 3:
        found.append(f"data.mean must have 3 values, one a channel, not {config.mean}.")
    if len(config.std) != 3 or min(config.std) <= 0:
        found.append(f"data.std must have 3 positive values, one a channel, not {config.std}.")
    return found


@dataclass
class StoredConfig:
    """What every data set in a folder has.

    `crop_scale` is the training crop's share of the area, `crop_ratio` its width over height; `mean` and `std` are per
    channel, for images in [0,1].
    """

    # The folder that holds the data; where it lies does not change a result.
    root: str | None = field(default=None, metadata={"runtime": True})
    # The part of the training images, class by class, that is kept for validation; the official test or validation split
    # is the test set.
    validation_share: float = field(default=0.1, metadata={"min": 0.0, "max": 1.0})
    split_seed: int = field(default=0, metadata={"min": 0})
    crop_scale: list[float] = field(default_factory=lambda: [0.08, 1.0])
    crop_ratio: list[float] = field(default_factory=lambda: [3 / 4, 4 / 3])
    horizontal_flip: float = field(default=0.5, metadata={"min": 0.0, "max": 1.0})
    # Evaluation sees the central square, of this share of the image's shorter side.
    eval_crop: float = field(default=1.0, metadata={"min": 0.05, "max": 1.0})
    mean: list[float] = field(default_factory=lambda: list(IMAGENET_MEAN))
    std: list[float] = field(default_factory=lambda: list(IMAGENET_STD))

    def problems(self) -> list[str]:
        """What is wrong with the settings, one sentence each; empty when all is well."""
        found = view_problems(self)
        if not 0 < self.validation_share < 1:
            found.append(f"data.validation_share={self.validation_share:g} must lie between 0 and 1, both excluded.")
        return found


@dataclass
class DecodedConfig(StoredConfig):
    """What every data set has whose images are decoded when they are needed, in `runtime.workers` processes."""

    # Pixels a side of the crops that the workers hand over; a model of another size gets them resized.
    image_size: int = field(default=224, metadata={"min": 8, "max": 2048})
    eval_crop: float = field(default=0.875, metadata={"min": 0.05, "max": 1.0})
    # An image that cannot be decoded ends the training (stop), or the next readable one of its split takes its place in
    # training and it is left out of evaluations (skip).
    corrupt: str = field(default="stop", metadata={"choices": CORRUPT, "runtime": True})


def runtime_fields(config: Any) -> set[str]:
    """Names of a configuration's fields that do not change a result."""
    fields = getattr(config, "__dataclass_fields__", {})
    return {name for name, spec in fields.items() if spec.metadata.get("runtime")}


def semantic(config: Any) -> dict[str, Any]:
    """The fields of a configuration that may change a result."""
    outside = runtime_fields(config)
    return {name: value for name, value in dataclasses.asdict(config).items() if name not in outside}


def find_root(config: Any, wanted: str) -> Path:
    """`data.root` as a path. `UserError` where it is not set or not there; `wanted` says what it should hold."""
    if not config.root:
        raise UserError(f"data={config.name} needs data.root=DIR, the folder that holds {wanted}.")
    root = Path(config.root).expanduser()
    if not root.exists():
        raise UserError(f"data.root={config.root} does not exist; set it to the folder that holds {wanted}.")
    return root


def some(names: Sequence[str], most: int = 3) -> str:
    """A few of many names, for people: "a, b, c and 7 more"."""
    names = list(names)
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
