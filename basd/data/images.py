"""Labelled images in memory, the interface that every data set satisfies, splits, and the order of samples."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from basd.errors import UserError


class ImageSource(Protocol):
    """A split: `ImageSet` in memory or `DiskImages` on disk. How its images are read is the business of `basd.data.feed`."""

    @property
    def classes(self) -> int: ...

    @property
    def labels(self) -> Tensor:
        """int64 (N,) in [0, classes)."""
        ...

    def __len__(self) -> int: ...

    def subset(self, indices: Tensor) -> ImageSource:
        """The images at int64 indices (n,), in that order."""
        ...

    def to(self, device: torch.device | str) -> ImageSource:
        """The same split, its batches on another device."""
        ...

    def describe(self, digest: Any) -> None:
        """Feed what names the content to a hash."""
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

    def subset(self, indices: Tensor) -> ImageSet:
        """The images at int64 indices (n,), in that order."""
        return ImageSet(*self.batch(indices), self.classes)

    def describe(self, digest: Any) -> None:
        """Shapes and bytes of images and labels."""
        for tensor in (self.images, self.labels):
            digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())


class Splits(NamedTuple):
    """Three disjoint splits. Selection uses `validation`; `test` is read once, at the end."""

    train: ImageSource
    validation: ImageSource
    test: ImageSource


def fingerprint(splits: Splits) -> str:
    """16 hex digits that name the data: SHA-256 over what each split says of its content.

    In memory: shapes and bytes of images and labels. On disk: names, sizes in bytes, labels and classes, not the bytes of
    the files, which would take as long as an epoch.
    """
    digest = hashlib.sha256()
    for split in splits:
        split.describe(digest)
    return digest.hexdigest()[:16]


def apportion(counts: list[int], total: int) -> list[int]:
    """Whole shares of `total` in proportion to `counts`, by largest remainder, ties to the lower class."""
    whole = sum(counts)
    shares = [count * total // whole for count in counts]
    by_remainder = sorted(range(len(counts)), key=lambda i: (-(counts[i] * total % whole), i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def hold_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted indices of what stays for training and of the validation split, each class in proportion; fixed by `seed`."""
    order = labels.argsort(stable=True)
    members = list(order.split(torch.bincount(labels).tolist()))
    generator = torch.Generator().manual_seed(seed)
    members = [index[torch.randperm(len(index), generator=generator)] for index in members]
    taken = apportion([len(index) for index in members], round(share * len(labels)))
    # no class is left without an image to train on
    taken = [min(n, max(0, len(index) - 1)) for index, n in zip(members, taken, strict=True)]
    validation = torch.cat([index[:n] for index, n in zip(members, taken, strict=True)])
    rest = torch.cat([index[n:] for index, n in zip(members, taken, strict=True)])
    if len(validation) == 0 or len(rest) == 0:
        part = "validation" if len(validation) == 0 else "training"
        raise UserError(
            f"data.validation_share={share:g} of {len(labels)} training images leaves none for {part}; set another share."
        )
    return rest.sort().values, validation.sort().values


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
