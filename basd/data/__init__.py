"""Data sets, views and mixing. Randomness comes only from the generators handed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from basd.data.digits import DigitsConfig, load_digits_splits
from basd.data.images import ImageSet, ImageSource, Splits, epoch_order, fingerprint
from basd.data.mixing import MIXINGS
from basd.data.views import VIEWS
from basd.errors import UserError

DATASETS: dict[str, type[Any]] = {"digits": DigitsConfig}
LOADERS: dict[str, Callable[[Any], Splits]] = {"digits": load_digits_splits}

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
