"""A grid with real worker processes: it finishes what others began, and trains nothing twice."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from grid_fakes import SETTING, make_plan
from rich.console import Console

from basd.errors import UserError
from basd.grid.ledger import Ledger
from basd.grid.options import GridOptions
from basd.grid.plan import Plan
from basd.grid.run import Outcome, run_grid
from basd.grid.status import print_status, status
from basd.grid.worker import OPTIONS
from basd.tracking.mlflow_store import open_client

HERE = Path(__file__).parent


@pytest.fixture
def options(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> GridOptions:
    shutil.copy(store, tmp_path / "mlflow.db")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parents[1])]))
    return GridOptions(
        directory=str(tmp_path / "runs"),
        ledger_url=f"sqlite:///{tmp_path}/ledger.db",
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
        processes=1,
        device="cpu",
        trainer="grid_fakes:train_cohort",
    )


def run(plan: Plan, options: GridOptions) -> tuple[Outcome, str]:
    text = io.StringIO()
    outcome = run_grid(plan, options, console=Console(file=text, width=200))
    return outcome, text.getvalue()


def begun(plan: Plan, options: GridOptions) -> list[int]:
    """How often each arm was begun."""
    paths = [options.arm_directory(SETTING, key) / "trainings.txt" for key in plan.arms]
    return [len(path.read_text().split()) if path.exists() else 0 for path in paths]


def mlflow_runs(options: GridOptions) -> list[Any]:
    client = open_client(options.tracking_uri)
    experiment = client.get_experiment_by_name(SETTING)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def test_trains_everything_once_and_then_nothing(options: GridOptions) -> None:
    plan = make_plan(2, 2, {(1, 0): {"kill_at": 3}})  # one worker is killed on the way
    outcome, text = run(plan, options)
    assert outcome.ok and outcome.mirrored and len(outcome.complete) == 4 and outcome.trained == 4
    assert (outcome.workers_started, outcome.worker_deaths) == (2, 1)
    assert "was killed by signal 9" in text and "4 of 4 arms complete" in text
    runs = mlflow_runs(options)
    nested = [r for r in runs if "basd.arm_key" in r.data.tags]
    assert len(nested) == 4 and len(runs) == 6
    assert Counter(r.info.status for r in runs) == {"FINISHED": 6}
    assert {r.data.tags["basd.ablation.fake_table"] for r in nested} == {"row0", "row1"}
    for found in nested:
        points = open_client(options.tracking_uri).get_metric_history(found.info.run_id, "train/loss")
        assert sorted(point.step for point in points) == [1, 2, 3, 4]

    began = begun(plan, options)
    again, text = run(plan, options)
    assert again.ok and again.trained == 0 and again.workers_started == 0 and text == ""
    assert begun(plan, options) == began and len(mlflow_runs(options)) == 6

    (table,) = status(options)
    assert (table.counts.done, table.counts.total, table.share, table.seconds_left) == (4, 4, 1.0, 0.0)
    assert table.rows["Row 1"].done == 2
    shown = io.StringIO()
    print_status([table], Console(file=shown, width=200))
    assert "fake_table in digits-fake-fake-tiny: 4 of 4 arms done" in shown.getvalue()


GRID = """
import sys
from grid_fakes import make_plan
from basd.grid.ledger import Ledger
from basd.grid.options import GridOptions
from basd.grid.run import run_grid
import json
outcome = run_grid(make_plan(**json.loads(sys.argv[2])), GridOptions(**json.loads(sys.argv[1])))
print("ok" if outcome.ok else "not ok", outcome.interrupted)
"""


def start_grid(options: GridOptions, **plan: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", GRID, json.dumps(options.to_dict()), json.dumps(plan)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.slow
def test_two_grids_at_once_share_the_work(options: GridOptions) -> None:
    plan = make_plan(3, 2, steps=4, sleep=0.05)
    with ThreadPoolExecutor() as pool:
        outcomes = [outcome for outcome, _ in pool.map(lambda _: run(plan, options), range(2))]
    assert all(outcome.ok and outcome.mirrored for outcome in outcomes)
    assert begun(plan, options) == [1] * 6
    assert Counter(r.info.status for r in mlflow_runs(options)) == {"FINISHED": 9}


def test_interrupted_grid_checkpoints_and_goes_on(options: GridOptions) -> None:
    plan = make_plan(2, 1, steps=40, sleep=0.05)
    grid = start_grid(options, rows=2, seeds=1, steps=40, sleep=0.05)
    progress = options.arm_directory(SETTING, next(iter(plan.arms))) / "progress.json"
    limit = time.monotonic() + 60
    while not progress.exists() and time.monotonic() < limit:
        time.sleep(0.05)
    (table,) = status(options)
    assert table.counts.running == 2
    grid.send_signal(signal.SIGINT)
    text = grid.communicate()[0]
    assert "Run `basd grid fake_table` again" in text and text.splitlines()[-1] == "not ok True"
    assert Counter(r.info.status for r in mlflow_runs(options)) == {"KILLED": 4}
    outcome, _ = run(plan, options)
    assert outcome.ok and outcome.trained == 2
    assert begun(plan, options) == [2, 2]
    assert Counter(r.info.status for r in mlflow_runs(options)) == {"FINISHED": 4}


@pytest.mark.slow
def test_a_second_ctrl_c_leaves_at_once_and_loses_nothing(options: GridOptions) -> None:
    """The trainer does not hear that it should stop; without the second Ctrl-C the grid would wait for it."""
    plan = make_plan(1, 1, steps=400, sleep=0.05)
    grid = start_grid(options, rows=1, seeds=1, steps=400, sleep=0.05, deaf=True)
    directory = options.arm_directory(SETTING, next(iter(plan.arms)))
    wait_for(lambda: (directory / "checkpoint.pt").exists())
    worker = psutil.Process(grid.pid).children()
    assert grid.stdout is not None
    grid.send_signal(signal.SIGINT)
    assert any("Ctrl-C again to leave at once" in line for line in grid.stdout)
    grid.send_signal(signal.SIGINT)
    text = grid.communicate()[0]
    assert text.splitlines()[-1] == "not ok True" and "again to go on from here" in text
    assert worker and not any(process.is_running() for process in worker)
    reached = json.loads((directory / "checkpoint.pt").read_text())["step"]
    assert 0 < reached < 400
    quick = make_plan(1, 1, steps=400)
    outcome, _ = run(quick, options)
    assert outcome.ok and outcome.mirrored
    assert [int(step) for step in (directory / "trainings.txt").read_text().split()] == [0, reached]
    (arm,) = [found for found in mlflow_runs(options) if "basd.arm_key" in found.data.tags]
    points = open_client(options.tracking_uri).get_metric_history(arm.info.run_id, "train/loss")
    assert sorted(point.step for point in points) == list(range(1, 401)) and arm.info.status == "FINISHED"


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.mark.slow
def test_a_job_that_is_preempted_goes_on_when_it_is_started_again(options: GridOptions, tmp_path: Path) -> None:
    """SLURM's --requeue: SIGTERM, then the same command under the same job id."""
    plan = make_plan(2, 1, steps=60, sleep=0.05)
    path = plan.save(tmp_path / "plan.json")
    environment = {**os.environ, OPTIONS: json.dumps(options.to_dict()), "SLURM_JOB_ID": "17"}
    command = [sys.executable, "-m", "basd.grid.worker", "--plan", str(path), "--mirror"]
    directories = [options.arm_directory(SETTING, key) for key in plan.arms]

    def job() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    first = job()
    wait_for(lambda: all((directory / "checkpoint.pt").exists() for directory in directories))
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 0
    ledger = Ledger(options.ledger_url, SETTING)
    states = ledger.arms().values()
    assert {(state.state, state.retries) for state in states} == {("waiting", 0)}
    reached = [json.loads((directory / "checkpoint.pt").read_text())["step"] for directory in directories]
    assert job().wait() == 0
    assert {state.state for state in ledger.arms().values()} == {"complete"}
    begun = [[int(step) for step in (directory / "trainings.txt").read_text().split()] for directory in directories]
    assert begun == [[0, step] for step in reached]
    assert Counter(found.info.status for found in mlflow_runs(options)) == {"FINISHED": 4}


@pytest.mark.slow
def test_killed_grid_leaves_no_worker_and_the_next_goes_on(options: GridOptions) -> None:
    plan = make_plan(2, 1, steps=40, sleep=0.05)
    grid = start_grid(options, rows=2, seeds=1, steps=40, sleep=0.05)
    progress = options.arm_directory(SETTING, next(iter(plan.arms))) / "progress.json"
    while not progress.exists():
        time.sleep(0.05)
    grid.kill()
    outcome, _ = run(plan, options)
    assert outcome.ok and outcome.mirrored
    assert Counter(r.info.status for r in mlflow_runs(options)) == {"FINISHED": 4}


@pytest.mark.slow
def test_permanent_failure_is_reported_with_reason_and_log(options: GridOptions) -> None:
    plan = make_plan(2, 1, {(1, 0): {"fail_at": 3}})
    outcome, _ = run(plan, options)
    assert not outcome.ok and len(outcome.complete) == 1
    (failure,) = outcome.failed.values()
    assert failure.reason == "loss is not finite at step 3" and Path(failure.log).exists()
    assert {r.info.status for r in mlflow_runs(options)} == {"FINISHED", "FAILED"}


@pytest.mark.slow
def test_workers_that_cannot_start_end_the_grid(options: GridOptions) -> None:
    plan = make_plan(1, 1, {(0, 0): {"kill_at": 1}})
    (options.setting_directory(SETTING)).mkdir(parents=True)
    broken = GridOptions(**{**options.to_dict(), "trainer": "grid_fakes:train_cohort", "cohort_size": "many"})
    outcome, text = run(plan, broken)
    assert outcome.missing and not outcome.ok and "No worker stays alive" in text


def test_dead_tracking_stops_before_any_work(options: GridOptions) -> None:
    dead = GridOptions(**{**options.to_dict(), "tracking_uri": "http://127.0.0.1:9"})
    with pytest.raises(UserError, match="does not answer"):
        run_grid(make_plan(1, 1), dead, console=Console(file=io.StringIO()))
    assert not (Path(options.directory)).exists()


def test_unwritable_run_directory_is_told(options: GridOptions, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        run_grid(make_plan(1, 1), options, console=Console(file=io.StringIO()))
    assert threading.active_count() < 20


def test_bar_shows_arms_and_time_left() -> None:
    from basd.grid.display import Display, duration

    text = io.StringIO()
    display = Display(Console(file=text, force_terminal=True, width=120), "table", 100, 4, quiet=False)
    display.update(10, 0, 0)
    display.update(50, 2, 1)
    display.first_progress = time.monotonic() - 4.0
    assert display.seconds_left(time.monotonic()) == pytest.approx(5.0, rel=0.1)
    display.update(50, 2, 1)
    display.close()
    assert "2 of 4 arms complete, 1 failed" in text.getvalue() and "about 5 s left" in text.getvalue()
    assert [duration(s) for s in (None, 30, 600, 7500)] == ["unknown", "30 s", "10 min", "2 h 05 min"]
