"""A grid finishes what others began and trains nothing twice, in this process and with worker processes."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
from forked import start
from grid_fakes import SETTING, make_plan
from ledgers import empty_ledger
from rich.console import Console

from basd.errors import UserError
from basd.grid import worker
from basd.grid.display import Display, duration
from basd.grid.ledger import Ledger
from basd.grid.options import GridOptions
from basd.grid.plan import Plan
from basd.grid.run import Outcome, run_grid
from basd.grid.status import print_status, status
from basd.tracking.mlflow_store import open_client

HERE = Path(__file__).parent


@pytest.fixture
def options(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> GridOptions:
    shutil.copy(store, tmp_path / "mlflow.db")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(HERE.parents[1])]))
    return GridOptions(
        directory=str(tmp_path / "runs"),
        ledger_url=empty_ledger(tmp_path / "ledger.db"),
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
        processes=1,
        device="cpu",
        trainer="grid_fakes:train_cohort",
    )


@pytest.fixture
def signals() -> Iterator[None]:
    """Set back the handlers that a grid in this process installs."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def run(plan: Plan, options: GridOptions, here: bool = False) -> tuple[Outcome, str]:
    text = io.StringIO()
    outcome = run_grid(plan, options, here=here, console=Console(file=text, width=200))
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


@pytest.mark.usefixtures("signals")
def test_an_interrupted_grid_in_this_process_goes_on(options: GridOptions) -> None:
    plan = make_plan(2, 1, {(1, 0): {"interrupt_at": 3}}, steps=10)
    outcome, text = run(plan, options, here=True)
    assert outcome.interrupted and not outcome.ok and "Run `basd grid fake_table` again" in text
    states = Ledger(options.ledger_url, SETTING).arms().values()
    assert {(state.state, state.retries) for state in states} == {("waiting", 0)}
    assert Counter(r.info.status for r in mlflow_runs(options)) == {"KILLED": 4}
    outcome, _ = run(plan, options, here=True)
    assert outcome.ok and outcome.mirrored and outcome.trained == 2 and not outcome.interrupted
    assert begun(plan, options) == [2, 2]
    assert Counter(r.info.status for r in mlflow_runs(options)) == {"FINISHED": 4}


@pytest.mark.usefixtures("signals")
def test_permanent_failure_is_reported_with_its_reason(options: GridOptions) -> None:
    outcome, _ = run(make_plan(2, 1, {(1, 0): {"fail_at": 3}}), options, here=True)
    assert not outcome.ok and len(outcome.complete) == 1
    (failure,) = outcome.failed.values()
    assert failure.reason == "loss is not finite at step 3"
    assert {r.info.status for r in mlflow_runs(options)} == {"FINISHED", "FAILED"}


def start_grid(plan: Plan, options: GridOptions, said: Path) -> BaseProcess:
    """`basd grid` in a process of its own, with worker processes; what it says goes to a file."""

    def grid() -> None:
        with open(said, "w", buffering=1) as file:
            outcome = run_grid(plan, options, console=Console(file=file, width=200))
            print("ok" if outcome.ok else "not ok", outcome.interrupted, file=file)

    process = start(grid)
    assert process.pid is not None
    return process


def interrupt(process: BaseProcess) -> None:
    os.kill(process.pid or 0, signal.SIGINT)


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.mark.full
def test_two_grids_at_once_share_the_work(options: GridOptions) -> None:
    plan = make_plan(3, 2, steps=4, sleep=0.05)
    with ThreadPoolExecutor() as pool:
        outcomes = [outcome for outcome, _ in pool.map(lambda _: run(plan, options), range(2))]
    assert all(outcome.ok and outcome.mirrored for outcome in outcomes)
    assert begun(plan, options) == [1] * 6
    assert Counter(r.info.status for r in mlflow_runs(options)) == {"FINISHED": 9}


@pytest.mark.full
def test_interrupted_grid_checkpoints_and_goes_on(options: GridOptions, tmp_path: Path) -> None:
    plan = make_plan(2, 1, steps=40, sleep=0.05)
    grid = start_grid(plan, options, tmp_path / "said")
    wait_for(lambda: (options.arm_directory(SETTING, next(iter(plan.arms))) / "progress.json").exists())
    (table,) = status(options)
    assert table.counts.running == 2
    interrupt(grid)
    grid.join()
    text = (tmp_path / "said").read_text()
    assert "Run `basd grid fake_table` again" in text and text.splitlines()[-1] == "not ok True"
    assert Counter(r.info.status for r in mlflow_runs(options)) == {"KILLED": 4}
    outcome, _ = run(plan, options)
    assert outcome.ok and outcome.trained == 2
    assert begun(plan, options) == [2, 2]
    assert Counter(r.info.status for r in mlflow_runs(options)) == {"FINISHED": 4}


@pytest.mark.full
@pytest.mark.usefixtures("signals")
def test_a_second_ctrl_c_leaves_at_once_and_loses_nothing(options: GridOptions, tmp_path: Path) -> None:
    """The trainer ignores the first request to stop; without the second Ctrl-C the grid would wait for it."""
    said = tmp_path / "said"
    plan = make_plan(1, 1, steps=400)
    grid = start_grid(make_plan(1, 1, steps=400, sleep=0.05, deaf=True), options, said)
    directory = options.arm_directory(SETTING, next(iter(plan.arms)))
    wait_for(lambda: (directory / "checkpoint.pt").exists())
    workers = psutil.Process(grid.pid).children()
    interrupt(grid)
    wait_for(lambda: "Ctrl-C again to leave at once" in said.read_text())
    interrupt(grid)
    grid.join()
    text = said.read_text()
    assert text.splitlines()[-1] == "not ok True" and "again to go on from here" in text
    assert workers and not any(process.is_running() for process in workers)
    reached = json.loads((directory / "checkpoint.pt").read_text())["step"]
    assert 0 < reached < 400
    outcome, _ = run(plan, options, here=True)
    assert outcome.ok and outcome.mirrored
    assert [int(step) for step in (directory / "trainings.txt").read_text().split()] == [0, reached]
    (arm,) = [found for found in mlflow_runs(options) if "basd.arm_key" in found.data.tags]
    points = open_client(options.tracking_uri).get_metric_history(arm.info.run_id, "train/loss")
    assert sorted(point.step for point in points) == list(range(1, 401)) and arm.info.status == "FINISHED"


@pytest.mark.full
def test_a_job_that_is_preempted_goes_on_when_it_is_started_again(options: GridOptions, tmp_path: Path) -> None:
    """SLURM's --requeue: SIGTERM, then the same command under the same job id."""
    plan = make_plan(2, 1, steps=60, sleep=0.02)
    path = plan.save(tmp_path / "plan.json")
    directories = [options.arm_directory(SETTING, key) for key in plan.arms]

    def job() -> None:
        os.environ |= {worker.OPTIONS: json.dumps(options.to_dict()), "SLURM_JOB_ID": "17"}
        sys.exit(worker.main(["--plan", str(path), "--mirror"]))

    first = start(job)
    wait_for(lambda: all((directory / "checkpoint.pt").exists() for directory in directories))
    first.terminate()
    first.join()
    assert first.exitcode == 0
    ledger = Ledger(options.ledger_url, SETTING)
    states = ledger.arms().values()
    assert {(state.state, state.retries) for state in states} == {("waiting", 0)}
    reached = [json.loads((directory / "checkpoint.pt").read_text())["step"] for directory in directories]
    second = start(job)
    second.join()
    assert second.exitcode == 0
    assert {state.state for state in ledger.arms().values()} == {"complete"}
    begun = [[int(step) for step in (directory / "trainings.txt").read_text().split()] for directory in directories]
    assert begun == [[0, step] for step in reached]
    assert Counter(found.info.status for found in mlflow_runs(options)) == {"FINISHED": 4}


@pytest.mark.full
@pytest.mark.usefixtures("signals")
def test_killed_grid_leaves_no_worker_and_the_next_goes_on(options: GridOptions, tmp_path: Path) -> None:
    plan = make_plan(2, 1, steps=40, sleep=0.05)
    grid = start_grid(plan, options, tmp_path / "said")
    wait_for(lambda: (options.arm_directory(SETTING, next(iter(plan.arms))) / "progress.json").exists())
    workers = psutil.Process(grid.pid).children()
    grid.kill()
    outcome, _ = run(plan, options, here=True)
    assert outcome.ok and outcome.mirrored
    assert workers
    wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in workers))
    assert Counter(r.info.status for r in mlflow_runs(options)) == {"FINISHED": 4}


@pytest.mark.full
def test_failures_name_the_log_of_their_worker(options: GridOptions) -> None:
    outcome, _ = run(make_plan(1, 1, {(0, 0): {"fail_at": 1}}), options)
    (failure,) = outcome.failed.values()
    assert not outcome.ok and Path(failure.log).exists()


@pytest.mark.full
def test_workers_that_cannot_start_end_the_grid(options: GridOptions) -> None:
    broken = GridOptions(**{**options.to_dict(), "cohort_size": "many", "retries": 0})
    outcome, text = run(make_plan(1, 1), broken)
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
