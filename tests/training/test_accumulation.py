"""A batch in parts: gradients are averaged, partners of mixing stay together, and at 1 nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.layers import DropPath
from tiny import TINY, MemoryRecorder, same_bits, state_of
from torch.nn.modules.module import register_module_forward_hook
from watching import TEACHER, forwards, gradients, student_steps

from basd.compose import compose
from basd.config import FrozenArm
from basd.distributed import local_rows
from basd.errors import UserError
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
def test_means_over_images_are_the_same_in_parts(probability: float, few_arm: MakeArm, tmp_path: Path) -> None:
    common = (*MEANS, f"mixing.probability={probability}")
    arms = [few_arm(*common, f"recipe.accumulation={parts}") for parts in (1, 2, 5)]
    steps: list[list[torch.Tensor]] = []
    with gradients(lambda found: steps.append([gradient.clone() for gradient in found])):
        recorders = [train([arm], tmp_path)[0] for arm in arms]
    expected, *split = recorders
    assert len(steps) == 6 and len(expected.results) >= 2
    for parts, first, recorder in zip((2, 5), steps[2::2], split, strict=True):
        assert len(first) == len(steps[0]) > 10
        for gradient, whole in zip(first, steps[0], strict=True):
            torch.testing.assert_close(gradient, whole, rtol=1e-3, atol=1e-6, msg=lambda m, n=parts: f"{n} parts: {m}")
        for (step, a), (other, b) in zip(expected.results[:2], recorder.results[:2], strict=True):
            assert step == other
            for name in ("train/ce", "train/loss", "loss/logit", "train/lr", "train/grad_norm"):
                assert (name in a) == (name in b), (parts, name)
                if name in a:
                    assert b[name] == pytest.approx(a[name], rel=1e-3), (parts, name)


def test_the_teacher_runs_on_a_part_at_a_time_and_once_for_the_cohort(few_arm: MakeArm, tmp_path: Path) -> None:
    sizes: list[int] = []
    rows = [(), ("selector=uniform",)]
    arms = [few_arm(*row, "recipe.duration=3 steps", "recipe.accumulation=4") for row in rows]
    with forwards(lambda width, images: sizes.append(images) if width == TEACHER else None):
        together = train(arms, tmp_path / "together")
    assert sizes == [10] * 4 * 3
    # a scalar that only the first part of a step has is not divided by the number of parts
    (whole,) = train([few_arm(*rows[1], "recipe.duration=3 steps")], tmp_path / "whole")
    first, expected = (recorder.results[0][1] for recorder in (together[1], whole))
    diagnosed = [name for name in expected if name.startswith("aligner/")]
    assert diagnosed and {n: first[n] for n in diagnosed} == pytest.approx({n: expected[n] for n in diagnosed}, rel=0.2)
    (alone,) = train([arms[0]], tmp_path / "alone")
    assert alone.results == together[0].results
    key = arms[0].arm_key
    assert same_bits(state_of(tmp_path / "alone" / key), state_of(tmp_path / "together" / key))


def test_stopped_and_started_again_is_bit_equal(few_arm: MakeArm, tmp_path: Path) -> None:
    # drop path draws in each part: equal masks in all parts or unkeyed ones would show in neither run alone
    arm = few_arm("recipe.duration=4 steps", "recipe.accumulation=2", "recipe.ema_decay=0.9")
    (whole,) = train([arm], tmp_path / "whole")
    calls = iter(range(100))
    recorder, folder = MemoryRecorder(), tmp_path / "cut"
    train_cohort([arm], [folder], [recorder], stop=lambda: next(calls) >= 2)
    train_cohort([arm], [folder], [recorder])
    assert recorder.results == whole.results
    assert same_bits(state_of(folder), state_of(tmp_path / "whole" / arm.arm_key))


def test_parts_have_other_drop_path_masks(few_arm: MakeArm, tmp_path: Path) -> None:
    parts: list[list[bool]] = []

    def seen(module: torch.nn.Module, _inputs: tuple, output: torch.Tensor) -> None:
        if isinstance(module, DropPath) and module.training:
            parts[-1] += output.flatten(1).ne(0).any(1).tolist()

    handle = register_module_forward_hook(seen)
    try:
        with student_steps(lambda *_: parts.append([])):
            train([few_arm("method=ce", "recipe.duration=2 steps", "recipe.accumulation=4")], tmp_path)
    finally:
        handle.remove()
    assert len(parts) == len({tuple(kept) for kept in parts}) == 8
    assert all(0.5 < sum(kept) / len(kept) < 1 for kept in parts)


def test_every_part_holds_whole_pairs() -> None:
    taken = [local_rows(24, part, 3) for part in range(3)]
    assert sorted(torch.cat(taken).tolist()) == list(range(24))
    for rows in taken:
        assert torch.equal(rows + rows.flip(0), torch.full_like(rows, 23))


def test_it_is_part_of_the_key_only_where_it_is_chosen(few_arm: MakeArm) -> None:
    plain, one, two = (few_arm(*row) for row in ((), ("recipe.accumulation=1",), ("recipe.accumulation=2",)))
    assert (plain.arm_key, plain.cohort_key) == (one.arm_key, one.cohort_key)
    assert plain.arm_key != two.arm_key
    assert plain.cohort_key != two.cohort_key, "the teacher's batches differ"


def test_a_batch_that_does_not_split_is_refused() -> None:
    with pytest.raises(UserError, match=r"recipe.accumulation=3 parts.*a multiple of 6"):
        compose([*TINY, "recipe.accumulation=3"])
    with pytest.raises(UserError, match="more than the 45 pairs of 10 images"):
        compose([*TINY, "losses.rel.vertices=pooled", "losses.rel.num_pairs=64", "recipe.accumulation=20"])
