"""CIFAR from files in their original formats; a file cannot run code."""

from __future__ import annotations

import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from stored_fakes import PIXELS, cifar_pixels, write_cifar10, write_pickle

from basd.data import Splits, load
from basd.data.cifar import Cifar10Config, Cifar100Config
from basd.errors import UserError


def rows(splits: Splits) -> set[bytes]:
    return {image.numpy().tobytes() for split in splits[:2] for image in split.images}  # type: ignore[attr-defined]


def test_python_version_is_read_as_it_is(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    splits = load(Cifar10Config(root=str(tmp_path), validation_share=0.2))
    assert [len(part) for part in splits] == [80, 20, 20]
    test = splits.test
    assert np.array_equal(test.images.numpy().reshape(20, -1), cifar_pixels(20, 5))  # type: ignore[attr-defined]
    assert test.labels.tolist() == [i % 10 for i in range(20)]
    assert rows(splits) == {row.tobytes() for seed in range(5) for row in cifar_pixels(20, seed)}
    assert torch.bincount(splits.validation.labels).tolist() == [2] * 10


def test_archive_folder_and_binary_version_hold_the_same(tmp_path: Path) -> None:
    write_cifar10(tmp_path / "extracted")
    folder = tmp_path / "extracted" / "cifar-10-batches-py"
    (tmp_path / "packed").mkdir()
    with tarfile.open(tmp_path / "packed" / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-py")
    binary = tmp_path / "binary" / "cifar-10-batches-bin"
    binary.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        labels = (np.arange(20) % 10).astype(np.uint8)[:, None]
        (binary / f"{name}.bin").write_bytes(np.hstack([labels, cifar_pixels(20, number)]).tobytes())
    roots = [tmp_path / "extracted", folder, tmp_path / "packed", tmp_path / "binary"]
    first, *others = [load(Cifar10Config(root=str(root))) for root in roots]
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)  # type: ignore[attr-defined]


def test_cifar100_has_fine_labels(tmp_path: Path) -> None:
    """Both as Python 2 pickled the original files and as Python 3 pickles them."""
    for python2 in (True, False):
        root = tmp_path / f"python2={python2}"
        for seed, name in enumerate(("train", "test")):
            values = {
                b"fine_labels": [i % 100 for i in range(200)],
                b"coarse_labels": [0] * 200,
                b"data": cifar_pixels(200, seed),
            }
            write_pickle(root / "cifar-100-python" / name, values, python2)
        splits = load(Cifar100Config(root=str(root)))
        assert splits.test.classes == 100 and splits.test.labels.max() == 99, root.name
        assert [len(part) for part in splits] == [180, 20, 200], root.name


class Bad:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_a_pickle_cannot_run_code(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    done = tmp_path / "done"
    (tmp_path / "cifar-10-batches-py" / "data_batch_2").write_bytes(pickle.dumps({b"data": Bad(done)}, 2))
    with pytest.raises(UserError, match=r"data_batch_2 is not a file of CIFAR-10.*would call .*system"):
        load(Cifar10Config(root=str(tmp_path)))
    assert not done.exists()


BAD_LABELS = {b"data": cifar_pixels(2, 0), b"labels": [0, 10]}
BAD_PIXELS = {b"data": np.zeros((2, PIXELS), np.float32), b"labels": [0, 1]}
BAD_FILES: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "data_batch_3").unlink(), "data_batch_3 cannot be read"),
    (lambda folder: (folder / "data_batch_3").write_bytes(b""), "data_batch_3 is not a file"),
    (lambda folder: (folder / "test_batch").unlink(), "holds no cifar10; looked for cifar-10-batches-py/"),
    (lambda folder: write_pickle(folder / "data_batch_1", BAD_LABELS), "labels run from 0 to 10"),
    (lambda folder: write_pickle(folder / "data_batch_1", BAD_PIXELS), "pixels are float32"),
]


def test_bad_files_are_one_sentence(tmp_path: Path) -> None:
    for number, (change, said) in enumerate(BAD_FILES):
        root = tmp_path / str(number)
        write_cifar10(root)
        change(root / "cifar-10-batches-py")
        with pytest.raises(UserError, match=said):
            load(Cifar10Config(root=str(root)))


def test_root_is_required_and_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs data.root=DIR"):
        load(Cifar10Config())
    with pytest.raises(UserError, match="does not exist"):
        load(Cifar10Config(root=str(tmp_path / "gone")))
