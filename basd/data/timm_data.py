"""Data sets by the names of `timm.data.create_dataset`: `hfds/NAME` (Hugging Face), `wds/NAME` (WebDataset), `torch/NAME`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from PIL import Image
from torch import Tensor

from basd.data.disk import DiskImages, Store
from basd.data.images import Splits, hold_out
from basd.data.settings import DecodedConfig, find_root, some
from basd.data.webdataset import read_shards
from basd.errors import UserError
from basd.hub import no_waiting_offline

INDEXED = ("hfds", "torch", "wds")
STREAMS = ("hfids", "tfds")


@dataclass
class TimmConfig(DecodedConfig):
    """A data set of timm's. `train_split` and `test_split` are its own names of splits; the code that a data set may bring
    along is never run.

    `root`: for `wds/` the folder of the shards; for `hfds/` the cache (default: Hugging Face's); for `torch/` the folder
    that torchvision downloaded to.
    """

    name: str = "timm"
    dataset: str = ""
    train_split: str = "train"
    test_split: str = "validation"

    def problems(self) -> list[str]:
        """What is wrong with the settings, one sentence each; empty when all is well."""
        found = super().problems()
        prefix = self.dataset.partition("/")[0].lower()
        if prefix in STREAMS:
            found.append(
                f"data.dataset={self.dataset} is a stream, whose place in the middle of an epoch cannot be restored; choose one "
                "that can be indexed (hfds/…, wds/… or torch/…)."
            )
        elif prefix not in INDEXED or "/" not in self.dataset:
            found.append(
                f"data.dataset={self.dataset or '(empty)'} must be a name of timm's: hfds/NAME, wds/NAME or torch/NAME; for "
                "a folder of images choose data=folder."
            )
        if self.train_split == self.test_split:
            found.append(
                f"data.train_split and data.test_split are both {self.train_split}; the test needs other images."
            )
        return found


class ReaderStore:
    """Images of one of timm's readers, or of a torchvision data set, by number."""

    def __init__(self, name: str, dataset: Any) -> None:
        self.title = name
        # a reader hands out the encoded image; torchvision's data sets the decoded one
        self.reader = getattr(dataset, "reader", None)
        self.dataset = dataset

    def open(self, index: int) -> BinaryIO | Image.Image:
        """The image, encoded or decoded."""
        item = self.dataset[index] if self.reader is None else self.reader[index]
        return item[0]

    def name(self, index: int) -> str:
        """The data set's name and the image's number."""
        return f"{self.title}[{index}]"

    def describe(self, digest: Any, indices: Tensor) -> None:
        """Name, and numbers of the images."""
        digest.update(f"{self.title}\n{len(self.dataset)}".encode())
        # of Hugging Face's data sets: another revision has another one
        digest.update(str(getattr(getattr(self.reader, "dataset", None), "_fingerprint", "")).encode())
        digest.update(indices.numpy().tobytes())


def load_timm(config: Any) -> Splits:
    """Training, validation (from the training images, stratified) and test images."""
    problems = config.problems()
    if problems:
        raise UserError(" ".join(problems))
    if config.dataset.lower().startswith("torch/"):
        _check_torch_splits(config)
    splits = [_split(config, name) for name in (config.train_split, config.test_split)]
    (train, labels, names), (test, test_labels, test_names) = splits
    if names and test_names and names != test_names:
        differ = sorted(set(names) ^ set(test_names))
        raise UserError(
            f"{config.train_split} and {config.test_split} of {config.dataset} have other classes ({some(differ)}); choose "
            "splits of the same classes."
        )
    classes = names or tuple(str(label) for label in range(int(max(labels.max(), test_labels.max())) + 1))
    for split, found in ((config.train_split, labels), (config.test_split, test_labels)):
        if int(found.min()) < 0 or int(found.max()) >= len(classes):
            raise UserError(
                f"{split} of {config.dataset} has labels from {int(found.min())} to {int(found.max())}, but {len(classes)} "
                "classes; choose a split with labels."
            )
    empty = sorted(set(range(len(classes))) - set(labels.unique().tolist()))
    if empty:
        raise UserError(
            f"{config.train_split} of {config.dataset} has no image of {len(empty)} of its {len(classes)} classes "
            f"({some([classes[i] for i in empty])}); every class needs one."
        )
    rest, held_out = hold_out(labels, config.validation_share, config.split_seed)
    whole = _images(train, labels, classes, config)
    return Splits(whole.subset(rest), whole.subset(held_out), _images(test, test_labels, classes, config))


def _check_torch_splits(config: Any) -> None:
    """timm takes any name but these two for the test images of torchvision's data sets."""
    known = ("train", "training")
    if config.train_split not in known or config.test_split in known:
        raise UserError(
            f"data.train_split={config.train_split} and data.test_split={config.test_split} are not the two splits of "
            f"{config.dataset}; choose data.train_split=train and data.test_split=val."
        )


def _split(config: Any, split: str) -> tuple[Store, Tensor, tuple[str, ...]]:
    """A split's images, labels int64 (N,), and the names of its classes where it knows them."""
    if config.dataset.lower().startswith("wds/"):
        shards = read_shards(find_root(config, "the shards (.tar)"), split)
        return shards.store, shards.labels, ()
    try:
        from timm.data import create_dataset

        with no_waiting_offline():
            dataset = create_dataset(
                config.dataset, root=config.root, split=split, download=False, trust_remote_code=False
            )
        labels = _labels(dataset)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"data.dataset={config.dataset} needs a package that is missing ({error}); install it."
        ) from error
    except Exception as error:
        said = " ".join(str(error).split())
        raise UserError(
            f"data.dataset={config.dataset}, split {split}, cannot be opened ({type(error).__name__}: {said}); check "
            "data.dataset, data.root and the names of the splits."
        ) from error
    return ReaderStore(f"{config.dataset}:{split}", dataset), labels, _class_names(dataset)


def _labels(dataset: Any) -> Tensor:
    """Labels int64 (N,), without decoding an image where the data set lets them be read alone."""
    reader = getattr(dataset, "reader", None)
    if reader is not None and hasattr(reader, "iter_targets"):
        values = list(reader.iter_targets())
    else:
        kept = (getattr(dataset, name, None) for name in ("targets", "labels", "_labels"))
        known = next((found for found in kept if found is not None), None)
        values = list(known) if known is not None else [dataset[i][1] for i in range(len(dataset))]
    if not values or not all(type(value) in (int, bool) or getattr(value, "ndim", 1) == 0 for value in values):
        raise UserError("its labels are not one whole number an image, so it cannot train a classifier.")
    return torch.tensor([int(value) for value in values])


def _class_names(dataset: Any) -> tuple[str, ...]:
    """Names in the order of labels; empty where they are not known."""
    owner = getattr(dataset, "reader", None) or dataset
    numbers = getattr(owner, "class_to_idx", None) or {}
    ordered = sorted(numbers, key=lambda name: numbers[name])
    return tuple(str(name) for name in ordered) if sorted(numbers.values()) == list(range(len(ordered))) else ()


def _images(store: Store, labels: Tensor, classes: tuple[str, ...], config: Any) -> DiskImages:
    return DiskImages(
        store,
        torch.arange(len(labels)),
        labels,
        classes,
        crop=config,
        size=config.image_size,
        skip=config.corrupt == "skip",
    )
