"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from the files of the original release, held in memory.

The release has a Python version (pickles) and a binary version; both are read, extracted or still in their .tar.gz.
"""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from basd.data.images import ImageSet, Splits, hold_out
from basd.data.settings import StoredConfig, find_root
from basd.errors import UserError

SIZE = 32  # pixels a side
PIXELS = 3 * SIZE * SIZE


@dataclass
class Cifar10Config(StoredConfig):
    """50,000 images of 32×32 in 10 classes for training and validation, and 10,000 for the test."""

    name: str = "cifar10"
    # 8 % of 32×32 is a 9×9 patch, in which nothing can be told
    crop_scale: list[float] = field(default_factory=lambda: [0.25, 1.0])
    mean: list[float] = field(default_factory=lambda: [0.4914, 0.4822, 0.4465])
    std: list[float] = field(default_factory=lambda: [0.2470, 0.2435, 0.2616])


@dataclass
class Cifar100Config(StoredConfig):
    """50,000 images of 32×32 in 100 classes for training and validation, and 10,000 for the test; fine labels."""

    name: str = "cifar100"
    crop_scale: list[float] = field(default_factory=lambda: [0.25, 1.0])
    mean: list[float] = field(default_factory=lambda: [0.5071, 0.4865, 0.4409])
    std: list[float] = field(default_factory=lambda: [0.2673, 0.2564, 0.2762])


@dataclass(frozen=True)
class _Release:
    """File names of one of the two sets."""

    classes: int
    train: tuple[str, ...]
    test: tuple[str, ...]
    python: str  # folder of the Python version
    binary: str  # folder of the binary version
    label: bytes  # key of the labels in a pickle
    label_bytes: int  # before the pixels of a binary record; the last one counts

    @property
    def archives(self) -> tuple[str, str]:
        kind = "cifar-10" if self.classes == 10 else "cifar-100"
        return f"{kind}-python.tar.gz", f"{kind}-binary.tar.gz"


_RELEASES = {
    "cifar10": _Release(
        classes=10,
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test=("test_batch",),
        python="cifar-10-batches-py",
        binary="cifar-10-batches-bin",
        label=b"labels",
        label_bytes=1,
    ),
    "cifar100": _Release(
        classes=100,
        train=("train",),
        test=("test",),
        python="cifar-100-python",
        binary="cifar-100-binary",
        label=b"fine_labels",
        label_bytes=2,
    ),
}


def load_cifar(config: Any) -> Splits:
    """Training, validation (from the training images, stratified) and the official test images."""
    release = _RELEASES[config.name]
    read, binary = _reader(release, config)
    suffix, parse = (".bin", _binary_records) if binary else ("", _pickled_records)
    parts = []
    for names in (release.train, release.test):
        images, labels = zip(*(parse(*read(name + suffix), release) for name in names), strict=True)
        parts.append(ImageSet(torch.cat(images), torch.cat(labels), release.classes))
    train, test = parts
    rest, validation = hold_out(train.labels, config.validation_share, config.split_seed)
    return Splits(train.subset(rest), train.subset(validation), test)


def _reader(release: _Release, config: Any) -> tuple[Callable[[str], tuple[bytes, str]], bool]:
    """What reads a file of the release by name (its bytes, and how to call it), and whether it is the binary version."""
    python_archive, binary_archive = release.archives
    wanted = f"{release.python}/, {release.binary}/, {python_archive} or {binary_archive}"
    root = find_root(config, wanted)
    for folder in (root / release.python, root / release.binary, root):
        for suffix in ("", ".bin"):
            if folder.is_dir() and (folder / (release.test[0] + suffix)).is_file():
                return partial(_of_folder, folder, config), suffix == ".bin"
    candidates = [root] if root.is_file() else [root / name for name in release.archives]
    found = next((archive for archive in candidates if archive.is_file()), None)
    if found is None:
        raise UserError(f"data.root={config.root} holds no {config.name}; looked for {wanted} in it.")
    files = _of_archive(found, release)
    return partial(_of_files, files, found), f"{release.test[0]}.bin" in files


def _of_folder(folder: Path, config: Any, name: str) -> tuple[bytes, str]:
    path = folder / name
    try:
        return path.read_bytes(), str(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); data={config.name} needs all files of the release: extract it again."
        ) from error


def _of_archive(archive: Path, release: _Release) -> dict[str, bytes]:
    wanted = {name + suffix for name in (*release.train, *release.test) for suffix in ("", ".bin")}
    found = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if name in wanted and member.isfile():
                    file = tar.extractfile(member)
                    assert file is not None
                    found[name] = file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{archive} cannot be read ({error}); download it again.") from error
    return found


def _of_files(files: dict[str, bytes], archive: Path, name: str) -> tuple[bytes, str]:
    if name not in files:
        raise UserError(f"{archive} lacks {name}; download it again.")
    return files[name], f"{archive}:{name}"


class _Restricted(pickle.Unpickler):
    """Loads dictionaries, lists, bytes and NumPy arrays, which is what the release's pickles hold; nothing else is called."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            # the array's class is one of those below
            return np.ndarray(0).__reduce__()[0]
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module == "_codecs" and name == "encode":
            # how Python 3 writes bytes with protocol 2
            return _latin1
        raise pickle.UnpicklingError(f"it would call {module}.{name}")


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it would encode as {encoding}")
    return text.encode("latin1")


def _pickled_records(content: bytes, where: str, release: _Release) -> tuple[Tensor, Tensor]:
    """Images uint8 (n,3,32,32) and labels int64 (n,) of one file of the Python version."""
    try:
        batch = _Restricted(io.BytesIO(content), encoding="bytes").load()
        pixels, labels = batch[b"data"], batch[release.label]
        return _records(np.asarray(pixels), np.asarray(labels), release)
    except Exception as error:
        raise UserError(
            f"{where} is not a file of CIFAR-{release.classes}'s Python version ({_said(error)}); download it again."
        ) from error


def _binary_records(content: bytes, where: str, release: _Release) -> tuple[Tensor, Tensor]:
    """Images uint8 (n,3,32,32) and labels int64 (n,) of one file of the binary version."""
    try:
        rows = np.frombuffer(content, np.uint8).reshape(-1, release.label_bytes + PIXELS)
        return _records(rows[:, release.label_bytes :], rows[:, release.label_bytes - 1], release)
    except ValueError as error:
        raise UserError(
            f"{where} is not a file of CIFAR-{release.classes}'s binary version ({_said(error)}); download it again."
        ) from error


def _records(pixels: np.ndarray, labels: np.ndarray, release: _Release) -> tuple[Tensor, Tensor]:
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != PIXELS or len(pixels) == 0:
        raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, not uint8 (n, {PIXELS})")
    if labels.shape != (len(pixels),) or labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype} {labels.shape} for {len(pixels)} images")
    if labels.min() < 0 or labels.max() >= release.classes:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}, not from 0 to {release.classes - 1}")
    images = torch.from_numpy(pixels.reshape(-1, 3, SIZE, SIZE).copy())
    return images, torch.from_numpy(labels.astype(np.int64))


def _said(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError) or not text else text
