"""The bias probes of finished arms. That they are the same alone, in a cohort and after a stop is held by `test_cohort.py`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import MemoryRecorder, same_bits, state_of
from watching import TEACHER, forwards

from basd.config import FrozenArm, from_dict
from basd.data import load
from basd.data.images import ImageSet, Splits
from basd.grid.ablations import PROBES
from basd.models.teacher import Teacher
from basd.training.arm import TrainingArm
from basd.training.bias import BATCH, IMAGES, BiasProbes, Reader
from basd.training.cohort import train_cohort
from basd.training.teachers import prepare_teacher

MakeArm = Callable[..., FrozenArm]
SHORT = ("recipe.duration=2 steps", "runtime.probes=true")
# what needs the teacher
COMPARED = {"probe/attention_distance_teacher", "probe/cka", "probe/attention_kl", "probe/relation_cosine"}
CPU = torch.device("cpu")


def ends(arms: list[FrozenArm], folder: Path) -> list[dict[str, float]]:
    """The last record of each arm, trained as one cohort."""
    recorders = [MemoryRecorder() for _ in arms]
    results = train_cohort(arms, [folder / arm.arm_key for arm in arms], recorders)
    assert {result.status for result in results} == {"complete"}
    return [recorder.results[-1][1] for recorder in recorders]


def test_a_machine_that_lacks_the_teacher_fits_it(
    few_arm: MakeArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arm without a teacher is planned on one machine and described on another, whose cache is empty."""
    arm = few_arm(*SHORT, "method=ce")
    (here,) = ends([arm], tmp_path / "here")
    monkeypatch.setenv("BASD_CACHE", str(tmp_path / "cache"))
    (there,) = ends([arm], tmp_path / "there")
    assert there == here and probes_of(there).keys() >= COMPARED


def probes_of(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name.startswith("probe/")}


def untrained(frozen: FrozenArm) -> tuple[TrainingArm, Splits]:
    config = from_dict(frozen.config)
    splits = load(config.data)
    return TrainingArm(config, None, splits.train.classes, 5, CPU), splits


def described(arm: TrainingArm, probes: BiasProbes, splits: Splits) -> dict[str, float]:
    return probes(arm, arm.answer(splits.test, "test"), arm.answer(splits.validation, "val"))


def test_probes_off_change_nothing_else(few_arm: MakeArm, tmp_path: Path) -> None:
    arms = [few_arm(*SHORT), few_arm(*SHORT, "runtime.probes=false")]
    assert arms[0].arm_key == arms[1].arm_key and arms[0].cohort_key == arms[1].cohort_key
    on, off = (ends([arm], tmp_path / str(number))[0] for number, arm in enumerate(arms))
    assert on.keys() - off.keys() == set(PROBES) and probes_of(off) == {}
    assert off == {name: value for name, value in on.items() if name in off}
    first, second = (state_of(tmp_path / str(number) / arms[0].arm_key) for number in range(2))
    assert same_bits(first, second)


def test_the_teacher_is_looked_at_once_a_cohort_and_grid(few_arm: MakeArm, tmp_path: Path) -> None:
    seen: list[int] = []
    coarse = ("losses.rel.num_pairs=1", "student.patch_size=10")
    arms = [few_arm(*SHORT, *other) for other in (("student.points=1",), ("method=ce",), coarse)]
    with forwards(lambda width, images: seen.append(images) if width == TEACHER else None):
        found = ends(arms, tmp_path)
    # two steps of 40 images, and the 48 of the test split once for each of two grids
    assert seen == [40] * 2 + [48] * 2
    assert len({values["probe/attention_distance_teacher"] for values in found}) == 1


def test_a_student_that_is_its_teacher_agrees_with_it(tiny_arm: MakeArm) -> None:
    arm, splits = untrained(tiny_arm("method=ce", *SHORT, "student.distillation_token=false"))
    probes = BiasProbes(tiny_arm("method=ce", *SHORT), arm.config, splits, CPU)
    probes.teacher = Reader(arm.exported)
    values = described(arm, probes, splits)
    assert values["probe/cka"] == pytest.approx(1) and values["probe/relation_cosine"] == pytest.approx(1)
    assert values["probe/attention_kl"] == pytest.approx(0, abs=1e-6)
    assert values["probe/attention_distance"] == values["probe/attention_distance_teacher"]
    assert values.keys() == set(PROBES)


def test_an_untrained_student_attends_everywhere_and_agrees_with_nobody(tiny_arm: MakeArm) -> None:
    frozen = tiny_arm("method=ce", *SHORT)
    arm, splits = untrained(frozen)
    values = described(arm, BiasProbes(frozen, arm.config, splits, CPU), splits)
    # the mean distance on a grid of 5x5
    assert values["probe/attention_distance"] == pytest.approx(0.5, abs=0.02)
    # whatever sees the digits at all tells them apart in much the same way
    assert values["probe/cka"] < 0.97 and values["probe/relation_cosine"] < 0.9 and values["probe/attention_kl"] > 1e-3
    assert 0 <= values["probe/shift_consistency"] <= 1


def test_a_distillation_token_is_no_place(few_arm: MakeArm, tmp_path: Path) -> None:
    (values,) = ends([few_arm("method=deit_hard", "student.distillation_token=true", *SHORT)], tmp_path)
    assert set(PROBES) <= values.keys() and all(math.isfinite(values[name]) for name in PROBES)


def test_an_arm_without_its_teacher_at_hand_is_described_by_itself(
    tiny_arm: MakeArm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Cross-entropy trains where the teacher is not: it must not fail for a probe."""
    weights = Path(__file__).parent.parent / "golden" / "teacher.safetensors"
    here = tmp_path / "teacher.safetensors"
    here.write_bytes(weights.read_bytes())
    arm = tiny_arm("method=ce", *SHORT, f"teacher.weights={here}")
    (with_it,) = ends([arm], tmp_path / "with")
    here.unlink()
    with caplog.at_level(logging.WARNING, "basd.training"):
        (without,) = ends([arm], tmp_path / "without")
    assert "are not compared with it" in caplog.text
    assert probes_of(with_it).keys() - probes_of(without).keys() == COMPARED
    assert without == {name: value for name, value in with_it.items() if name in without}


def test_images_are_spread_over_the_split_and_batches_are_of_one_size(tiny_arm: MakeArm) -> None:
    frozen = tiny_arm("method=ce", *SHORT)
    for count in (1, 5, BATCH + 1, IMAGES, 50_000):
        test = ImageSet(torch.zeros(count, 3, 1, 1, dtype=torch.uint8), torch.zeros(count).long(), 2)
        probes = BiasProbes(frozen, from_dict(frozen.config), Splits(test, test, test), CPU)
        gaps = probes.chosen.diff()
        assert len(probes.chosen) == min(count, IMAGES) and int(probes.chosen[-1]) < count
        assert len(gaps) == 0 or int(gaps.max() - gaps.min()) <= 1
        sizes = [len(part) for part in probes.chosen.split(probes.batch)]
        assert len(sizes) == probes.batches and max(sizes) <= BATCH and max(sizes) - min(sizes) <= len(sizes)


def test_images_that_cannot_be_decoded_are_left_out(tiny_arm: MakeArm) -> None:
    frozen = tiny_arm("method=ce", *SHORT)
    arm, splits = untrained(frozen)
    teacher = Teacher(prepare_teacher(arm.config.teacher, arm.config.data, splits).model)
    probes = BiasProbes(frozen, arm.config, splits, CPU, teacher)
    whole = described(arm, probes, splits)
    # the first batch and a third of the others; such images come black and without a label
    lost = probes.chosen[
        (torch.arange(len(probes.chosen)) % 3 == 0) | (torch.arange(len(probes.chosen)) < probes.batch)
    ]
    images, labels = splits.test.images.clone(), splits.test.labels.clone()
    images[lost], labels[lost] = 0, -1
    broken = splits._replace(test=replace(splits.test, images=images, labels=labels))
    values = described(arm, BiasProbes(frozen, arm.config, broken, CPU, teacher), splits)
    assert values.keys() == whole.keys()
    for name, value in values.items():
        assert value == pytest.approx(whole[name], abs=0.1) and value != 0, name


def test_a_student_deeper_than_its_teacher_is_compared_with_it(tiny_arm: MakeArm) -> None:
    """Its layers are shared; which points the losses read changes nothing."""
    arms = [tiny_arm("method=ce", *SHORT, points) for points in ("student.points=2", "student.points=1")]
    found = []
    for frozen in arms:
        arm, splits = untrained(frozen)
        assert len(arm.student.blocks) > arm.config.teacher.depth
        found.append(described(arm, BiasProbes(frozen, arm.config, splits, CPU), splits))
    assert found[0].keys() == set(PROBES) and found[0] == found[1]
