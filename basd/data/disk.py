"""Images that lie encoded on disk and are decoded and cropped when they are needed, by whichever process does it.

Pillow decodes; EXIF orientation is ignored, as ImageNet's trainers do. What is random comes with the job, so a crop is the
same bytes in any process.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from basd.data.views import CropDraws, CropSettings, place_crops
from basd.errors import UserError

# As Image.thumbnail: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size where the crop then still has twice the pixels
# that are asked for; the result is hardly told from that of the full size.
REDUCING_GAP = 2.0
# So many unreadable images in a row are no accident.
MOST_SKIPPED = 100


class Store(Protocol):
    """Encoded images, numbered from 0."""

    def open(self, index: int) -> BinaryIO | Image.Image:
        """The encoded image, to be closed by the caller, or a decoded one."""
        ...

    def name(self, index: int) -> str:
        """What people call it: its path."""
        ...

    def describe(self, digest: Any, indices: Tensor) -> None:
        """Feed names and sizes in bytes of some images to a hash."""
        ...


class CropJob(NamedTuple):
    """Random crops of some images, and with `own` a second crop of each (`views.geometry=independent`)."""

    indices: Tensor  # int64 (n,)
    draws: CropDraws
    own: CropDraws | None


class CentreJob(NamedTuple):
    """The central squares of some images at `size` pixels; `share`: side over the image's shorter side."""

    indices: Tensor  # int64 (n,)
    size: int
    share: float


class Answer(NamedTuple):
    """What became of a job."""

    crops: Tensor  # uint8 (n,S,S,3)
    own: Tensor | None  # likewise
    # int64 (n,): which images of the split were read; another than asked for, or −1 (then black), where one is unreadable
    read: Tensor
    # unreadable images with the reason
    unreadable: tuple[str, ...]


class _UnreadableError(Exception):
    """An image that cannot be decoded."""


@dataclass(frozen=True, eq=False)
class DiskImages:
    """A split whose images are decoded when they are needed: rows `index` (N,) of a store, labels int64 (N,)."""

    store: Store
    index: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    crop: CropSettings
    size: int  # pixels a side of the random crops
    skip: bool = False  # go on without unreadable images
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def classes(self) -> int:
        return len(self.class_names)

    def __len__(self) -> int:
        return len(self.index)

    def subset(self, indices: Tensor) -> DiskImages:
        """The images at int64 indices (n,), in that order."""
        return dataclasses.replace(self, index=self.index[indices], labels=self.labels[indices])

    def to(self, device: torch.device | str) -> DiskImages:
        """The same split, its batches on another device."""
        return dataclasses.replace(self, device=torch.device(device))

    def describe(self, digest: Any) -> None:
        """Classes, labels, names and sizes of the files: not their bytes."""
        digest.update("\n".join(self.class_names).encode(errors="surrogateescape"))
        digest.update(self.labels.numpy().tobytes())
        self.store.describe(digest, self.index)

    def answer(self, job: CropJob | CentreJob) -> Answer:
        """Do a job, in this process. `UserError` where storage fails, or too many images in a row are unreadable."""
        return self._crops(job) if isinstance(job, CropJob) else self._centres(job)

    def _crops(self, job: CropJob) -> Answer:
        crops = torch.empty(len(job.indices), self.size, self.size, 3, dtype=torch.uint8)
        own = torch.empty_like(crops) if job.own is not None else None
        read, unreadable = job.indices.clone(), []
        for row in range(len(job.indices)):
            for _ in range(MOST_SKIPPED):
                try:
                    index = int(read[row])
                    crops[row] = self._random_crop(index, job.draws.take(slice(row, row + 1)))
                    if own is not None and job.own is not None:
                        # decoded again: how coarsely must not depend on which arms train side by side
                        own[row] = self._random_crop(index, job.own.take(slice(row, row + 1)))
                    break
                except _UnreadableError as error:
                    unreadable.append(str(error))
                    # the next one of the split takes its place: whoever decodes, and wherever training goes on
                    read[row] = (int(read[row]) + 1) % len(self)
                    if not self.skip:
                        return Answer(crops, own, read, tuple(unreadable))
            else:
                raise UserError(
                    f"{MOST_SKIPPED} images in a row cannot be decoded, the last of them {unreadable[-1]}; check the data."
                )
        return Answer(crops, own, read, tuple(unreadable))

    def _centres(self, job: CentreJob) -> Answer:
        squares = torch.zeros(len(job.indices), job.size, job.size, 3, dtype=torch.uint8)
        read, unreadable = job.indices.clone(), []
        for row, index in enumerate(job.indices.tolist()):
            try:
                squares[row] = self._centre(index, job.size, job.share)
            except _UnreadableError as error:
                unreadable.append(str(error))
                read[row] = -1
        return Answer(squares, None, read, tuple(unreadable))

    def _random_crop(self, index: int, draws: CropDraws) -> Tensor:
        with _Opened(self.store, int(self.index[index])) as image:
            width, height = image.size
            place = place_crops(draws, height, width, self.crop)
            piece = _cut(image, tuple(place.boxes[0].tolist()), self.size, alone=True)
            return piece.flip(1) if bool(place.flips[0]) else piece

    def _centre(self, index: int, size: int, share: float) -> Tensor:
        with _Opened(self.store, int(self.index[index])) as image:
            width, height = image.size
            side = min(width, height) * share
            return _cut(image, ((height - side) / 2, (width - side) / 2, side, side), size, alone=False)


class _Opened:
    """An image of a store, closed on leaving; what Pillow cannot read raises `_UnreadableError`, failing storage `UserError`."""

    def __init__(self, store: Store, index: int) -> None:
        self.store, self.index = store, index

    def __enter__(self) -> Image.Image:
        self.file: BinaryIO | Image.Image | None = None
        try:
            self.file = self.store.open(self.index)
            return self.file if isinstance(self.file, Image.Image) else Image.open(self.file)
        except (MemoryError, UserError):
            self._close()
            raise
        except Exception as error:
            self._close()
            raise self._translated(error) from error

    def __exit__(self, _kind: Any, error: BaseException | None, _traceback: Any) -> None:
        self._close()
        if isinstance(error, Exception) and not isinstance(error, MemoryError | UserError):
            raise self._translated(error) from error

    def _close(self) -> None:
        if self.file is not None:
            self.file.close()

    def _translated(self, error: Exception) -> Exception:
        text = " ".join(str(error).split())
        if isinstance(error, OSError) and error.errno is not None:
            # the disk's fault or a missing file, not the image's: another image in its place would hide that
            return UserError(
                f"{self.store.name(self.index)} cannot be read ({error.strerror}); check the data's folder."
            )
        reason = "not an image that Pillow knows" if "cannot identify image" in text else text or type(error).__name__
        return _UnreadableError(f"{self.store.name(self.index)} ({reason})")


def _cut(image: Image.Image, box: tuple[float, ...], size: int, *, alone: bool) -> Tensor:
    """A box (y, x, height, width) of an image, resized to uint8 (size,size,3): bilinear, with antialiasing.

    `alone`: without the pixels around the box, as `basd.data.views.crop` and torchvision's random crop; otherwise as the whole
    image resized and then cut, which is how images are evaluated.
    """
    width, height = image.size
    y, x, h, w = box
    if image.format == "JPEG":
        # the box decides how coarsely the whole may be decoded
        wanted = (width * size * REDUCING_GAP / w, height * size * REDUCING_GAP / h)
        image.draft("RGB", (max(1, round(wanted[0])), max(1, round(wanted[1]))))
    pixels = image if image.mode == "RGB" else image.convert("RGB")
    across, down = pixels.size[0] / width, pixels.size[1] / height
    # rounding must not lead beyond the border
    place = (x * across, y * down, min((x + w) * across, pixels.size[0]), min((y + h) * down, pixels.size[1]))
    if alone:
        left, top = math.floor(place[0]), math.floor(place[1])
        pixels = pixels.crop((left, top, math.ceil(place[2]), math.ceil(place[3])))
        place = (place[0] - left, place[1] - top, place[2] - left, place[3] - top)
    return torch.from_numpy(np.array(pixels.resize((size, size), Image.Resampling.BILINEAR, box=place)))


def refuse(unreadable: tuple[str, ...]) -> UserError:
    """What is said with `data.corrupt=stop`."""
    return UserError(f"{unreadable[0]} cannot be decoded; repair or remove it, or set data.corrupt=skip.")
