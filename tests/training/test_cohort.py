"""One loop for one arm or many: the same bits alone and in any cohort, interrupted or not."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiny import MemoryRecorder, same_bits, state_of
from torch.overrides import TorchFunctionMode
from watching import STUDENT, TEACHER, forwards, student_steps

from basd.components.losses import attn
from basd.config import FrozenArm, from_dict
from basd.data.mixing import draw
from basd.errors import DISK_FULL, UserError
from basd.grid.ablations import PROBES
from basd.training import random_streams as streams
from basd.training.checkpoint import CURRENT, PREVIOUS
from basd.training.cohort import train_cohort, write_arm

MakeArm = Callable[..., FrozenArm]
# of `few_arm`; an epoch has 5 steps
BATCH = 40

# so that every test here holds for the bias probes too
PROBED = "runtime.probes=true"
# three steps an epoch, the third epoch begun
LENGTH = ("recipe.batch_size=72", "recipe.duration=7 steps")
VARIANTS = {
    "basd": (PROBED,),
    "without_rsd": ("losses.rsd.enabled=false",),
    "attn_only": (PROBED, "losses.rsd.enabled=false", "losses.rel.enabled=false", "losses.spectral.enabled=false"),
    "uniform": ("selector=uniform", "token_aligner=interpolate", "weighting=equal", "warmup=none"),
    "forward": ("selector=forward", "weighting=fixed", "warmup=simultaneous", "mixing=cutmix"),
    "single": ("views=single", "mixing=none", "selector.entropy=spread"),
    "independent": ("views.geometry=independent", "mixing=mixup", "token_aligner.gradient=detached"),
    "clean_targets": ("mixing.targets=clean", "weighting.order=ramp_then_weights", "weighting.scale=none"),
    # what changes from epoch to epoch: the decay of a2d's weight, and weights from the means of past epochs
    "a2d": ("method=a2d",),
    "dwa": ("weighting=dwa", "warmup=none"),
    "ce": ("method=ce", PROBED),
}


def run(arms: list[FrozenArm], folder: Path, **callbacks) -> tuple[list[MemoryRecorder], list]:
    recorders = [MemoryRecorder() for _ in arms]
    directories = [folder / arm.arm_key for arm in arms]
    results = train_cohort(arms, directories, recorders, **callbacks)
    return recorders, results


@pytest.fixture(scope="module")
def together(few_arm: MakeArm, tmp_path_factory: pytest.TempPathFactory):
    """All variants trained as one cohort."""
    folder = tmp_path_factory.mktemp("together")
    arms = {name: few_arm(*LENGTH, *overrides) for name, overrides in VARIANTS.items()}
    recorders, results = run(list(arms.values()), folder)
    assert [result.status for result in results] == ["complete"] * len(arms)
    return folder, arms, dict(zip(arms, recorders, strict=True)), {result.arm_key: result for result in results}


def test_every_arm_of_the_cohort_has_its_own_key_and_result(together) -> None:
    folder, arms, recorders, results = together
    assert len({arm.arm_key for arm in arms.values()}) == len(arms)
    assert len({arm.cohort_key for arm in arms.values()}) == 1
    for name, arm in arms.items():
        final = recorders[name].results[-1][1]
        assert final["test/top1"] == results[arm.arm_key].metrics["test/top1"]
        assert {"test/top5", "test/nll", "test/ece"} <= final.keys()
        assert {key for key in final if key.startswith("probe/")} == set(PROBES if PROBED in VARIANTS[name] else ())
        own = sum(value.numel() for value in state_of(folder / arm.arm_key).values())
        assert final["cost/student_parameters"] == own
        assert (final["cost/distillation_parameters"] == 0) == (name == "ce")
        assert state_of(folder / arm.arm_key).keys() == state_of(folder / arms["ce"].arm_key).keys()
        assert not list((folder / arm.arm_key).glob("checkpoint*")), "a complete arm keeps no checkpoint"
    states = [state_of(folder / arm.arm_key)["head.weight"] for arm in arms.values()]
    assert not any(torch.equal(states[0], other) for other in states[1:])


@pytest.mark.parametrize(
    "names", [("basd", "ce"), pytest.param(tuple(VARIANTS), marks=pytest.mark.full)], ids=["some", "all"]
)
def test_alone_is_bit_equal_to_the_cohort(together, names: tuple[str, ...], tmp_path: Path) -> None:
    folder, arms, recorders, _ = together
    for name in names:
        (alone,), _ = run([arms[name]], tmp_path)
        assert alone.results == recorders[name].results, name
        assert same_bits(state_of(tmp_path / arms[name].arm_key), state_of(folder / arms[name].arm_key)), name


def stopped_after(steps: int) -> Callable[[], bool]:
    calls = iter(range(100))
    return lambda: next(calls) >= steps


# in the first epoch, at its end, in the second
STOPS = (1, 3, 4)


# variants with state that lasts over steps: loss scales, ramps, a decay per epoch, means of past epochs; and one without
RESUMED = ("basd", "clean_targets", "a2d", "dwa", "ce")


@pytest.mark.parametrize("names", [RESUMED, pytest.param(tuple(VARIANTS), marks=pytest.mark.full)], ids=["some", "all"])
def test_stopped_and_started_again_is_bit_equal(together, names: tuple[str, ...], tmp_path: Path) -> None:
    """All together, three times."""
    folder, arms, recorders, _ = together
    chosen = [arms[name] for name in names]
    again = [MemoryRecorder() for _ in chosen]
    directories = [tmp_path / arm.arm_key for arm in chosen]
    for before, after in itertools.pairwise((0, *STOPS)):
        results = train_cohort(chosen, directories, again, stop=stopped_after(after - before))
        assert {result.status for result in results} == {"stopped"}
    results = train_cohort(chosen, directories, again)
    assert {result.status for result in results} == {"complete"}
    for name, directory, recorder in zip(names, directories, again, strict=True):
        assert recorder.results == recorders[name].results, name
        assert same_bits(state_of(directory), state_of(folder / directory.name)), name


@pytest.mark.parametrize(
    "names", [("forward",), pytest.param(tuple(VARIANTS), marks=pytest.mark.full)], ids=["one", "all"]
)
def test_stopped_alone_is_bit_equal_to_the_cohort(together, names: tuple[str, ...], tmp_path: Path) -> None:
    folder, arms, recorders, _ = together
    for name in names:
        recorder, directory = MemoryRecorder(), tmp_path / name
        (first,) = train_cohort([arms[name]], [directory], [recorder], stop=stopped_after(4))
        (second,) = train_cohort([arms[name]], [directory], [recorder])
        assert (first.status, second.status) == ("stopped", "complete"), name
        assert recorder.results == recorders[name].results, name
        assert same_bits(state_of(directory), state_of(folder / arms[name].arm_key)), name


@pytest.mark.parametrize("aligner", ["mean", pytest.param("conv", marks=pytest.mark.full)])
def test_students_of_two_grids_make_one_cohort(
    aligner: str, tiny_arm: MakeArm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What arms share of the teacher is kept apart by the student's grid."""
    common = (
        f"head_aligner={aligner}",
        "warmup=none",
        "recipe.duration=3 steps",
        "losses.rel.num_pairs=6",
        "selector=last",
    )
    arms = [tiny_arm(*common, f"student.patch_size={size}") for size in (4, 10)]
    assert arms[0].cohort_key == arms[1].cohort_key and arms[0].arm_key != arms[1].arm_key

    def with_attention(threshold: float) -> list[bool]:
        """Whether each arm's first step has the loss."""
        monkeypatch.setattr(attn, "UNIFORM", threshold)
        recorders = [MemoryRecorder() for _ in arms]
        for arm, recorder in zip(arms, recorders, strict=True):
            train_cohort([arm], [tmp_path / f"{threshold}-{arm.arm_key}"], [recorder], stop=stopped_after(1))
        return ["loss/attn" in recorder.results[0][1] for recorder in recorders]

    # a threshold between the two grids: information taken from the other's shows in which points are skipped
    low, high = 1e-3, 1.0
    for _ in range(5):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if any(with_attention(middle)) else (low, middle)
    assert sorted(with_attention(low)) == [False, True]
    alone = {arm.arm_key: run([arm], tmp_path / "alone")[0][0].results for arm in arms}
    for order in (arms, arms[::-1]):
        folder = tmp_path / f"first_{order[0].arm_key}"
        recorders, _ = run(order, folder)
        for arm, recorder in zip(order, recorders, strict=True):
            assert recorder.results == alone[arm.arm_key]
            assert same_bits(state_of(folder / arm.arm_key), state_of(tmp_path / "alone" / arm.arm_key))


def history_of(directory: Path) -> str | None:
    path = directory / "artifacts" / "selector_history.csv"
    return path.read_text() if path.exists() else None


@pytest.mark.parametrize(("probability", "epochs"), [(0.85, {2}), pytest.param(0.7, {1, 2, 3}, marks=pytest.mark.full)])
def test_the_selector_history_survives_steps_without_a_loss(
    probability: float, epochs: set[int], few_arm: MakeArm, tmp_path: Path
) -> None:
    """`skip` leaves mixed batches out: the last α of an epoch may lie before the stop, and an epoch may have none."""
    arm = few_arm("warmup=none", "mixing.targets=skip", f"mixing.probability={probability}")
    (whole,), _ = run([arm], tmp_path)
    recorder, cut = MemoryRecorder(), tmp_path / "cut"
    for before, after in itertools.pairwise((0, 5, 7, 10, 12, 13)):
        train_cohort([arm], [cut], [recorder], stop=stopped_after(after - before))
    train_cohort([arm], [cut], [recorder])
    assert recorder.results == whole.results
    history = history_of(cut)
    assert history is not None and history == history_of(tmp_path / arm.arm_key)
    config = from_dict(arm.config)
    unmixed = [
        step
        for step in range(15)
        if draw(config.mixing, 20, 20, streams.generator(0, streams.MIXING, step // 5, step)) is None
    ]
    written = {int(row.split(",")[0]) // 5 for row in history.split()[1:]}
    assert {1 + step // 5 for step in unmixed} == epochs == written


@pytest.mark.parametrize("ahead", [3, pytest.param(4, marks=pytest.mark.full)])
def test_arms_at_different_steps_make_one_cohort(ahead: int, together, tmp_path: Path) -> None:
    """Whether one has just ended the epoch that the others are in or is in the middle of a later one."""
    folder, arms, recorders, _ = together
    names = ("basd", "ce", "forward")
    chosen = [arms[name] for name in names]
    records = [MemoryRecorder() for _ in chosen]
    directories = [tmp_path / arm.arm_key for arm in chosen]
    for arm, directory, recorder, after in zip(chosen, directories, records, (ahead, 0, 2), strict=True):
        if after:
            train_cohort([arm], [directory], [recorder], stop=stopped_after(after))
    results = train_cohort(chosen, directories, records)
    assert {result.status for result in results} == {"complete"}
    for name, directory, recorder in zip(names, directories, records, strict=True):
        places = [(step, metric) for step, values in recorder.events for metric in values]
        assert len(places) == len(set(places)), "a point is recorded twice"
        assert recorder.results == recorders[name].results, name
        assert same_bits(state_of(directory), state_of(folder / directory.name)), name


def test_a_damaged_checkpoint_loses_time_but_no_result(together, tmp_path: Path) -> None:
    folder, arms, recorders, _ = together
    arm, first, stopped = arms["basd"], MemoryRecorder(), tmp_path / "stopped"
    train_cohort([arm], [stopped], [first], stop=stopped_after(6))
    assert (stopped / CURRENT).exists() and (stopped / PREVIOUS).exists()
    for damage, names in (("cut", [CURRENT]), ("gone", []), ("both_cut", [CURRENT, PREVIOUS])):
        directory, recorder = shutil.copytree(stopped, tmp_path / damage), MemoryRecorder()
        recorder.events = list(first.events)
        for name in names:
            data = (directory / name).read_bytes()
            (directory / name).write_bytes(data[: len(data) // 2])
        if damage == "gone":
            (directory / CURRENT).unlink()
        train_cohort([arm], [directory], [recorder])
        assert recorder.results == recorders["basd"].results, damage
        assert same_bits(state_of(directory), state_of(folder / arm.arm_key)), damage


def test_a_lost_record_starts_the_arm_again(together, tmp_path: Path) -> None:
    _, arms, recorders, _ = together
    train_cohort([arms["ce"]], [tmp_path], [MemoryRecorder()], stop=stopped_after(4))
    fresh = MemoryRecorder()
    train_cohort([arms["ce"]], [tmp_path], [fresh])
    assert fresh.results == recorders["ce"].results


def test_one_failing_arm_never_stops_the_others(together, tmp_path: Path) -> None:
    _, arms, recorders, _ = together

    def breaks(student: torch.nn.Module, arm: int, step: int) -> None:
        if (arm, step) == (0, 4):
            with torch.no_grad():
                student.head.bias.fill_(float("nan"))

    with student_steps(breaks):
        records, results = run([arms["basd"], arms["ce"]], tmp_path)
    assert [(result.arm_key, result.status) for result in results] == [
        (arms["basd"].arm_key, "failed"),
        (arms["ce"].arm_key, "complete"),
    ]
    assert "the loss of step 4 is not finite" in results[0].reason
    assert records[1].results == recorders["ce"].results


def test_an_arm_taken_over_leaves_at_its_next_checkpoint(together, tmp_path: Path) -> None:
    _, arms, _, _ = together
    _, results = run([arms["basd"], arms["ce"]], tmp_path, owned=lambda key: key != arms["basd"].arm_key)
    statuses = {result.arm_key: result.status for result in results}
    assert statuses == {arms["basd"].arm_key: "stopped", arms["ce"].arm_key: "complete"}


def test_a_teacher_that_changed_is_refused(together, tmp_path: Path) -> None:
    _, arms, _, _ = together
    values = arms["basd"].to_dict()
    changed = FrozenArm.from_dict({**values, "teacher_fingerprint": "0" * 16})
    with pytest.raises(UserError, match="are not those of the plan"):
        run([changed], tmp_path)
    changed = FrozenArm.from_dict({**values, "data_fingerprint": "0" * 16})
    with pytest.raises(UserError, match="the data here .* is not that of the plan"):
        run([changed], tmp_path)


# the students have 3
TEACHER_HEADS = 2


class Softmaxes(TorchFunctionMode):
    """Counts the teacher's attention maps that are built, by images and blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.Tensor.softmax and args[0].ndim == 4 and args[0].shape[1] == TEACHER_HEADS:
            self.maps += len(args[0])
        return function(*args, **(kwargs or {}))


def test_the_teacher_runs_once_a_step_and_attention_only_for_arms_that_use_it(few_arm: MakeArm, tmp_path: Path) -> None:
    steps = ("recipe.duration=4 steps", "warmup=none")
    rows = [(), ("selector=uniform",)]
    calls: list[int] = []
    for attention, maps in (("losses.attn.enabled=false", 0), ("losses.attn.enabled=true", 4 * 2 * BATCH)):
        calls.clear()
        with forwards(lambda width, images: calls.append(images) if width == TEACHER else None), Softmaxes() as counted:
            run([few_arm(*row, attention, *steps) for row in rows], tmp_path)
        assert calls == [BATCH] * 4, attention
        # the maps of two blocks, rebuilt once for both arms
        assert counted.maps == maps


# overrides → (steps in which the teacher looks, its forwards, student forwards) in the 15 steps of three epochs
RESTING = {
    "late": (("warmup=staggered", *(f"warmup.starts.{n}=0.6" for n in ("rsd", "rel", "attn", "spectral"))), 6, 6, 15),
    "skip": (("warmup=none", "mixing.targets=skip", "mixing.probability=0.7"), 4, 4, 15),
    # rsd from the start, the loss on two views from step 9 on
    "late_views": (
        (
            "warmup=staggered",
            *("losses.rel.vertices=logits", "warmup.starts.rel=0.6"),
            *("losses.attn.enabled=false", "losses.spectral.enabled=false"),
        ),
        15,
        15 + 6,
        15 + 6,
    ),
}


def test_models_run_only_where_a_loss_reads_them(few_arm: MakeArm, tmp_path: Path) -> None:
    for name, (overrides, steps, teacher_calls, student_calls) in RESTING.items():
        calls: Counter[int] = Counter()

        def count(width: int, images: int, calls: Counter[int] = calls) -> None:
            # evaluation has other batches
            calls[width] += images == BATCH

        with forwards(count):
            (recorder,), results = run([few_arm(*overrides, "runtime.log_every=1")], tmp_path)
        assert [result.status for result in results] == ["complete"], name
        assert calls == {TEACHER: teacher_calls, STUDENT: student_calls}, name
        losing = [step for step, values in recorder.results if any(key.startswith("loss/") for key in values)]
        assert len(losing) == steps, name


def test_no_distillation_parameter_is_in_the_exported_student(together) -> None:
    folder, arms, _, _ = together
    config = arms["basd"].config["student"]
    fresh = timm.models.vision_transformer.VisionTransformer(
        img_size=config["image_size"], patch_size=config["patch_size"], num_classes=10,
        embed_dim=config["width"], depth=config["depth"], num_heads=config["heads"],
    )  # fmt: skip
    fresh.load_state_dict(state_of(folder / arms["basd"].arm_key), strict=True)


@pytest.mark.full
def test_killed_at_any_moment_and_started_again_ends_with_the_same_bits(together, tmp_path: Path) -> None:
    """SIGKILL a real process three times, at different depths of the run."""
    folder, arms, recorders, _ = together
    arm = arms["basd"]
    write_arm(tmp_path, arm)
    command = [sys.executable, "-m", "basd.training", str(tmp_path / "arm.json")]
    record = tmp_path / "metrics.jsonl"
    for lines in (2, 4, 6):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        limit = time.monotonic() + 120
        while time.monotonic() < limit and process.poll() is None:
            if record.exists() and len(record.read_bytes().splitlines()) >= lines:
                break
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert arm.arm_key in done.stdout
    assert "complete" in done.stdout
    killed = MemoryRecorder()
    for line in record.read_text().splitlines():
        event = json.loads(line)
        killed.metrics(event["step"], event["metrics"])
    assert killed.results == recorders["basd"].results
    assert same_bits(state_of(tmp_path), state_of(folder / arm.arm_key))


def test_an_arm_that_finds_no_room_goes_on_where_there_is(
    few_arm: MakeArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk ends nothing for good: the arm is left, its neighbour too, and both end with the same bits."""
    arms = [few_arm("recipe.duration=2 epochs"), few_arm("method=ce", "recipe.duration=2 epochs")]
    expected, _ = run(arms, tmp_path / "whole")
    saved, write = itertools.count(), torch.save

    def save(state: dict[str, Any], file: Any) -> None:
        # torch.save says it in its own words, behind which the system's stand
        if next(saved) >= 2:
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                raise RuntimeError("unexpected pos 704 vs 598") from error
        write(state, file)

    recorders = [MemoryRecorder() for _ in arms]
    directories = [tmp_path / "cut" / arm.arm_key for arm in arms]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        results = train_cohort(arms, directories, recorders)
    assert [(result.status, result.reason) for result in results] == [("stopped", DISK_FULL)] * 2
    results = train_cohort(arms, directories, recorders)
    assert [result.status for result in results] == ["complete"] * 2
    for arm, recorder, whole in zip(arms, recorders, expected, strict=True):
        assert recorder.results == whole.results
        assert same_bits(state_of(tmp_path / "cut" / arm.arm_key), state_of(tmp_path / "whole" / arm.arm_key))
