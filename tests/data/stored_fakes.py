"""Data sets in their true formats on disk, small."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

PIXELS = 3 * 32 * 32


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Protocol 2 with texts as bytes, as Python 2 wrote the original files."""

    dispatch: ClassVar[dict] = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_bytes(self, value: bytes) -> None:
        short = len(value) < 256
        head = (
            pickle.SHORT_BINSTRING + bytes([len(value)]) if short else pickle.BINSTRING + struct.pack("<i", len(value))
        )
        self.write(head + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def write_pickle(path: Path, values: dict[bytes, Any], python2: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        (Python2Pickler if python2 else pickle.Pickler)(file, 2).dump(values)


def cifar_pixels(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, PIXELS), dtype=np.uint8)


def write_cifar10(root: Path, n: int = 20) -> None:
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        values = {
            b"batch_label": b"training batch",
            b"labels": [i % 10 for i in range(n)],
            b"data": cifar_pixels(n, number),
            b"filenames": [b"leptodactylus_pentadactylus_s_000004.png"] * n,
        }
        write_pickle(root / "cifar-10-batches-py" / name, values)


def picture(height: int, width: int, seed: int) -> Image.Image:
    """Smooth, so that JPEG keeps it well."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def write_folder(
    root: Path, classes: tuple[str, ...] = ("n01", "n02", "n03"), train: int = 8, test: int = 3, ending: str = ".JPEG"
) -> None:
    for split, count in (("train", train), ("val", test)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                seed = 1000 * label + 100 * (split == "val") + i
                image = picture(40 + seed % 17, 50 + seed % 23, seed)
                format = "PNG" if ending == ".png" else "JPEG"
                (root / split / name / f"{name}_{i}{ending}").write_bytes(encoded(image, format))


def write_shards(root: Path, info: bool = False) -> None:
    """Two shards for training, one for validation, of 6 images in 3 classes each."""
    root.mkdir(parents=True, exist_ok=True)
    for split, numbers in (("train", (0, 1)), ("validation", (0,))):
        for number in numbers:
            with tarfile.open(root / f"tiny-{split}-{number:04d}.tar", "w") as tar:
                for i in range(6):
                    seed = 10 * number + i + 500 * (split == "validation")
                    for ending, content in (("cls", str(i % 3).encode()), ("jpg", encoded(picture(30, 40, seed)))):
                        member = tarfile.TarInfo(f"sample{seed:04d}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
    if info:
        names = {s: [p.name for p in sorted(root.glob(f"*{s}*.tar"))] for s in ("train", "validation")}
        splits = {s: {"name": s, "filenames": found, "num_samples": 6 * len(found)} for s, found in names.items()}
        (root / "_info.json").write_text(json.dumps({"splits": splits}))
