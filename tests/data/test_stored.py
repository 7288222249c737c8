"""Folders and shards of images: splits, crops and their order whatever the workers, bad files."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stored_fakes import picture, write_folder, write_shards

from basd.data import ImageSet, fingerprint, load
from basd.data.disk import DiskImages
from basd.data.feed import Crops, Wanted, crop_batches, evaluation_batches
from basd.data.folder import FolderConfig, ImageNetConfig
from basd.data.images import Splits, epoch_order
from basd.data.timm_data import TimmConfig
from basd.data.views import crop, draw_crops, eval_view, place_crops
from basd.errors import UserError

CPU = torch.device("cpu")


def config_of(root: Path, **changes) -> FolderConfig:
    return FolderConfig(root=str(root), validation_share=0.25, image_size=16, **changes)


def wanted(n: int, step: int, batch: int = 6, own: bool = True) -> Wanted:
    generator = torch.Generator().manual_seed(step)
    indices = epoch_order(n, batch, torch.Generator().manual_seed(7))[step % (n // batch)]
    return Wanted(indices, draw_crops(batch, generator), draw_crops(batch, generator) if own else None)


def read(source: DiskImages, workers: int, steps: range, batch: int = 6) -> list[Crops]:
    return list(crop_batches(source, (wanted(len(source), s, batch) for s in steps), batch, workers))


def same(a: list[Crops], b: list[Crops]) -> bool:
    pairs = list(zip(a, b, strict=True))
    return all(torch.equal(x, y) for one, two in pairs for x, y in zip(one[:3], two[:3], strict=True))


def test_splits_of_a_folder(tmp_path: Path) -> None:
    write_folder(tmp_path)
    splits = load(ImageNetConfig(root=str(tmp_path), validation_share=0.25))
    assert [len(part) for part in splits] == [18, 6, 9]
    assert [torch.bincount(part.labels).tolist() for part in splits] == [[6] * 3, [2] * 3, [3] * 3]
    train, validation, _ = splits
    names = [{part.store.name(int(i)) for i in part.index} for part in (train, validation)]  # type: ignore[attr-defined]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 24
    # test/ beside val/: nothing is held out of train/
    shutil.copytree(tmp_path / "val", tmp_path / "test")
    assert [len(part) for part in load(config_of(tmp_path))] == [24, 9, 9]
    write_folder(tmp_path / "other")
    shutil.copytree(tmp_path / "other" / "val", tmp_path / "other" / "test")
    shutil.rmtree(tmp_path / "other" / "test" / "n01")
    with pytest.raises(UserError, match=r"differ \(1 only in train/: n01\)"):
        load(config_of(tmp_path / "other"))


def test_fingerprint_names_files_sizes_and_labels(tmp_path: Path) -> None:
    write_folder(tmp_path / "a")
    for name in "bcd":
        shutil.copytree(tmp_path / "a", tmp_path / name)
    moved = tmp_path / "c" / "train" / "n01" / "n01_0.JPEG"
    moved.rename(moved.with_name("other.JPEG"))
    longer = tmp_path / "d" / "train" / "n01" / "n01_0.JPEG"
    longer.write_bytes(longer.read_bytes() + b"more")
    same_files, copied, renamed, grown = (fingerprint(load(config_of(tmp_path / name))) for name in "abcd")
    assert same_files == copied and len({copied, renamed, grown}) == 3
    assert fingerprint(load(config_of(tmp_path / "a", split_seed=1))) != same_files


def test_workers_change_no_byte_and_no_global_random_state(tmp_path: Path) -> None:
    write_folder(tmp_path)
    train = load(config_of(tmp_path)).train
    assert isinstance(train, DiskImages)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    answers = [read(train, workers, range(4)) for workers in (0, 1, 2)]
    assert same(answers[0], answers[1]) and same(answers[0], answers[2])
    assert random.getstate() == before[0] and np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])
    # not vacuous: other draws give other crops
    assert not torch.equal(answers[0][0].images, answers[0][1].images)
    # labels belong to the images
    assert torch.equal(answers[0][1].labels, train.labels[wanted(len(train), 1).indices])


def test_reading_goes_on_in_the_middle_without_decoding_what_was_skipped(tmp_path: Path, monkeypatch) -> None:
    write_folder(tmp_path)
    train = load(config_of(tmp_path)).train
    assert isinstance(train, DiskImages)
    whole = read(train, 0, range(3))
    opened: list[int] = []
    monkeypatch.setattr(type(train.store), "open", _counting(type(train.store).open, opened))
    rest = read(train, 0, range(2, 3))
    assert same(whole[2:], rest)
    # once for the shared crop and once for the student's own
    assert sorted(opened) == sorted(2 * train.index[wanted(len(train), 2).indices].tolist())


def _counting(original, opened: list[int]):
    def open_(self, index: int):
        opened.append(index)
        return original(self, index)

    return open_


def test_crops_are_those_of_the_batched_path(tmp_path: Path) -> None:
    write_folder(tmp_path, ending=".png")
    config = config_of(tmp_path)
    train = load(config).train
    assert isinstance(train, DiskImages)
    (got,) = read(train, 0, range(1))
    job = wanted(len(train), 0)
    for row, index in enumerate(job.indices.tolist()):
        pixels = (
            torch.from_numpy(np.array(Image.open(train.store.name(int(train.index[index])))))
            .permute(2, 0, 1)
            .contiguous()
        )
        for made, draws in ((got.images, job.draws), (got.own, job.own)):
            assert draws is not None and made is not None
            geometry = place_crops(draws.take(slice(row, row + 1)), *pixels.shape[1:], config)
            expected = crop(pixels[None], geometry, config.image_size)[0] * 255
            # Pillow rounds twice, to bytes
            assert (made[row].float() - expected).abs().max() < 1.6


def test_evaluation_sees_the_centre(tmp_path: Path) -> None:
    write_folder(tmp_path, ending=".png")
    test = load(config_of(tmp_path)).test
    assert isinstance(test, DiskImages)
    views = [list(evaluation_batches(test, 16, 0.875, 4, CPU, workers)) for workers in (0, 2)]
    for (a, label_a), (b, label_b) in zip(*views, strict=True):
        assert torch.equal(a, b) and torch.equal(label_a, label_b)
    assert torch.equal(torch.cat([labels for _, labels in views[0]]), test.labels)
    got = torch.cat([images for images, _ in views[0]])
    for row in range(len(test)):
        # torchvision's way: shorter side to size/share, then the centre
        image = Image.open(test.store.name(int(test.index[row])))
        width, height = image.size
        side = min(width, height) * 0.875
        box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
        expected = np.array(image.resize((16, 16), Image.Resampling.BILINEAR, box=box)) / 255
        assert np.abs(got[row].permute(1, 2, 0).numpy() - expected).max() < 1e-6


def test_evaluation_in_memory_shows_the_evaluation_view() -> None:
    images = torch.randint(0, 256, (5, 3, 20, 24), dtype=torch.uint8)
    source = ImageSet(images, torch.arange(5), 5)
    got = torch.cat([view for view, _ in evaluation_batches(source, 12, 1.0, 2, CPU)])
    assert torch.equal(got, torch.cat([eval_view(part, 12) for part in images.split(2)]))


def test_large_jpegs_are_decoded_coarsely_and_look_the_same(tmp_path: Path) -> None:
    write_folder(tmp_path, train=2, test=1)
    path = tmp_path / "val" / "n01" / "n01_0.JPEG"
    Image.open(path).resize((800, 640), Image.Resampling.BICUBIC).save(path, quality=95)
    test = load(config_of(tmp_path)).test
    (views, _), *_ = evaluation_batches(test, 16, 1.0, 9, CPU)
    full = Image.open(path).resize((16, 16), Image.Resampling.BILINEAR, box=(80, 0, 720, 640))
    assert np.abs(views[0].permute(1, 2, 0).numpy() * 255 - np.array(full)).mean() < 2


def test_a_crop_does_not_depend_on_what_else_is_cut(tmp_path: Path) -> None:
    """A small crop of the student's own must not make the shared one finer: arms are the same alone and in a cohort."""
    write_folder(tmp_path, train=3, test=1)
    for path in (tmp_path / "train").rglob("*.JPEG"):
        picture(1100, 1400, len(str(path))).save(path, quality=95)
    train = load(config_of(tmp_path)).train
    assert isinstance(train, DiskImages)
    with_own = [next(crop_batches(train, [wanted(len(train), step)], 6, 0)) for step in range(3)]
    without = [next(crop_batches(train, [wanted(len(train), step, own=False)], 6, 0)) for step in range(3)]
    assert all(one.own is not None and other.own is None for one, other in zip(with_own, without, strict=True))
    for one, other in zip(with_own, without, strict=True):
        assert torch.equal(one.images, other.images)


# -- bad input ---------------------------------------------------------------------------------------------------------


def damage(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:200])
    return str(path)


def test_a_corrupt_image_stops_with_its_name_or_is_replaced(tmp_path: Path) -> None:
    write_folder(tmp_path)
    train = load(config_of(tmp_path, corrupt="skip")).train
    assert isinstance(train, DiskImages)
    row = int(wanted(len(train), 1).indices[2])
    name = damage(Path(train.store.name(int(train.index[row]))))
    stop = load(config_of(tmp_path)).train
    assert isinstance(stop, DiskImages)
    # the next image of the split takes its place, with the same random numbers
    replaced = wanted(len(train), 1)._replace(indices=wanted(len(train), 1).indices.clone())
    replaced.indices[2] = (row + 1) % len(train)
    (expected,) = crop_batches(train, [replaced], 6, 0)
    for workers in (0, 2):
        with pytest.raises(
            UserError, match=r"cannot be decoded; repair or remove it, or set data.corrupt=skip"
        ) as error:
            read(stop, workers, range(3))
        assert name in str(error.value) and "Traceback" not in str(error.value), workers
        got = read(train, workers, range(3))
        assert [len(batch.unreadable) for batch in got] == [0, 1, 0], workers
        assert same([got[1]], [expected]), workers


def test_evaluation_leaves_corrupt_images_out(tmp_path: Path) -> None:
    write_folder(tmp_path)
    damage(tmp_path / "val" / "n02" / "n02_0.JPEG")
    with pytest.raises(UserError, match="n02_0.JPEG"):
        list(evaluation_batches(load(config_of(tmp_path)).test, 16, 1.0, 4, CPU))
    views = evaluation_batches(load(config_of(tmp_path, corrupt="skip")).test, 16, 1.0, 4, CPU)
    assert torch.cat([labels for _, labels in views]).tolist() == [0, 0, 0, -1, 1, 1, 2, 2, 2]


def test_a_vanished_file_is_never_skipped(tmp_path: Path) -> None:
    write_folder(tmp_path)
    train = load(config_of(tmp_path, corrupt="skip")).train
    assert isinstance(train, DiskImages)
    Path(train.store.name(int(train.index[wanted(len(train), 0).indices[0]]))).unlink()
    with pytest.raises(UserError, match=r"cannot be read \(No such file"):
        read(train, 1, range(1))


BAD_FOLDERS: list[tuple[Callable[[Path], object], str]] = [
    (lambda root: shutil.rmtree(root / "train"), "has no train/ in it"),
    (lambda root: shutil.rmtree(root / "val"), "has no test/ or val/ or validation/ in it"),
    (lambda root: shutil.rmtree(root / "val" / "n02"), r"differ \(1 only in train/: n02\)"),
    (lambda root: (root / "val" / "n02").rename(root / "val" / "x"), r"1 only in train/: n02; 1 only in val/: x"),
    (lambda root: [p.unlink() for p in (root / "train" / "n03").iterdir()], "1 class folder of .* hold no image: n03"),
    (lambda root: [p.unlink() for p in root.rglob("*.JPEG")], "holds no images; looked for .jpg"),
    (lambda root: [shutil.rmtree(p) for p in (root / "val").iterdir()], "has no class folders"),
]


def test_bad_folders_are_one_sentence(tmp_path: Path) -> None:
    write_folder(tmp_path / "good", train=2, test=1)
    for number, (change, said) in enumerate(BAD_FOLDERS):
        root = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", root)
        change(root)
        with pytest.raises(UserError, match=said):
            load(config_of(root))


# -- WebDataset and timm's names ---------------------------------------------------------------------------------------


def timm_config(root: Path, **changes) -> TimmConfig:
    return TimmConfig(root=str(root), dataset="wds/tiny", validation_share=0.25, image_size=16, **changes)


def test_webdataset_shards_are_read_at_any_place(tmp_path: Path) -> None:
    write_shards(tmp_path / "plain")
    write_shards(tmp_path / "info", info=True)
    plain, info = load(timm_config(tmp_path / "plain")), load(timm_config(tmp_path / "info"))
    pattern = load(timm_config(tmp_path / "plain", train_split="tiny-train-{0000..0001}.tar|12"))
    assert fingerprint(plain) == fingerprint(info) == fingerprint(pattern)
    assert [len(part) for part in plain] == [9, 3, 6] and plain.test.labels.tolist() == [0, 1, 2, 0, 1, 2]
    train = plain.train
    assert isinstance(train, DiskImages)
    assert same(read(train, 0, range(2), 4), read(train, 2, range(2), 4))
    # against the tar as any tool reads it
    shutil.unpack_archive(tmp_path / "plain" / "tiny-train-0001.tar", tmp_path / "out")
    last = int(train.store.open.__self__.shard.nonzero()[0])  # type: ignore[attr-defined]
    with train.store.open(last) as file:
        assert file.read() == (tmp_path / "out" / "sample0010.jpg").read_bytes()  # type: ignore[union-attr]


def test_streams_and_unknown_names_are_refused(tmp_path: Path) -> None:
    for dataset, said in (("hfids/x", "is a stream"), ("tfds/x", "is a stream"), ("", "must be a name of timm")):
        with pytest.raises(UserError, match=said):
            load(TimmConfig(dataset=dataset))
    write_shards(tmp_path)
    with pytest.raises(UserError, match="has no shards for nothing"):
        load(timm_config(tmp_path, train_split="nothing"))
    (tmp_path / "tiny-train-0001.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match=r"the shard .*tiny-train-0001.tar cannot be read"):
        load(timm_config(tmp_path))


def test_a_table_of_shards_of_another_form_is_one_sentence(tmp_path: Path) -> None:
    for number, info in enumerate(('{"splits": null}', '{"splits": ["train"]}', '{"splits": {"train": []}}', "[]")):
        write_shards(tmp_path / str(number))
        (tmp_path / str(number) / "_info.json").write_text(info)
        with pytest.raises(UserError, match=r"_info.json does not map splits to their shards"):
            load(timm_config(tmp_path / str(number)))


def test_torchvision_splits_are_named_as_timm_knows_them(tmp_path: Path) -> None:
    """timm gives the test images for any other name."""
    for train, test in (("trian", "val"), ("train", "training"), ("test", "val")):
        config = TimmConfig(root=str(tmp_path), dataset="torch/cifar10", train_split=train, test_split=test)
        with pytest.raises(UserError, match="are not the two splits of torch/cifar10"):
            load(config)


def test_hugging_face_dataset(tmp_path: Path) -> None:
    """Images, labels and names of classes are those that the folder itself gives; an image that is damaged is named."""
    write_folder(tmp_path / "images", ending=".png")
    (tmp_path / "images" / "val").rename(tmp_path / "images" / "validation")
    folder = config_of(tmp_path / "images")
    config = TimmConfig(root=str(tmp_path / "cache"), dataset=f"hfds/{folder.root}", image_size=16)
    config = replace(config, validation_share=folder.validation_share)
    splits, plain = load(config), load(folder)
    assert splits.train.class_names == plain.train.class_names == ("n01", "n02", "n03")

    def seen(of: Splits) -> list[tuple[int, bytes]]:
        views = evaluation_batches(of.test, 16, 1.0, 4, CPU)
        return sorted(
            (int(label), image.numpy().tobytes())
            for images, labels in views
            for image, label in zip(images, labels, strict=True)
        )

    assert seen(splits) == seen(plain) and len(splits.train) == len(plain.train)
    with pytest.raises(UserError, match="trian, cannot be opened"):
        load(replace(config, train_split="trian"))
