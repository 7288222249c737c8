"""Scikit-learn's handwritten digits: 1,797 real images of 8×8, shipped with that package, quick to train on."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor

from basd.data.images import ImageSet, Splits, apportion
from basd.data.settings import view_problems
from basd.errors import UserError

CLASSES = 10
VALIDATION_SIZE = 150
TEST_SIZE = 450
NATIVE_SIZE = 8  # pixels a side
NATIVE_MAX = 16  # grey levels run from 0 to 16
MEAN = 0.3126  # of the training split at the default size and split seed
STD = 0.3568
# inside scikit-learn's package: lines of 64 grey levels and a label
FILE = "datasets/data/digits.csv.gz"


@dataclass
class DigitsConfig:
    """Digits upsampled once to `image_size` pixels a side, and the random crop of the training views.

    `crop_scale` is the crop's share of the area, `crop_ratio` its width over height; `mean` and `std` are of the
    training split (default size and split seed), per channel, for images in [0,1].
    """

    name: str = "digits"
    image_size: int = field(default=40, metadata={"min": 8, "max": 512})
    split_seed: int = field(default=0, metadata={"min": 0})
    crop_scale: list[float] = field(default_factory=lambda: [0.8, 1.0])
    crop_ratio: list[float] = field(default_factory=lambda: [0.8, 1.25])
    # digits are not mirror-symmetric
    horizontal_flip: float = field(default=0.0, metadata={"min": 0.0, "max": 1.0})
    mean: list[float] = field(default_factory=lambda: [MEAN, MEAN, MEAN])
    std: list[float] = field(default_factory=lambda: [STD, STD, STD])

    def problems(self) -> list[str]:
        """What is wrong with the lists, one sentence each; empty when all is well."""
        return view_problems(self)


def load_digits_splits(config: DigitsConfig) -> Splits:
    """1,197 training, 150 validation and 450 test images, stratified by class and fixed by `split_seed`."""
    problems = config.problems()
    if problems:
        raise UserError(" ".join(problems))
    native, labels = read_digits()
    images = upsample(native, config.image_size)
    parts = [ImageSet(images[index], labels[index], CLASSES) for index in split_indices(labels, config.split_seed)]
    return Splits(*parts)


def read_digits() -> tuple[Tensor, Tensor]:
    """Grey levels (1797,8,8) and labels (1797), without an import of scikit-learn where its file is found: that takes a second."""
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise UserError("The digits come with scikit-learn, which is missing: pip install scikit-learn.")
    file = Path(package.origin).parent / FILE
    if file.is_file():
        rows = torch.from_numpy(numpy.loadtxt(file, delimiter=","))
        return rows[:, :-1].reshape(-1, NATIVE_SIZE, NATIVE_SIZE), rows[:, -1].long()
    raw = importlib.import_module("sklearn.datasets").load_digits()
    return torch.from_numpy(raw.images), torch.from_numpy(raw.target).long()


def upsample(native: Tensor, size: int) -> Tensor:
    """Grey levels (N,8,8) in 0..16 to uint8 (N,3,size,size), bicubic, clamped, the channel repeated."""
    grey = native.double().unsqueeze(1) * (255 / NATIVE_MAX)
    if size != native.shape[-1]:
        grey = F.interpolate(grey, size=(size, size), mode="bicubic", align_corners=False)
    # level 8 lies exactly between two bytes: the small offset makes it, and so the fingerprint, the same everywhere
    return (grey + 1e-6).clamp(0, 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


def split_indices(labels: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorted indices of the training, validation and test split, each with every class in proportion."""
    generator = torch.Generator().manual_seed(seed)
    members = [torch.nonzero(labels == label).flatten() for label in range(CLASSES)]
    members = [index[torch.randperm(len(index), generator=generator)] for index in members]
    counts = [len(index) for index in members]
    test = apportion(counts, TEST_SIZE)
    validation = apportion(counts, VALIDATION_SIZE)
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
    for index, n_test, n_validation in zip(members, test, validation, strict=True):
        parts[2].append(index[:n_test])
        parts[1].append(index[n_test : n_test + n_validation])
        parts[0].append(index[n_test + n_validation :])
    train_index, validation_index, test_index = (torch.cat(part).sort().values for part in parts)
    return train_index, validation_index, test_index
