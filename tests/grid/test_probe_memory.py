"""Memory of a cohort from a probe: the measured peak, with the planned arms in place of those that were measured."""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from grid_fakes import make_plan as fake_plan
from rich.console import Console

from basd.config import FrozenArm
from basd.grid.display import print_prediction
from basd.grid.options import GridOptions
from basd.grid.probe import Costs, Probe, measure, predict_memory, structure_of

Make = Callable[..., FrozenArm]
CONFIG = {"data": {}, "teacher": {}, "recipe": {"batch_size": 8, "validate_every": 4}, "runtime": {"cohort_size": 16}}


@pytest.fixture
def arms() -> dict[str, FrozenArm]:
    """Two seeds of three rows."""
    plan = fake_plan(3, 2, steps=100)
    return {key: dataclasses.replace(arm, config=CONFIG) for key, arm in plan.arms.items()}


@pytest.fixture
def probe(arms: dict[str, FrozenArm]) -> Probe:
    """1000 bytes at the peak with two arms of row 0 and one of row 1; row r holds 10·(r + 1)."""
    costs = Costs(
        setup=0.0, shared=0.0, step={}, evaluation={}, steps_per_epoch=10, validation_images=3, test_images=5,
        peak=1000, held={f"{row:016x}": 10 * (row + 1) for row in range(3)}, held_then=40,
    )  # fmt: skip
    return Probe({structure_of(next(iter(arms.values()))): costs})


def predicted(arms: dict[str, FrozenArm], probe: Probe, left: int = 1, **options) -> tuple[int, int] | None:
    return predict_memory(dict.fromkeys(arms, left), arms, probe, GridOptions(device="cpu", **options))


def test_the_peak_with_other_arms(arms: dict[str, FrozenArm], probe: Probe) -> None:
    assert predicted(arms, probe, processes=1) == (1000 - 40 + 10 + 20 + 30, 3)
    # the two that hold most
    assert predicted(arms, probe, processes=1, cohort_size=2) == (1000 - 40 + 30 + 20, 2)
    assert predicted(arms, probe, processes=6) == (1000 - 40 + 30, 1)
    assert predicted(arms, probe, left=0, processes=1) is None
    assert predicted(arms, Probe(), processes=1) is None


def test_an_arm_that_could_not_be_measured_holds_what_the_others_do(arms: dict[str, FrozenArm], probe: Probe) -> None:
    (key,) = probe.costs
    costs = dataclasses.replace(probe.costs[key], held={f"{0:016x}": 10, f"{1:016x}": 30})
    assert predicted(arms, Probe({key: costs}), processes=1) == (1000 - 40 + 10 + 30 + 20, 3)


def test_a_probe_measures_what_arms_hold(tiny_arm: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arms = [
        tiny_arm("method=ce"),
        tiny_arm("method=ce", "recipe.ema_decay=0.9"),
        tiny_arm("method=ce", "student.width=24"),
    ]
    (costs,) = measure(arms).costs.values()
    plain, averaged, wider = (costs.held[arm.configuration_key] for arm in arms)
    # weights, gradients and two moments of 4 bytes each; the average is a fifth of it more
    assert averaged == pytest.approx(plain * 5 / 4, rel=0.02)
    assert wider > 2 * plain
    assert costs.held_then == pytest.approx(plain + averaged + wider + max(plain, averaged, wider), rel=0.7)
    assert costs.peak is not None
    assert costs.peak == pytest.approx(psutil.Process().memory_info().rss, rel=0.3)


def test_other_precisions_and_parts_are_other_structures(tiny_arm: Make) -> None:
    rows = [(), ("runtime.precision=bf16",), ("runtime.compile=on",), ("recipe.accumulation=2",)]
    assert len({structure_of(tiny_arm("method=ce", *row)) for row in rows}) == 4


def test_parts_of_a_step_are_timed_together(tiny_arm: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second passes with each backward pass."""
    monkeypatch.chdir(tmp_path)
    backward, seconds = torch.Tensor.backward, [0.0]

    def counted(self: torch.Tensor, *arguments: object, **named: object) -> None:
        seconds[0] += 1.0
        backward(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.Tensor, "backward", counted)
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])
    arm = tiny_arm("method=ce", "recipe.accumulation=4")
    (costs,) = measure([arm]).costs.values()
    assert costs.step[arm.configuration_key] == 4.0


def test_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=8 * 2**30))

    def said(rows: int, seeds: int, processes: int) -> str:
        plan = fake_plan(rows, seeds, steps=100)
        arms = {key: dataclasses.replace(arm, config=CONFIG) for key, arm in plan.arms.items()}
        held = {arm.configuration_key: 2**20 for arm in arms.values()}
        costs = Costs(
            setup=0.0, shared=0.0, step=dict.fromkeys(held, 1.0), evaluation=dict.fromkeys(held, 0.0),
            steps_per_epoch=10, validation_images=3, test_images=5,
            peak=3 * 2**30, held=held, held_then=rows * 2**20,
        )  # fmt: skip
        probe = Probe({structure_of(next(iter(arms.values()))): costs})
        text, options = io.StringIO(), GridOptions(device="cpu", processes=processes)
        left = dict.fromkeys(arms, 100)
        print_prediction(Console(file=text, width=400), dataclasses.replace(plan, arms=arms), left, probe, options)
        return next(line for line in text.getvalue().splitlines() if line.startswith("Memory"))

    assert said(8, 2, 2) == "Memory: about 3.0 GiB with a cohort of 8 arms each, resident, of 8.0 GiB."
    assert said(1, 1, 1) == "Memory: about 3.0 GiB with one arm, resident, of 8.0 GiB."
    assert "too much: lower runtime.cohort_size" in said(8, 3, 3)
