"""Arms trained from a folder of images: the same bits with any number of workers, interrupted in an epoch or not."""

from __future__ import annotations

from pathlib import Path

import pytest
from stored_fakes import write_folder
from tiny import TINY, MemoryRecorder, same_bits, state_of

from basd.compose import compose, setting_name
from basd.config import FrozenArm
from basd.grid.plan import freeze, prepare
from basd.training.cohort import train_cohort

CHANGES = ["teacher.batch_size=16", "recipe.batch_size=16", "recipe.duration=2 epochs", "views.geometry=independent"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_folder(folder, train=24)
    damaged = next((folder / "train" / "n02").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:150])
    return folder


def arm_of(root: Path, *overrides: str) -> FrozenArm:
    composed = compose([*TINY, "data=folder", f"data.root={root}", *CHANGES, "data.corrupt=skip", *overrides])
    return freeze(composed, "tiny", prepare(composed.config))


def test_workers_and_interruption_change_nothing(root: Path, tmp_path: Path, monkeypatch) -> None:
    """An arm that decodes in two workers and is interrupted in an epoch ends as one that does neither."""
    monkeypatch.setenv("BASD_CACHE", str(tmp_path / "cache"))
    whole, cut = MemoryRecorder(), MemoryRecorder()
    (result,) = train_cohort([arm_of(root, "runtime.workers=0")], [tmp_path / "whole"], [whole])
    assert result.status == "complete", result.reason
    # each epoch of 4 batches met the damaged image at most once, and says so
    corrupt = [values["data/corrupt"] for _, values in whole.results if "data/corrupt" in values]
    assert len(corrupt) == 2 and set(corrupt) <= {0.0, 1.0}
    calls, arm = iter(range(100)), arm_of(root, "runtime.workers=2")
    (stopped,) = train_cohort([arm], [tmp_path / "cut"], [cut], stop=lambda: next(calls) == 2)
    assert stopped.status == "stopped"
    (resumed,) = train_cohort([arm], [tmp_path / "cut"], [cut])
    assert resumed.status == "complete", resumed.reason
    assert cut.results == whole.results and same_bits(state_of(tmp_path / "whole"), state_of(tmp_path / "cut"))


def test_where_data_lies_is_no_part_of_names_and_keys(root: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("BASD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "link").symlink_to(root)
    here, there = arm_of(root), arm_of(tmp_path / "link", "data.corrupt=stop")
    assert (here.arm_key, here.cohort_key, here.name) == (there.arm_key, there.cohort_key, there.name)
    assert arm_of(root, "data.split_seed=1").arm_key != here.arm_key
    assert setting_name(["data=folder", f"data.root={root}"]) == "folder-digits_vit-digits_tiny-digits"
