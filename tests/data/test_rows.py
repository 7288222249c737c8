"""A process that makes some rows of a batch makes the same bits as a process that makes all rows."""

from __future__ import annotations

import dataclasses
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stored_fakes import write_folder

from basd.data import MIXINGS, ImageSet, load
from basd.data.folder import FolderConfig
from basd.data.views import DualViewsConfig, SingleViewsConfig
from basd.training.batches import CropFeed, StepBatch, wanted_crops

N, SIZE = 12, 16
ROWS = [torch.tensor([0, 1, 2, 9, 10, 11]), torch.tensor([3, 4, 5, 6, 7, 8])]
# everything happens often
BUSY = DualViewsConfig(op_probability=0.9, erasing=0.6)
VIEWS = [
    SingleViewsConfig(),
    BUSY,
    dataclasses.replace(BUSY, strong="randaugment_full"),
    dataclasses.replace(BUSY, strong="three_augment"),
    dataclasses.replace(BUSY, geometry="independent"),
]


def arm(views, mixing: str) -> SimpleNamespace:
    return SimpleNamespace(
        student=SimpleNamespace(image_size=SIZE),
        objective=SimpleNamespace(label_smoothing=0.1),
        views=views,
        mixing=MIXINGS[mixing](),
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory):
    root: Path = tmp_path_factory.mktemp("images")
    write_folder(root, train=20)
    config = FolderConfig(root=str(root), image_size=20)
    images = torch.randint(0, 256, (40, 3, 24, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return config, {"memory": ImageSet(images, torch.arange(40) % 3, 3), "disk": load(config).train}


def test_rows_are_those_of_the_whole_batch(sources) -> None:
    data = sources[0]
    indices = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:N]
    for (where, source), mixing, views in product(sources[1].items(), ["none", "mixup_cutmix"], VIEWS):
        config, seen = arm(views, mixing), []
        for step in range(2):
            case = (where, mixing, views, step)
            whole = StepBatch(source, indices, data, 0, 0, step)
            images, targets, _ = whole.student_images(config)  # type: ignore[arg-type]
            seen.append(images)
            for rows in ROWS:
                part = StepBatch(source, indices, data, 0, 0, step, rows)
                own, own_targets, _ = part.student_images(config)  # type: ignore[arg-type]
                assert torch.equal(part.labels, whole.labels[rows]), case
                assert torch.equal(part.clean(SIZE), whole.clean(SIZE)[rows]), case
                assert torch.equal(own, images[rows]) and torch.equal(own_targets, targets[rows]), case
        assert not torch.equal(*seen), (where, mixing, views)


def test_a_feed_gives_every_part_of_every_step_and_begins_anywhere(sources) -> None:
    data, source = sources[0], sources[1]["disk"]
    steps_per_epoch = len(source) // N
    assert steps_per_epoch == 4
    feed = CropFeed(source, N, seed=5, steps=10, parts=ROWS, own=True, workers=1)
    ahead = {(step, part): feed.crops(step, part) for step in range(3, 6) for part in range(2)}
    jumped = feed.crops(9, 1)
    feed.close()
    fresh = CropFeed(source, N, seed=5, steps=10, parts=ROWS, own=True)
    for (step, part), crops in [*ahead.items(), ((9, 1), jumped)]:
        expected = fresh.crops(step, part)
        assert crops is not None and expected is not None
        assert all(torch.equal(a, b) for a, b in zip(crops[:3], expected[:3], strict=True))
    # each step has draws of its own
    found = [wanted_crops(torch.arange(N), 5, 0, step).draws.places for step in range(2)]
    assert not torch.equal(*found)
    assert CropFeed(sources[1]["memory"], N, 5, 10).crops(0) is None
    assert data.image_size == ahead[3, 0].images.shape[-1]  # type: ignore[union-attr]
