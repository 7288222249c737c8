"""Data sets, views and mixing. Randomness comes only from the generators handed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from basd.data.cifar import Cifar10Config, Cifar100Config, load_cifar
from basd.data.digits import DigitsConfig, load_digits_splits
from basd.data.folder import FolderConfig, ImageNetConfig, load_folder
from basd.data.images import ImageSet, ImageSource, Splits, epoch_order, fingerprint
from basd.data.mixing import MIXINGS
from basd.data.timm_data import TimmConfig, load_timm
from basd.data.views import VIEWS
from basd.errors import UserError

DATASETS: dict[str, type[Any]] = {
    "digits": DigitsConfig,
    "cifar10": Cifar10Config,
    "cifar100": Cifar100Config,
    "imagenet": ImageNetConfig,
    "folder": FolderConfig,
    "timm": TimmConfig,
}
LOADERS: dict[str, Callable[[Any], Splits]] = {
    "digits": load_digits_splits,
    "cifar10": load_cifar,
    "cifar100": load_cifar,
    "imagenet": load_folder,
    "folder": load_folder,
    "timm": load_timm,
}

__all__ = [
    "DATASETS",
    "LOADERS",
    "MIXINGS",
    "VIEWS",
    "ImageSet",
    "ImageSource",
    "Splits",
    "epoch_order",
    "fingerprint",
    "load",
]


def load(config: Any) -> Splits:
    """The three splits of the data set that `config` (one of the DATASETS) describes."""
    loader = LOADERS.get(config.name)
    if loader is None:
        raise UserError(f"There is no data set '{config.name}'; choose one of: {', '.join(sorted(LOADERS))}.")
    return loader(config)
