"""Labelled images in memory, the interface that every data set satisfies, and the order of samples."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from basd.errors import UserError


class ImageSource(Protocol):
    """What training needs of a split. A data set on disk satisfies it by decoding in its workers inside `batch`."""

    @property
    def classes(self) -> int: ...

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images uint8 (B,3,H,W), all of one size, and labels int64 (B,), for int64 indices (B,) on the CPU."""
        ...


@dataclass(frozen=True, eq=False)
class ImageSet:
    """A split held in memory: images uint8 (N,3,H,W), labels int64 (N,) in [0, classes)."""

    images: Tensor
    labels: Tensor
    classes: int

    def __len__(self) -> int:
        return self.images.shape[0]

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The images uint8 (B,3,H,W) and labels int64 (B,) at int64 indices (B,)."""
        indices = indices.to(self.images.device)
        return self.images.index_select(0, indices), self.labels.index_select(0, indices)

    def to(self, device: torch.device | str) -> ImageSet:
        """The same split on another device."""
        return ImageSet(self.images.to(device), self.labels.to(device), self.classes)


class Splits(NamedTuple):
    """Three disjoint splits. Selection uses `validation`; `test` is read once, at the end."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet


def fingerprint(splits: Splits) -> str:
    """16 hex digits that name the data: SHA-256 over the shapes and bytes of images and labels of all splits."""
    digest = hashlib.sha256()
    for split in splits:
        for tensor in (split.images, split.labels):
            digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def epoch_order(n: int, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """One epoch of `n` samples: shuffled int64 index tensors of `batch_size` each, an incomplete last one dropped."""
    if batch_size < 1:
        raise UserError(f"The batch size is {batch_size}; set recipe.batch_size to at least 1.")
    if n < batch_size:
        raise UserError(
            f"The training split has {n} images, fewer than one batch of {batch_size}; lower recipe.batch_size."
        )
    order = torch.randperm(n, generator=generator)
    return list(torch.split(order[: n // batch_size * batch_size], batch_size))
