"""One loop for one arm or many: the same bits alone and in any cohort, interrupted or not."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import MemoryRecorder, same_bits, state_of

from basd.components.losses import attn
from basd.config import FrozenArm, from_dict
from basd.data.mixing import draw
from basd.errors import DISK_FULL
from basd.grid.ablations import PROBES
from basd.training import cohort as cohort_module
from basd.training import random_streams as streams
from basd.training.arm import TrainingArm
from basd.training.checkpoint import CURRENT, PREVIOUS
from basd.training.cohort import train_cohort, write_arm

MakeArm = Callable[..., FrozenArm]

# so that every test here holds for the bias probes too
PROBED = "runtime.probes=true"
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
def together(tiny_arm: MakeArm, tmp_path_factory: pytest.TempPathFactory):
    """All variants trained as one cohort."""
    folder = tmp_path_factory.mktemp("together")
    arms = {name: tiny_arm(*overrides) for name, overrides in VARIANTS.items()}
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


@pytest.mark.parametrize("name", VARIANTS)
def test_alone_is_bit_equal_to_the_cohort(together, name: str, tmp_path: Path) -> None:
    folder, arms, recorders, _ = together
    (alone,), _ = run([arms[name]], tmp_path)
    assert alone.results == recorders[name].results
    assert same_bits(state_of(tmp_path / arms[name].arm_key), state_of(folder / arms[name].arm_key))


@pytest.mark.parametrize(("name", "after"), [("basd", 3), ("basd", 5), *((name, 7) for name in VARIANTS)])
def test_stopped_and_started_again_is_bit_equal(together, name: str, after: int, tmp_path: Path) -> None:
    folder, arms, recorders, _ = together
    arm = arms[name]
    recorder = MemoryRecorder()
    steps = 0

    def stop() -> bool:
        nonlocal steps
        steps += 1
        return steps > after

    (first,) = train_cohort([arm], [tmp_path], [recorder], stop=stop)
    assert first.status == "stopped"
    (second,) = train_cohort([arm], [tmp_path], [recorder])
    assert second.status == "complete"
    assert recorder.results == recorders[name].results
    assert same_bits(state_of(tmp_path), state_of(folder / arm.arm_key))


@pytest.mark.parametrize("aligner", ["conv", "mean"])
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
    real, known = attn.AttentionLoss._information, []

    def information(*args):
        known[-1].append(real(*args))
        return known[-1][-1]

    monkeypatch.setattr(attn.AttentionLoss, "_information", information)
    for arm in arms:
        known.append([])
        run([arm], tmp_path / "first")
    fine, coarse = (torch.stack(values)[:, -1] for values in known)
    # a threshold between the two grids: a value taken from the other's shows in which points are skipped
    low, high = sorted((fine, coarse), key=lambda values: float(values.mean()))
    assert 2 * low.max() < high.min()
    monkeypatch.setattr(attn, "UNIFORM", float(2 * low.max()) * 1.02)
    alone = {arm.arm_key: run([arm], tmp_path / "alone")[0][0].results for arm in arms}
    assert len({"loss/attn" in values[0][1] for values in alone.values()}) == 2
    for order in (arms, arms[::-1]):
        folder = tmp_path / f"first_{order[0].arm_key}"
        recorders, _ = run(order, folder)
        for arm, recorder in zip(order, recorders, strict=True):
            assert recorder.results == alone[arm.arm_key]
            assert same_bits(state_of(folder / arm.arm_key), state_of(tmp_path / "alone" / arm.arm_key))


def history_of(directory: Path) -> str | None:
    path = directory / "artifacts" / "selector_history.csv"
    return path.read_text() if path.exists() else None


@pytest.mark.parametrize(("probability", "epochs"), [(0.7, {1, 2, 3}), (0.85, {2})])
@pytest.mark.parametrize("after", [5, 7, 10, 12, 13])
def test_the_selector_history_survives_steps_without_a_loss(
    after: int, probability: float, epochs: set[int], tiny_arm: MakeArm, tmp_path: Path
) -> None:
    """`skip` leaves mixed batches out: the last α of an epoch may lie before the stop, and an epoch may have none."""
    arm = tiny_arm("warmup=none", "mixing.targets=skip", f"mixing.probability={probability}")
    (whole,), _ = run([arm], tmp_path / "whole")
    recorder, calls = MemoryRecorder(), iter(range(100))
    train_cohort([arm], [tmp_path], [recorder], stop=lambda: next(calls) >= after)
    train_cohort([arm], [tmp_path], [recorder])
    assert recorder.results == whole.results
    history = history_of(tmp_path)
    assert history is not None and history == history_of(tmp_path / "whole" / arm.arm_key)
    config = from_dict(arm.config)
    unmixed = [
        step
        for step in range(15)
        if draw(config.mixing, 20, 20, streams.generator(0, streams.MIXING, step // 5, step)) is None
    ]
    assert {1 + step // 5 for step in unmixed} == epochs == {int(row.split(",")[0]) // 5 for row in history.split()[1:]}


@pytest.mark.parametrize("ahead", [7, 5])
def test_arms_at_different_steps_make_one_cohort(ahead: int, together, tmp_path: Path) -> None:
    """Whether one is in the middle of a later epoch or has just ended the epoch that the others are in."""
    folder, arms, recorders, _ = together
    chosen = [arms["basd"], arms["ce"], arms["forward"]]
    records = [MemoryRecorder() for _ in chosen]
    directories = [tmp_path / arm.arm_key for arm in chosen]
    for arm, directory, recorder, after in zip(chosen, directories, records, (ahead, 0, 3), strict=True):
        assert from_dict(arm.config).recipe.batch_size == 200, "an epoch has 5 steps"
        if after:
            calls = iter(range(100))
            train_cohort([arm], [directory], [recorder], stop=lambda after=after, calls=calls: next(calls) >= after)
    results = train_cohort(chosen, directories, records)
    assert {result.status for result in results} == {"complete"}
    for name, arm, recorder in zip(("basd", "ce", "forward"), chosen, records, strict=True):
        places = [(step, metric) for step, values in recorder.events for metric in values]
        assert len(places) == len(set(places)), "a point is recorded twice"
        assert recorder.results == recorders[name].results
        assert same_bits(state_of(tmp_path / arm.arm_key), state_of(folder / arm.arm_key))


def test_the_first_step_of_every_loss_is_recorded(together) -> None:
    _, arms, recorders, _ = together
    warmup = from_dict(arms["basd"].config).warmup
    for name in ("rsd", "rel", "attn", "spectral"):
        expected = next(s for s in range(1, 16) if warmup.ramp(name, s - 1, arms["basd"].total_steps) > 0)
        assert min(step for step, values in recorders["basd"].results if f"loss/{name}" in values) == expected


def test_other_seeds_are_other_arms(tiny_arm: MakeArm, together, tmp_path: Path) -> None:
    folder, arms, _, _ = together
    other = tiny_arm("method=ce", seed=1)
    assert other.configuration_key == arms["ce"].configuration_key
    assert other.arm_key != arms["ce"].arm_key
    assert other.cohort_key != arms["ce"].cohort_key
    run([other], tmp_path)
    assert not same_bits(state_of(tmp_path / other.arm_key), state_of(folder / arms["ce"].arm_key))


@pytest.mark.parametrize("damage", ["cut", "gone_current", "both_cut"])
def test_a_damaged_checkpoint_loses_time_but_no_result(together, damage: str, tmp_path: Path) -> None:
    folder, arms, recorders, _ = together
    arm, recorder = arms["basd"], MemoryRecorder()
    calls = iter(range(100))
    train_cohort([arm], [tmp_path], [recorder], stop=lambda: next(calls) >= 12)
    assert (tmp_path / CURRENT).exists()
    assert (tmp_path / PREVIOUS).exists()
    for name in {"cut": [CURRENT], "gone_current": [], "both_cut": [CURRENT, PREVIOUS]}[damage]:
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
    if damage == "gone_current":
        (tmp_path / CURRENT).unlink()
    train_cohort([arm], [tmp_path], [recorder])
    assert recorder.results == recorders["basd"].results
    assert same_bits(state_of(tmp_path), state_of(folder / arm.arm_key))


def test_a_lost_record_starts_the_arm_again(together, tmp_path: Path) -> None:
    _, arms, recorders, _ = together
    calls = iter(range(100))
    train_cohort([arms["ce"]], [tmp_path], [MemoryRecorder()], stop=lambda: next(calls) >= 7)
    fresh = MemoryRecorder()
    train_cohort([arms["ce"]], [tmp_path], [fresh])
    assert fresh.results == recorders["ce"].results


def test_one_failing_arm_never_stops_the_others(together, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, arms, recorders, _ = together
    real = TrainingArm.train_step

    def train_step(self: TrainingArm, batch, teacher):
        if self.config.method == "basd" and self.step == 4:
            with torch.no_grad():
                self.student.head.bias.fill_(float("nan"))
        return real(self, batch, teacher)

    monkeypatch.setattr(TrainingArm, "train_step", train_step)
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
    with pytest.raises(cohort_module.UserError, match="are not those of the plan"):
        run([changed], tmp_path)
    changed = FrozenArm.from_dict({**values, "data_fingerprint": "0" * 16})
    with pytest.raises(cohort_module.UserError, match="the data here .* is not that of the plan"):
        run([changed], tmp_path)


def test_the_teacher_runs_once_a_step_and_attention_only_for_arms_that_use_it(
    tiny_arm: MakeArm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from basd.models.taps import Tapped
    from basd.models.teacher import Teacher

    calls = {"teacher": 0, "attention": 0}
    real_call, real_attention = Teacher.__call__, Tapped.attention

    def call(self, images):
        calls["teacher"] += 1
        return real_call(self, images)

    def attention(self, block, *images):
        calls["attention"] += 1
        return real_attention(self, block, *images)

    monkeypatch.setattr(Teacher, "__call__", call)
    monkeypatch.setattr(Tapped, "attention", attention)
    steps = ("recipe.duration=4 steps", "warmup=none")
    run(
        [
            tiny_arm("losses.attn.enabled=false", *steps),
            tiny_arm("selector=uniform", "losses.attn.enabled=false", *steps),
        ],
        tmp_path,
    )
    assert calls == {"teacher": 4, "attention": 0}
    run([tiny_arm(*steps), tiny_arm("selector=uniform", *steps)], tmp_path)
    assert calls == {"teacher": 8, "attention": 4 * 2}, "two layers, rebuilt once for both arms"


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


@pytest.mark.parametrize("name", RESTING)
def test_models_run_only_where_a_loss_reads_them(
    name: str, tiny_arm: MakeArm, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from basd.models.student import TappedStudent
    from basd.models.teacher import Teacher

    overrides, steps, teacher_calls, student_calls = RESTING[name]
    calls = {Teacher: 0, TappedStudent: 0}

    def count(kind: type) -> None:
        real = kind.__call__

        def call(self, images):
            calls[kind] += 1
            return real(self, images)

        monkeypatch.setattr(kind, "__call__", call)

    arm = tiny_arm(*overrides, "runtime.log_every=1")
    count(Teacher)
    count(TappedStudent)
    (recorder,), results = run([arm], tmp_path)
    assert [result.status for result in results] == ["complete"]
    assert calls == {Teacher: teacher_calls, TappedStudent: student_calls}
    losing = [step for step, values in recorder.results if any(key.startswith("loss/") for key in values)]
    assert len(losing) == steps


def test_no_distillation_parameter_is_in_the_exported_student(together) -> None:
    import timm

    folder, arms, _, _ = together
    config = arms["basd"].config["student"]
    fresh = timm.models.vision_transformer.VisionTransformer(
        img_size=config["image_size"], patch_size=config["patch_size"], num_classes=10,
        embed_dim=config["width"], depth=config["depth"], num_heads=config["heads"],
    )  # fmt: skip
    fresh.load_state_dict(state_of(folder / arms["basd"].arm_key), strict=True)


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again_ends_with_the_same_bits(together, tmp_path: Path) -> None:
    """SIGKILL a real process three times, at different depths of the run."""
    folder, arms, recorders, _ = together
    arm = arms["basd"]
    write_arm(tmp_path, arm)
    command = [sys.executable, "-m", "basd.training", str(tmp_path / "arm.json")]
    record = tmp_path / "metrics.jsonl"
    for lines in (2, 6, 9):
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
    tiny_arm: MakeArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk ends nothing for good: the arm is left, its neighbour too, and both end with the same bits."""
    arms = [tiny_arm("recipe.duration=3 epochs"), tiny_arm("method=ce", "recipe.duration=3 epochs")]
    expected, _ = run(arms, tmp_path / "whole")
    saves, write = [], cohort_module.save_checkpoint

    def save(directory: Path, state: dict[str, Any]) -> None:
        saves.append(directory)
        # torch.save says it in its own words, behind which the system's stand
        if len(saves) > 2:
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError as error:
                raise RuntimeError("unexpected pos 704 vs 598") from error
        write(directory, state)

    recorders = [MemoryRecorder() for _ in arms]
    directories = [tmp_path / "cut" / arm.arm_key for arm in arms]
    monkeypatch.setattr(cohort_module, "save_checkpoint", save)
    results = train_cohort(arms, directories, recorders)
    assert [(result.status, result.reason) for result in results] == [("stopped", DISK_FULL)] * 2
    monkeypatch.setattr(cohort_module, "save_checkpoint", write)
    results = train_cohort(arms, directories, recorders)
    assert [result.status for result in results] == ["complete"] * 2
    for arm, recorder, whole in zip(arms, recorders, expected, strict=True):
        assert recorder.results == whole.results
        assert same_bits(state_of(tmp_path / "cut" / arm.arm_key), state_of(tmp_path / "whole" / arm.arm_key))
