"""Folders of images, a folder a class: ImageNet-1k as it is usually unpacked, and any other."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from basd.data.disk import DiskImages
from basd.data.images import Splits, hold_out
from basd.data.settings import DecodedConfig, find_root, some
from basd.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# waiting for a file system, not computing
_LISTING_THREADS = 16


@dataclass
class ImageNetConfig(DecodedConfig):
    """ImageNet-1k (Russakovsky et al. 2015): `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`; `val` is the test set."""

    name: str = "imagenet"
    validation_share: float = field(default=0.02, metadata={"min": 0.0, "max": 1.0})


@dataclass
class FolderConfig(DecodedConfig):
    """Any folder with `train/<class>/` and `test/<class>/` or `val/<class>/`, at any depth below the class.

    Where both are there, `val` is the validation split and nothing is taken from `train`.
    """

    name: str = "folder"


class FileStore:
    """Image files below a folder. Names and sizes are kept, nothing stays open."""

    def __init__(self, root: Path, names: list[str], sizes: Tensor) -> None:
        self.root, self.names, self.sizes = root, names, sizes

    def open(self, index: int) -> BinaryIO:
        """The file, to be closed by the caller."""
        return open(self.root / self.names[index], "rb")

    def name(self, index: int) -> str:
        """Its path."""
        return str(self.root / self.names[index])

    def describe(self, digest: Any, indices: Tensor) -> None:
        """Paths below the folder and sizes in bytes."""
        digest.update("\n".join([self.names[i] for i in indices.tolist()]).encode("utf-8", "surrogateescape"))
        digest.update(self.sizes[indices].numpy().tobytes())


class _Listing(NamedTuple):
    """One split's folder: classes in order, files with their sizes, and the class of each."""

    store: FileStore
    labels: Tensor
    classes: tuple[str, ...]


def load_folder(config: Any) -> Splits:
    """Training, validation and test images of a folder; the validation images come from the training ones, by class."""
    root = find_root(config, "train/ and val/, with a folder for each class")
    train_folder = _existing(root, ("train",), config)
    test_folder = _existing(root, ("val", "validation") if config.name == "imagenet" else _TEST, config)
    train, test = _list(train_folder), _list(test_folder)
    _compare(train, test)
    separate = None
    if config.name != "imagenet" and test_folder.name == "test":
        separate = next((root / name for name in ("val", "validation") if (root / name).is_dir()), None)
    if separate is None:
        rest, held_out = hold_out(train.labels, config.validation_share, config.split_seed)
        whole = _images(train, config)
        return Splits(whole.subset(rest), whole.subset(held_out), _images(test, config))
    validation = _list(separate)
    _compare(train, validation)
    return Splits(*(_images(listing, config) for listing in (train, validation, test)))


_TEST = ("test", "val", "validation")


def _existing(root: Path, names: tuple[str, ...], config: Any) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    looked = " or ".join(f"{name}/" for name in names)
    raise UserError(
        f"data.root={config.root} has no {looked} in it; data={config.name} needs train/ and {names[0] if names != ('train',) else 'val'}/, "
        "each with a folder of images for each class."
    )


@lru_cache(maxsize=8)
def _list(folder: Path) -> _Listing:
    """Every image below the class folders, in the order of names; once per process."""
    try:
        classes = sorted(
            entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")
        )
        if not classes:
            raise UserError(
                f"{folder} has no class folders; its images belong into one folder for each class, named alike in all splits."
            )
        with ThreadPoolExecutor(_LISTING_THREADS) as pool:
            found = list(pool.map(lambda name: sorted(_images_below(folder, name)), classes))
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be listed ({error.strerror}); check data.root.") from error
    empty = [name for name, files in zip(classes, found, strict=True) if not files]
    if len(empty) == len(classes):
        raise UserError(
            f"{folder} holds no images; looked for {', '.join(EXTENSIONS)} in {len(classes)} class folders."
        )
    if empty:
        raise UserError(
            f"{len(empty)} class folder{'s' * (len(empty) > 1)} of {folder} hold no image: {some(empty)}; fill or remove them."
        )
    names = [name for files in found for name, _ in files]
    sizes = torch.tensor([size for files in found for _, size in files])
    counts = torch.tensor([len(files) for files in found])
    labels = torch.repeat_interleave(torch.arange(len(classes)), counts)
    return _Listing(FileStore(folder, names, sizes), labels, tuple(classes))


def _images_below(root: Path, below: str) -> list[tuple[str, int]]:
    """(path below `root`, size in bytes) of the images in a folder and its subfolders."""
    found = []
    with os.scandir(root / below) as entries:
        for entry in entries:
            name = f"{below}/{entry.name}"
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found += _images_below(root, name)
            elif entry.name.lower().endswith(EXTENSIONS):
                found.append((name, entry.stat().st_size))
    return found


def _compare(train: _Listing, other: _Listing) -> None:
    """`UserError` unless two splits have the same class folders."""
    if train.classes == other.classes:
        return
    ours, theirs = train.store.root, other.store.root
    differences = [
        f"{len(names)} only in {place.name}/: {some(names)}"
        for place, names in (
            (ours, sorted(set(train.classes) - set(other.classes))),
            (theirs, sorted(set(other.classes) - set(train.classes))),
        )
        if names
    ]
    raise UserError(
        f"the class folders of {ours} and {theirs} differ ({'; '.join(differences)}); both need the same ones."
    )


def _images(listing: _Listing, config: Any) -> DiskImages:
    return DiskImages(
        listing.store,
        torch.arange(len(listing.labels)),
        listing.labels,
        listing.classes,
        crop=config,
        size=config.image_size,
        skip=config.corrupt == "skip",
    )
