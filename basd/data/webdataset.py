"""WebDataset shards (tar files of `key.jpg` beside `key.cls`) read at any place, by an index of their members.

The readers for streams shuffle in a buffer: where such a stream stands in the middle of an epoch cannot be restored bit for
bit. The shards are plain tar files on a disk here, so an index of (shard, offset, size, label) makes every image reachable.
"""

from __future__ import annotations

import glob
import io
import json
import re
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from basd.errors import UserError

IMAGES = ("jpg", "jpeg", "png", "webp")
INFO_FILES = ("_info.json", "info.json")


class ShardStore:
    """Images within tar files: for each its shard, key, and the bytes that it takes there."""

    def __init__(self, shards: list[Path], shard: Tensor, keys: list[str], offsets: Tensor, sizes: Tensor) -> None:
        self.shards, self.shard, self.keys, self.offsets, self.sizes = shards, shard, keys, offsets, sizes

    def open(self, index: int) -> BinaryIO:
        """The encoded image, in memory."""
        with open(self.shards[int(self.shard[index])], "rb") as file:
            file.seek(int(self.offsets[index]))
            return io.BytesIO(file.read(int(self.sizes[index])))

    def name(self, index: int) -> str:
        """The shard's path and the key."""
        return f"{self.shards[int(self.shard[index])]}:{self.keys[index]}"

    def describe(self, digest: Any, indices: Tensor) -> None:
        """Names of shards, keys, and sizes in bytes."""
        digest.update("\n".join(shard.name for shard in self.shards).encode("utf-8", "surrogateescape"))
        digest.update("\n".join([self.keys[i] for i in indices.tolist()]).encode("utf-8", "surrogateescape"))
        for values in (self.shard, self.sizes):
            digest.update(values[indices].numpy().tobytes())


class Shards(NamedTuple):
    """A split: its images, and their labels int64 (N,)."""

    store: ShardStore
    labels: Tensor


@lru_cache(maxsize=8)
def read_shards(root: Path, split: str) -> Shards:
    """Index the shards of a split: a name in `_info.json`, a pattern such as `name-{0000..0012}.tar`, or part of file names.

    `UserError` where there are none, or a shard cannot be read, or an image has no label. Once per process.
    """
    info = _info(root)
    shards, label_key = _shards_of(root, split, info)
    found: list[tuple[int, str, int, int, int]] = []
    for number, path in enumerate(shards):
        try:
            with tarfile.open(path, "r:") as tar:
                found += [(number, *entry) for entry in _samples(tar, path, label_key)]
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(f"the shard {path} cannot be read ({error}); restore it, or choose others.") from error
    if not found:
        raise UserError(f"the shards of {split} in {root} hold no images ({', '.join(IMAGES)}).")
    shard, keys, offsets, sizes, labels = zip(*found, strict=True)
    store = ShardStore(shards, torch.tensor(shard), list(keys), torch.tensor(offsets), torch.tensor(sizes))
    return Shards(store, torch.tensor(labels))


def _info(root: Path) -> dict[str, Any]:
    for name in INFO_FILES:
        if (root / name).is_file():
            try:
                values = json.loads((root / name).read_text())
            except (OSError, ValueError) as error:
                raise UserError(f"{root / name} cannot be read ({error}); correct or remove it.") from error
            splits = values.get("splits", {}) if isinstance(values, dict) else None
            if not isinstance(splits, dict) or not all(isinstance(split, dict) for split in splits.values()):
                raise UserError(f"{root / name} does not map splits to their shards; correct or remove it.")
            return splits
    return {}


def _shards_of(root: Path, split: str, info: dict[str, Any]) -> tuple[list[Path], str]:
    """The shards of a split in order, and the field of the JSON beside an image that holds its label ("": `.cls` does)."""
    known = info.get(split)
    if known is not None:
        paths = [root / str(name) for name in known.get("filenames", ())]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise UserError(f"{missing[0]}, a shard of {split}, does not exist; restore it or correct _info.json.")
        return paths, str(known.get("alt_label", "") or "")
    pattern = split.split("|")[0] if ".tar" in split else f"*{glob.escape(split)}*.tar"
    paths = [Path(path) for one in _expanded(pattern) for path in sorted(glob.glob(one, root_dir=root))]
    if not paths:
        raise UserError(
            f"{root} has no shards for {split}; name a split of its _info.json, a pattern such as "
            "'name-{0000..0012}.tar', or a part of the shards' names, with data.train_split and data.test_split."
        )
    return [root / path for path in paths], ""


def _expanded(pattern: str) -> list[str]:
    """`a-{08..10}.tar` → a-08.tar, a-09.tar, a-10.tar; other braces stay."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    numbers = range(int(first), int(last) + 1)
    head, tail = pattern[: match.start()], pattern[match.end() :]
    return [expanded for n in numbers for expanded in _expanded(f"{head}{n:0{len(first)}d}{tail}")]


def _samples(tar: tarfile.TarFile, path: Path, label_key: str) -> list[tuple[str, int, int, int]]:
    """(key, offset, size, label) of the images of a shard, in its order."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    for member in tar:
        if not member.isfile():
            continue
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        key, extension = f"{folder}{slash}{stem}", extension.lower()
        if extension in IMAGES:
            images[key] = (member.offset_data, member.size)
        elif extension == ("json" if label_key else "cls"):
            file = tar.extractfile(member)
            assert file is not None
            labels[key] = _label(file.read(), label_key, f"{path}:{member.name}")
    missing = [key for key in images if key not in labels]
    if missing:
        kind = f"json with {label_key}" if label_key else "cls"
        raise UserError(f"{path}:{missing[0]} has no label; every image needs a .{kind} beside it.")
    return [(key, *place, labels[key]) for key, place in images.items()]


def _label(content: bytes, key: str, where: str) -> int:
    try:
        label = int(json.loads(content)[key]) if key else int(content)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{where} holds no label, which is a whole number; correct it.") from error
    if label < 0:
        raise UserError(f"{where} holds the label {label}; labels count from 0.")
    return label
