"""A probe times real steps and leaves nothing behind; the prediction follows the ledger's way of handing out arms."""

from __future__ import annotations

import dataclasses
import gc
import random
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from grid_fakes import make_plan as fake_plan
from tiny import TINY
from torch.nn.modules.module import register_module_forward_hook

from basd.cli import main
from basd.compose import compose
from basd.config import FrozenArm
from basd.data import load as load_data
from basd.grid.ledger import Ledger
from basd.grid.options import GridOptions
from basd.grid.plan import Preparer, make_plan
from basd.grid.probe import NO_ROOM, TIMED, WARM, Costs, Probe, measure, predict, structure_of
from basd.objective import Objective
from basd.training.arm import TrainingArm

Make = Callable[..., FrozenArm]


def random_state() -> tuple[object, ...]:
    return random.getstate(), tuple(numpy.random.get_state()[1]), tuple(torch.get_rng_state().tolist())


@pytest.fixture
def after_objectives() -> Iterator[Callable[[Callable[[Objective, Any], None]], None]]:
    """Calls a function with the objective and its output after each step of any arm."""
    handles = []

    def add(look: Callable[[Objective, Any], None]) -> None:
        handles.append(
            register_module_forward_hook(
                lambda module, _, output: look(module, output) if isinstance(module, Objective) else None
            )
        )

    yield add
    for handle in handles:
        handle.remove()


def test_a_probe_measures_every_configuration_once_and_leaves_nothing(
    tiny_arm: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_objectives
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    arms = [tiny_arm(*row, seed=seed) for row in ([], ["selector=uniform"], ["method=ce"]) for seed in (0, 1)]
    ramps: list[set[float]] = []
    sizes: list[int] = []
    evaluate = TrainingArm.evaluate

    def seen_evaluate(self, images, split):
        sizes.append(len(images))
        assert split == "val"
        return evaluate(self, images, split)

    after_objectives(
        lambda _, output: ramps.append({float(v) for name, v in output.parts.items() if name.startswith("ramp/")})
    )
    monkeypatch.setattr(TrainingArm, "evaluate", seen_evaluate)
    before, threads = random_state(), torch.get_num_threads()
    probe = measure(arms)
    assert random_state() == before
    assert torch.get_num_threads() == threads
    assert list(tmp_path.rglob("*")) == [tmp_path / "tmp"]
    # three configurations and the leader, and every loss of each counts from the first step
    assert len(ramps) == 4 * (WARM + TIMED)
    assert all(values <= {1.0} for values in ramps)
    assert sum(bool(values) for values in ramps) == 3 * (WARM + TIMED)
    (costs,) = probe.costs.values()
    assert set(costs.step) == {arm.configuration_key for arm in arms}
    assert all(seconds > 0 for seconds in (*costs.step.values(), *costs.evaluation.values(), costs.setup))
    assert costs.shared >= 0
    assert costs.step[arms[0].configuration_key] > costs.step[arms[-1].configuration_key]
    splits = load_data(compose(TINY).config.data)
    assert (costs.validation_images, costs.test_images) == (len(splits.validation), len(splits.test))
    assert costs.steps_per_epoch == len(splits.train) // 200
    assert set(sizes) == {min(256, len(splits.validation))}
    assert probe.failed == {}
    assert probe.of_step(arms[0]) == costs.step[arms[0].configuration_key]


@pytest.mark.full
def test_arms_of_two_structures_are_measured_apart(tiny_arm: Make, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arms = [tiny_arm("method=ce"), tiny_arm("method=ce", "recipe.batch_size=100"), tiny_arm("method=ce", seed=3)]
    assert structure_of(arms[0]) == structure_of(arms[2]) != structure_of(arms[1])
    probe = measure(arms)
    assert set(probe.costs) == {structure_of(arms[0]), structure_of(arms[1])}
    assert probe.costs[structure_of(arms[1])].steps_per_epoch == 11


@pytest.mark.full
def test_more_configurations_than_a_cohort_holds(tiny_arm: Make, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    arms = [tiny_arm("method=ce", f"recipe.lr=0.00{n}", "runtime.cohort_size=2") for n in (1, 2, 3)]
    (costs,) = measure(arms).costs.values()
    assert set(costs.step) == {arm.configuration_key for arm in arms}


@pytest.mark.parametrize(
    ("places", "measured"),
    [(3, 3), pytest.param(2, 1, marks=pytest.mark.full), pytest.param(1, 0, marks=pytest.mark.full)],
)
def test_a_cohort_that_does_not_fit_is_measured_in_parts(
    tiny_arm: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_objectives, places: int, measured: int
) -> None:
    """Memory has room for so many arms. The leader is measured beside its twin, every other arm beside both."""
    monkeypatch.chdir(tmp_path)
    arms = [tiny_arm("method=ce", f"recipe.lr=0.00{n}") for n in (1, 2, 3)]
    alive: weakref.WeakSet[Objective] = weakref.WeakSet()

    def limited(objective: Objective, _: object) -> None:
        alive.add(objective)
        if len(alive) > places:
            raise torch.OutOfMemoryError

    after_objectives(limited)
    monkeypatch.setattr("basd.training.cohort.WORTH_COLLECTING", 0)
    gc.collect()
    gc.freeze()  # each end of an arm collects: what other tests have imported is left out
    probe = measure(arms)
    assert sum(len(costs.step) for costs in probe.costs.values()) == measured
    assert list(probe.failed.values()) == [NO_ROOM] * (3 - measured)
    if measured == 3:
        (costs,) = probe.costs.values()
        assert set(costs.step) == set(costs.held) == {arm.configuration_key for arm in arms}


def test_a_configuration_that_fails_is_told_and_the_others_are_measured(
    tiny_arm: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, after_objectives
) -> None:
    monkeypatch.chdir(tmp_path)
    good, bad = tiny_arm("method=ce"), tiny_arm("weighting=equal")

    def fails(objective: Objective, _: object) -> None:
        if objective.enabled:
            raise RuntimeError("no such thing")

    after_objectives(fails)
    probe = measure([good, bad])
    assert probe.failed == {bad.configuration_key: "RuntimeError: no such thing"}
    (costs,) = probe.costs.values()
    assert set(costs.step) == {good.configuration_key}
    assert probe.of_step(bad) is None
    assert caplog.text == ""
    nothing = measure([bad])
    assert nothing.costs == {}
    assert predict({bad.arm_key: 3}, {bad.arm_key: bad}, nothing, GridOptions(processes=1)) is None


# -- predicting --------------------------------------------------------------------------------------------------------


def fake_probe(rows: int, **changes) -> tuple[dict[str, FrozenArm], Probe]:
    """Two seeds of `rows` rows; an arm of row r has S = r + 1 seconds, T is 10 seconds."""
    plan = fake_plan(rows, 2, steps=100)
    config = {
        "data": {},
        "teacher": {},
        "recipe": {"batch_size": 8, "validate_every": 4},
        "runtime": {"cohort_size": 16},
    }
    arms = {key: dataclasses.replace(arm, config=config) for key, arm in plan.arms.items()}
    costs = Costs(
        setup=0.0,
        shared=10.0,
        step={f"{row:016x}": row + 1.0 for row in range(rows)},
        evaluation={f"{row:016x}": 0.0 for row in range(rows)},
        steps_per_epoch=10,
        validation_images=3,
        test_images=5,
    )
    costs = dataclasses.replace(costs, **changes)
    return arms, Probe({structure_of(next(iter(arms.values()))): costs})


def seconds(arms: dict[str, FrozenArm], probe: Probe, steps: int = 100, **options) -> float | None:
    return predict(dict.fromkeys(arms, steps), arms, probe, GridOptions(device="cpu", **options))


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {0, 1}, raising=False)


def test_one_process_trains_cohort_after_cohort() -> None:
    arms, probe = fake_probe(3)
    # two cohorts (seeds) of three arms: T + 1 + 2 + 3 a step
    assert seconds(arms, probe, processes=1) == pytest.approx(2 * 100 * (10 + 6))
    # cohorts of at most two arms pay T twice
    assert seconds(arms, probe, processes=1, cohort_size=2) == pytest.approx(2 * 100 * (10 + 3 + 10 + 3))
    assert seconds(arms, probe, processes=1, steps=0) == 0.0


def test_two_processes_share_the_cohorts() -> None:
    arms, probe = fake_probe(3)
    # the ledger gives a worker its share of what waits: all three of seed 0, two of seed 1, then the last one
    assert seconds(arms, probe) == pytest.approx(100 * max(10 + 1 + 2 + 3, (10 + 1 + 2) + (10 + 3)))
    one_seed = {key: arm for key, arm in arms.items() if arm.seed == 0}
    assert seconds(one_seed, probe) == pytest.approx(100 * max(10 + 1 + 2, 10 + 3))


def test_arms_are_handed_out_as_the_ledger_does(tmp_path: Path) -> None:
    arms, probe = fake_probe(5)
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db", "fake")
    ledger.ensure(arms.values(), {}, "fake_table")
    free = [0.0, 0.0, 0.0]
    while claimed := ledger.claim(list(arms), 4, workers=3):
        worker = free.index(min(free))
        free[worker] += 100 * (10 + sum(int(arms[key].configuration_key, 16) + 1 for key in claimed))
        for key in claimed:
            ledger.complete(key, {})
    ledger.close()
    # three processes on two cores
    assert seconds(arms, probe, processes=3, cohort_size=4) == pytest.approx(max(free) * 3 / 2)


def test_more_threads_than_cores_take_longer() -> None:
    arms, probe = fake_probe(3)
    assert seconds(arms, probe, threads=3, processes=2) == pytest.approx(3 * seconds(arms, probe, processes=2))


def test_a_half_trained_cohort_costs_what_is_left_of_it() -> None:
    arms, probe = fake_probe(2)
    (first, second) = [key for key, arm in arms.items() if arm.seed == 0]
    left = dict.fromkeys(arms, 0) | {first: 40, second: 100}
    found = predict(left, arms, probe, GridOptions(device="cpu", processes=1))
    assert found == pytest.approx(100 * 10 + 40 * 1 + 100 * 2)


def test_setup_and_evaluations_are_counted() -> None:
    arms, probe = fake_probe(1, setup=7.0, shared=0.0, step={f"{0:016x}": 0.0}, evaluation={f"{0:016x}": 1.0})
    # 10 epochs of 10 steps: validation after epochs 4 and 8, after the last, and once more with the test
    assert seconds(arms, probe, processes=1) == pytest.approx(2 * (7 + 4 * 3 + 5))


def test_an_arm_that_could_not_be_measured_counts_like_the_others() -> None:
    arms, probe = fake_probe(3, step={f"{0:016x}": 1.0, f"{1:016x}": 5.0}, evaluation={f"{0:016x}": 0.0})
    assert seconds(arms, probe, processes=1) == pytest.approx(2 * 100 * (10 + 1 + 5 + 3))


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def plan_command(preparer: Preparer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "mine.yaml").write_text(
        "question: Which one?\nreference: basd\nseeds: [0, 1]\nrows:\n"
        "  - {name: basd, label: the method, overrides: [method=basd]}\n"
        "  - {name: fixed, label: fixed weights, section: Others, overrides: [weighting=fixed]}\n"
        "  - {name: equal, label: equal weights, section: Others, overrides: [weighting=equal]}\n"
        "  - {name: ce, label: labels only, section: Others, overrides: [method=ce]}\n"
    )

    def run(*arguments: str) -> str:
        assert main(["plan", "mine", *TINY, *arguments]) == 0
        return capsys.readouterr().out

    return run


def test_plan_says_what_differs_what_is_shared_and_how_long_it_takes(plan_command, tmp_path: Path) -> None:
    said = plan_command()
    lines = {line.split("│")[1].strip(): line for line in said.splitlines() if line.startswith("│")}
    assert "Which one?" in said
    assert "(the reference)" in lines["the method"]
    assert "weighting: uwso → equal" in lines["fixed weights"]
    assert "without rsd, rel, attn, spectral" in lines["labels only"]
    assert "equal" in lines["fixed weights"].split("│")[5]
    assert "0 of 2" in lines["the method"]
    assert list(lines).index("Others") == 1
    assert float(lines["the method"].split("│")[6]) > 0
    assert "6 arms, 0 done; 6 to train in 2 cohorts: 90 arm-steps." in said
    assert "Predicted: " in said
    assert "for what a cohort shares" in said
    assert [path.name for path in tmp_path.iterdir()] == ["experiments"]


def test_plan_without_a_probe(plan_command) -> None:
    said = plan_command("--no-probe")
    assert "Predicted" not in said
    assert "ms a step" not in said
    assert "6 to train" in said


def test_plan_of_a_table_that_is_partly_there(plan_command) -> None:
    plan = make_plan("mine", TINY)
    ledger = Ledger("sqlite:///ledger.db", plan.setting)
    ledger.ensure(plan.arms.values(), {}, plan.name)
    (done,) = ledger.claim([plan.cells["ce"][0]], 1)
    ledger.complete(done, {"test/top1": 0.5})
    ledger.close()
    said = plan_command("--no-probe")
    (row,) = (line for line in said.splitlines() if "labels only" in line)
    assert [cell.strip() for cell in row.split("│")[4:6]] == ["1 of 2", "1"]
    assert "6 arms, 1 done; 5 to train" in said
    for key in plan.arms:
        if key != done:
            ledger.claim([key], 1)
            ledger.complete(key, {"test/top1": 0.5})
    ledger.close()
    said = plan_command()
    assert "6 arms, 6 done; nothing to train." in said and "Predicted" not in said
