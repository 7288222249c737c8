import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sklearn.datasets import load_digits

from basd.data import DATASETS, LOADERS, ImageSet, Splits, epoch_order, fingerprint, load
from basd.data.digits import DigitsConfig, read_digits, split_indices, upsample
from basd.errors import UserError


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load(DigitsConfig())


def test_shapes_and_types(splits: Splits) -> None:
    assert [len(split) for split in splits] == [1197, 150, 450]
    for split in splits:
        assert split.images.shape == (len(split), 3, 40, 40)
        assert split.images.dtype == torch.uint8 and split.labels.dtype == torch.int64
        assert split.classes == 10
        assert torch.equal(split.images[:, 0], split.images[:, 2])


def test_images_and_labels_are_those_of_scikit_learn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Read from scikit-learn's file, and through its function where the file is not in its usual place."""
    expected = load_digits()
    elsewhere = SimpleNamespace(origin=str(tmp_path / "sklearn" / "__init__.py"))
    for place in ("usual", "elsewhere"):
        if place == "elsewhere":
            monkeypatch.setattr("importlib.util.find_spec", lambda _name: elsewhere)
        images, labels = read_digits()
        assert images.dtype == torch.float64 and labels.dtype == torch.int64, place
        assert (images.numpy() == expected.images).all() and (labels.numpy() == expected.target).all(), place


def test_without_scikit_learn_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        load(DigitsConfig())


def test_splits_share_no_image_and_leave_none_out(splits: Splits) -> None:
    seen = [{image.numpy().tobytes() for image in split.images} for split in splits]
    assert [len(s) for s in seen] == [1197, 150, 450]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    parts = split_indices(torch.arange(1797) % 10, 3)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(1797))


def test_classes_are_in_proportion(splits: Splits) -> None:
    whole = torch.bincount(torch.cat([split.labels for split in splits])).double()
    for split in splits:
        expected = whole * len(split) / 1797
        assert (torch.bincount(split.labels, minlength=10) - expected).abs().max() <= 1


def test_fingerprint_is_fixed_and_follows_the_split_seed(splits: Splits) -> None:
    # arm keys contain it: after a change no finished run is recognised
    assert fingerprint(splits) == "f3d2fd9e9a51ed36"
    other = load(DigitsConfig(split_seed=1))
    assert fingerprint(other) != fingerprint(splits)
    assert [len(split) for split in other] == [1197, 150, 450]


def test_fingerprint_sees_every_part(splits: Splits) -> None:
    for position in range(3):
        for part in ("images", "labels"):
            split = splits[position]
            changed = getattr(split, part).clone()
            changed.view(-1)[-1] = (changed.view(-1)[-1] + 1) % 10
            parts = list(splits)
            parts[position] = dataclasses.replace(split, **{part: changed})
            assert fingerprint(Splits(*parts)) != fingerprint(splits)


def test_statistics_are_those_of_the_training_split(splits: Splits) -> None:
    config = DigitsConfig()
    x = splits.train.images.double() / 255
    assert x.mean().item() == pytest.approx(config.mean[0], abs=1e-4)
    assert x.std(correction=0).item() == pytest.approx(config.std[0], abs=1e-4)


def _cubic(t: float, a: float = -0.75) -> float:
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def test_upsampling_against_a_loop() -> None:
    native = torch.randint(0, 17, (2, 8, 8), generator=torch.Generator().manual_seed(0)).double()
    size, got = 20, upsample(native, 20)
    for n, y, x in [(0, 0, 0), (0, 3, 17), (1, 19, 19), (1, 10, 7), (0, 11, 2)]:
        cy, cx = (y + 0.5) * 8 / size - 0.5, (x + 0.5) * 8 / size - 0.5
        value = 0.0
        for i in range(math.floor(cy) - 1, math.floor(cy) + 3):
            for j in range(math.floor(cx) - 1, math.floor(cx) + 3):
                pixel = native[n, min(max(i, 0), 7), min(max(j, 0), 7)].item() * 255 / 16
                value += pixel * _cubic(cy - i) * _cubic(cx - j)
        assert abs(got[n, 0, y, x].item() - min(max(value, 0), 255)) <= 0.5 + 1e-5


def test_halfway_level_rounds_alike_everywhere() -> None:
    for size in (8, 48):
        assert (upsample(torch.full((1, 8, 8), 8.0).double(), size) == 128).all(), size


def test_batch(splits: Splits) -> None:
    index = torch.tensor([5, 3, 5])
    images, labels = splits.train.batch(index)
    assert torch.equal(images, splits.train.images[index]) and torch.equal(labels, splits.train.labels[index])
    assert isinstance(splits.train.to("cpu"), ImageSet)


def test_bad_lists_are_named() -> None:
    for name, value in (
        ("crop_scale", [1.0, 0.6]),
        ("crop_scale", [0.5]),
        ("crop_ratio", [0.0, 1.0]),
        ("mean", [0.5]),
        ("std", [1, 0, 1]),
    ):
        with pytest.raises(UserError, match=f"data.{name} must"):
            load(DigitsConfig(**{name: value}))  # type: ignore[arg-type]


def test_unknown_data_set_lists_the_choices() -> None:
    with pytest.raises(UserError, match="choose one of: .*digits"):
        load(DigitsConfig(name="cifar"))
    assert DATASETS.keys() == LOADERS.keys()


def test_epoch_order() -> None:
    batches = epoch_order(103, 10, torch.Generator().manual_seed(1))
    assert [len(b) for b in batches] == [10] * 10
    flat = torch.cat(batches)
    assert flat.dtype == torch.int64 and len(flat.unique()) == 100 and int(flat.max()) < 103
    again = torch.cat(epoch_order(103, 10, torch.Generator().manual_seed(1)))
    other = torch.cat(epoch_order(103, 10, torch.Generator().manual_seed(2)))
    assert torch.equal(flat, again) and not torch.equal(flat, other)
    assert len(epoch_order(10, 10, torch.Generator())) == 1
    with pytest.raises(UserError, match="fewer than one batch"):
        epoch_order(9, 10, torch.Generator())
    with pytest.raises(UserError, match="at least 1"):
        epoch_order(9, 0, torch.Generator())
