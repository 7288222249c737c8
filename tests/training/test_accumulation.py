"""A batch in parts: gradients are averaged, partners of mixing stay together, and at 1 nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import TINY, MemoryRecorder, same_bits, state_of

from basd.compose import compose
from basd.config import FrozenArm
from basd.distributed import local_rows
from basd.errors import UserError
from basd.models.teacher import Teacher
from basd.training.arm import TrainingArm, _means
from basd.training.cohort import train_cohort

MakeArm = Callable[..., FrozenArm]
# what is a mean over images: cross-entropy with the labels and with the teacher
MEANS = ("method=kd", "student.drop_path=0.0", "recipe.clip_grad=0.0", "recipe.duration=2 steps", "runtime.log_every=1")


def train(arms: list[FrozenArm], folder: Path, **callbacks) -> list[MemoryRecorder]:
    recorders = [MemoryRecorder() for _ in arms]
    results = train_cohort(arms, [folder / arm.arm_key for arm in arms], recorders, **callbacks)
    assert [result.reason for result in results if result.status == "failed"] == []
    return recorders


@pytest.mark.parametrize("probability", [1.0, 0.0])
@pytest.mark.parametrize("parts", [2, 5])
def test_means_over_images_are_the_same_in_parts(
    parts: int, probability: float, tiny_arm: MakeArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients: list[dict[str, torch.Tensor]] = []
    finish = TrainingArm._finish_step

    def seen(self):
        gradients.append({name: p.grad.clone() for name, p in self.student.named_parameters()})
        return finish(self)

    monkeypatch.setattr(TrainingArm, "_finish_step", seen)
    whole = tiny_arm(*MEANS, f"mixing.probability={probability}")
    split = tiny_arm(*MEANS, f"mixing.probability={probability}", f"recipe.accumulation={parts}")
    (expected,) = train([whole], tmp_path)
    (got,) = train([split], tmp_path)
    assert len(gradients) == 4
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[2][name], gradient, rtol=1e-3, atol=1e-6)
    for (step, a), (other, b) in zip(expected.results[:2], got.results[:2], strict=True):
        assert step == other
        for name in ("train/ce", "train/loss", "loss/logit", "train/lr", "train/grad_norm"):
            assert (name in a) == (name in b)
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-3), name


def test_the_teacher_runs_on_a_part_at_a_time_and_once_for_the_cohort(
    tiny_arm: MakeArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    call = Teacher.__call__

    def seen(self, images):
        sizes.append(len(images))
        return call(self, images)

    monkeypatch.setattr(Teacher, "__call__", seen)
    rows = [(), ("selector=uniform",)]
    arms = [tiny_arm(*row, "recipe.duration=3 steps", "recipe.accumulation=4") for row in rows]
    together = train(arms, tmp_path / "together")
    assert sizes == [50] * 4 * 3
    (alone,) = train([arms[0]], tmp_path / "alone")
    assert alone.results == together[0].results
    key = arms[0].arm_key
    assert same_bits(state_of(tmp_path / "alone" / key), state_of(tmp_path / "together" / key))


def test_stopped_and_started_again_is_bit_equal(tiny_arm: MakeArm, tmp_path: Path) -> None:
    # drop path draws in each part: equal masks in all parts or unkeyed ones would show in neither run alone
    arm = tiny_arm("recipe.duration=7 steps", "recipe.accumulation=2", "recipe.ema_decay=0.9", "runtime.precision=bf16")
    (whole,) = train([arm], tmp_path / "whole")
    calls = iter(range(100))
    recorder, folder = MemoryRecorder(), tmp_path / "cut"
    train_cohort([arm], [folder], [recorder], stop=lambda: next(calls) >= 3)
    train_cohort([arm], [folder], [recorder])
    assert recorder.results == whole.results
    assert same_bits(state_of(folder), state_of(tmp_path / "whole" / arm.arm_key))


def test_parts_have_other_drop_path_masks(tiny_arm: MakeArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[float] = []
    step = TrainingArm._teacher_side

    def seen(self, *arguments):
        draws.append(float(torch.rand(())))
        return step(self, *arguments)

    monkeypatch.setattr(TrainingArm, "_teacher_side", seen)
    train([tiny_arm("method=ce", "recipe.duration=2 steps", "recipe.accumulation=4")], tmp_path)
    assert len(set(draws)) == 8


def test_scalars_of_a_step_are_means_over_the_parts_that_have_them() -> None:
    first, second = {"a": torch.tensor(1.0), "b": 4.0}, {"a": torch.tensor(3.0), "c": 5.0}
    assert _means([first, second]) == {"a": torch.tensor(2.0), "b": 4.0, "c": 5.0}


def test_every_part_holds_whole_pairs() -> None:
    taken = [local_rows(24, part, 3) for part in range(3)]
    assert sorted(torch.cat(taken).tolist()) == list(range(24))
    for rows in taken:
        assert torch.equal(rows + rows.flip(0), torch.full_like(rows, 23))


def test_it_is_part_of_the_key_only_where_it_is_chosen(tiny_arm: MakeArm) -> None:
    plain, one, two = (tiny_arm(*row) for row in ((), ("recipe.accumulation=1",), ("recipe.accumulation=2",)))
    assert (plain.arm_key, plain.cohort_key) == (one.arm_key, one.cohort_key)
    assert plain.arm_key != two.arm_key
    assert plain.cohort_key != two.cohort_key, "the teacher's batches differ"


def test_a_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(UserError, match=r"recipe.accumulation=3 parts.*a multiple of 6"):
        compose([*TINY, "recipe.accumulation=3"])
    with pytest.raises(UserError, match="more than the 45 pairs of 10 images"):
        compose([*TINY, "losses.rel.vertices=pooled", "losses.rel.num_pairs=64", "recipe.accumulation=20"])
