"""A worker: the trouble of one arm harms no other, and every arm that was claimed is ended or given back."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grid_fakes
import psutil
import pytest
from grid_fakes import SETTING, make_arm
from ledgers import empty_ledger
from optuna.trial import TrialState

from basd.config import FrozenArm
from basd.errors import DISK_FULL, TOO_MANY_ARMS, UserError
from basd.grid import worker as worker_module
from basd.grid.display import data_wait, said_of
from basd.grid.ledger import Ledger
from basd.grid.options import GridOptions
from basd.grid.room import Room
from basd.grid.worker import Worker
from basd.tracking.files import FileLock
from basd.tracking.journal import Journal, last_event, read_events
from basd.training.cohort import ArmResult


class Bench:
    """A ledger and a run directory of their own."""

    def __init__(self, root: Path, arms: list[FrozenArm], **options: Any) -> None:
        self.options = GridOptions(directory=str(root / "runs"), ledger_url=empty_ledger(root / "ledger.db"), **options)
        self.arms = {arm.arm_key: arm for arm in arms}
        self.keys = list(self.arms)
        self.ledger().ensure(arms, {}, "table")

    def ledger(self) -> Ledger:
        return Ledger.of(self.options, SETTING)

    def lock_of_the_ledger(self) -> FileLock:
        return FileLock(f"{self.options.ledger_url.removeprefix('sqlite:///')}.lock")

    def work(self, train: Any = grid_fakes.train_cohort, **options: Any) -> int:
        return Worker(self.arms, self.ledger(), self.options, train=train, **options).work()

    def states(self) -> list[str]:
        return [state.state for state in self.ledger().arms(self.keys).values()]

    def directory(self, number: int) -> Path:
        return self.options.arm_directory(SETTING, self.keys[number])

    def trainings(self, number: int) -> list[int]:
        """The steps at which trainings of an arm began."""
        path = self.directory(number) / "trainings.txt"
        return [int(line) for line in path.read_text().split()] if path.exists() else []


def test_trains_every_arm_cohort_by_cohort(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [make_arm(row, seed) for row in range(2) for seed in range(2)])
    seen = []

    def train(arms: Any, *rest: Any, **callbacks: Any) -> Any:
        seen.append([arm.seed for arm in arms])
        return grid_fakes.train_cohort(arms, *rest, **callbacks)

    assert bench.work(train) == 4
    assert seen == [[0, 0], [1, 1]]
    assert bench.states() == ["complete"] * 4
    directory = bench.directory(0)
    event = last_event(directory)
    assert event is not None and event.end == "complete" and event.metrics["test/top1"] == 0.5
    assert bench.ledger().arms()[bench.keys[0]].metrics == event.metrics
    assert json.loads((directory / "arm.json").read_text()) == bench.arms[bench.keys[0]].to_dict()
    assert (directory / "config.yaml").read_text().startswith("seed: 0\n")
    assert json.loads((directory / "progress.json").read_text())["step"] == 4
    assert bench.work() == 0  # a second worker finds nothing to do
    assert bench.trainings(0) == [0]


def test_how_long_training_waits_for_images_is_told(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [make_arm(0, 0), make_arm(1, 0)])
    shares = [0.1, 0.3]

    def train(arms: Any, directories: Any, recorders: Any, **callbacks: Any) -> Any:
        for recorder, share in zip(recorders, shares, strict=True):
            recorder.metrics(0, {"time/data_wait_share": share})
        return grid_fakes.train_cohort(arms, directories, recorders, **callbacks)

    assert data_wait([bench.directory(0)]) is None and said_of(None) == ""
    assert bench.work(train) == 2
    assert data_wait([bench.directory(0), bench.directory(1)]) == pytest.approx(0.2)
    assert said_of(0.2) == ", 20 % of the time waits for data"


def test_failure_of_one_arm_leaves_the_others_alone(tmp_path: Path) -> None:
    arms = [make_arm(0, 0), make_arm(1, 0, fail_at=3), make_arm(2, 0, fail_at=3, once=True)]
    bench = Bench(tmp_path, arms, retries=1)
    assert bench.work(log_path="worker.log") == 2
    assert bench.states() == ["complete", "failed", "complete"]
    state = bench.ledger().arms()[bench.keys[1]]
    assert (state.reason, state.log, state.permanent) == ("loss is not finite at step 3", "worker.log", True)
    assert bench.trainings(1) == [0, 2] and bench.trainings(2) == [0, 2]  # one retry, from the checkpoint
    steps = [event.step for event in read_events(bench.directory(2) / "journal.jsonl") if not event.end]
    assert steps == [1, 2, 3, 4, 4]


def test_failure_of_a_cohort_fails_its_arms_with_a_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(tmp_path, [make_arm(0, 0, cohort_error=True), make_arm(1, 0), make_arm(0, 1)], retries=0)
    assert bench.work() == 1
    assert bench.states() == ["failed", "failed", "complete"]
    assert bench.ledger().arms()[bench.keys[1]].reason == "RuntimeError: no memory left on the device"
    assert "Traceback" in caplog.text


def test_stop_gives_back_and_the_next_worker_goes_on(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [make_arm(0, 0, steps=10), make_arm(1, 0, steps=10)])
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls > 10

    assert bench.work(stop=stop) == 0
    assert bench.states() == ["waiting", "waiting"]
    assert last_event(bench.directory(0)).end == "stopped"  # type: ignore[union-attr]
    assert bench.work() == 2
    begun = bench.trainings(0)
    assert begun[0] == 0 and begun[1] > 0
    steps = [event.step for event in read_events(bench.directory(0) / "journal.jsonl") if not event.end]
    assert steps == [*range(1, 11), 10]
    assert {state.retries for state in bench.ledger().arms().values()} == {0}


def test_arm_that_was_taken_away_is_left(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [make_arm(0, 0, steps=10), make_arm(1, 0)])
    over = []

    def train(arms: Any, *rest: Any, **callbacks: Any) -> Any:
        # somebody judges the first arm stale and enqueues its next try
        watcher = bench.ledger()
        trial = watcher.arms()[bench.keys[0]].trial_id
        watcher.database.storage.set_trial_state_values(trial, TrialState.FAIL)
        watcher.ensure([bench.arms[bench.keys[0]]], {}, "table")
        results = grid_fakes.train_cohort(arms, *rest, **callbacks)
        over.append(True)
        return results

    assert bench.work(train, stop=lambda: bool(over)) == 1
    assert bench.states() == ["waiting", "complete"]
    event = last_event(bench.directory(0))
    assert event is None or not event.end  # the journal belongs to the next try


def test_directory_of_a_process_that_still_lives_is_not_touched(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [make_arm(0, 0), make_arm(1, 0)])
    lock = FileLock(bench.directory(0) / "arm.lock")
    assert lock.acquire(0)
    looks = 0

    def stop() -> bool:
        nonlocal looks
        looks += 1
        return looks > 6

    assert bench.work(stop=stop) == 1
    assert bench.states() == ["waiting", "complete"]
    assert bench.trainings(0) == []
    lock.release()
    assert bench.work() == 1


def test_arm_whose_journal_is_closed_is_not_trained_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [make_arm(0, 0)])
    journal = Journal(bench.directory(0))
    journal.end("complete", "", {"test/top1": 0.25})
    journal.close()
    assert bench.work() == 1
    assert bench.trainings(0) == []
    assert bench.ledger().arms()[bench.keys[0]].metrics == {"test/top1": 0.25}


def test_arm_begun_by_other_code_starts_anew(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [make_arm(0, 0)])
    directory = bench.directory(0)
    directory.mkdir(parents=True)
    (directory / "arm.json").write_text(json.dumps(make_arm(0, 0, version="v0").to_dict()))
    (directory / "checkpoint.pt").write_bytes(b"old")
    assert bench.work() == 1
    assert not (directory / "checkpoint.pt").exists()
    assert json.loads((directory / "arm.json").read_text())["version"] == "v1"


def test_ledger_locked_at_the_end_of_training_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(tmp_path, [make_arm(0, 0)], ledger_timeout=0.1)
    lock = bench.lock_of_the_ledger()

    def train(*arguments: Any, finished: Any, **callbacks: Any) -> Any:
        def end(result: Any) -> None:
            assert lock.acquire(0)
            threading.Timer(0.5, lock.release).start()
            finished(result)

        return grid_fakes.train_cohort(*arguments, finished=end, **callbacks)

    assert bench.work(train) == 1
    assert bench.states() == ["complete"] and bench.trainings(0) == [0]
    assert "stayed locked" in caplog.text


def test_directory_that_cannot_be_written_fails_the_arm(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [make_arm(0, 0), make_arm(1, 0)], retries=0)
    bench.directory(0).parent.mkdir(parents=True)
    bench.directory(0).write_text("a file where the directory should be")
    assert bench.work() == 1
    assert bench.states() == ["failed", "complete"]
    assert "cannot be written" in bench.ledger().arms()[bench.keys[0]].reason


def test_a_full_disk_costs_no_retry_and_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The arms are given back, the worker waits, and all go on where there is room again."""
    monkeypatch.setattr(worker_module, "FULL_DISK_PAUSE", 0.01)
    bench = Bench(tmp_path, [make_arm(0, 0), make_arm(1, 0)], retries=0)
    sync, refusals, cohorts = os.fsync, [3], []

    def fsync(file: int) -> None:
        if refusals[0] > 0:
            refusals[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    def train(arms: Any, *rest: Any, **callbacks: Any) -> Any:
        cohorts.append(len(arms))
        if len(cohorts) < 4:
            refusals[0] = 100  # the journals cannot be closed either
            results = [ArmResult(arm.arm_key, "stopped", reason=DISK_FULL) for arm in arms]
            for result in results:
                callbacks["finished"](result)
            refusals[0] = 0
            return results
        return grid_fakes.train_cohort(arms, *rest, **callbacks)

    monkeypatch.setattr(os, "fsync", fsync)
    assert bench.work(train) == 2
    # first no arm can be opened, then one, then both
    assert refusals == [0] and cohorts[:2] == [1, 2]
    assert bench.states() == ["complete"] * 2
    assert [state.retries for state in bench.ledger().arms(bench.keys).values()] == [0, 0]


def test_a_ledger_that_does_not_answer_for_a_while_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(worker_module, "LEDGER_PAUSE", 0.01)
    bench = Bench(tmp_path, [make_arm(0, 0)], ledger_timeout=0.1)
    lock = bench.lock_of_the_ledger()
    assert lock.acquire(0)
    threading.Timer(1.0, lock.release).start()
    assert bench.work() == 1 and bench.states() == ["complete"]
    assert caplog.text.count("stayed locked") == 1
    monkeypatch.setattr(worker_module, "LEDGER_PATIENCE", 0.0)
    assert lock.acquire(0)
    with pytest.raises(UserError, match="stayed locked"):
        bench.work()
    lock.release()


# -- memory ------------------------------------------------------------------------------------------------------------


def test_a_cohort_that_does_not_fit_is_halved_and_no_arm_loses_a_retry(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(tmp_path, [make_arm(row, 0) for row in range(8)], retries=0)
    sizes = []

    def train(arms: Any, directories: Any, recorders: Any, **callbacks: Any) -> Any:
        sizes.append(len(arms))
        # room for three
        left = [ArmResult(arm.arm_key, "stopped", reason=TOO_MANY_ARMS) for arm in arms[3:]]
        return left + list(grid_fakes.train_cohort(arms[:3], directories[:3], recorders[:3], **callbacks))

    assert bench.work(train) == 8
    assert sizes == [8, 4, 2]
    assert {(state.state, state.retries) for state in bench.ledger().arms(bench.keys).values()} == {("complete", 0)}
    said = [record.message for record in caplog.records if "memory is not enough for" in record.message]
    assert said == [
        f"memory is not enough for {n} arms side by side; taking at most {n // 2} from now on" for n in (8, 4)
    ]


def test_arms_of_which_none_fits_fail_alone_in_the_end(tmp_path: Path) -> None:
    bench = Bench(tmp_path, [make_arm(row, 0) for row in range(3)], retries=1)
    sizes = []

    def train(arms: Any, *_: Any, **callbacks: Any) -> Any:
        sizes.append(len(arms))
        status, reason = ("failed", "out of memory") if len(arms) == 1 else ("stopped", TOO_MANY_ARMS)
        return [ArmResult(arm.arm_key, status, reason=reason) for arm in arms]

    assert bench.work(train) == 0
    assert sizes == [3, *[1] * 6]  # each twice: once tried again
    assert {state.reason for state in bench.ledger().arms(bench.keys).values()} == {"out of memory"}


def test_what_a_cohort_held_bounds_the_next(caplog: pytest.LogCaptureFixture) -> None:
    free = 1000.0
    room = Room(16, lambda: int(free * 1e6))
    assert room.arms() == 16  # nothing is known yet
    room.begin()
    for key, held in (("a", 100.0), ("b", 50.0)):
        room.measured(key, {"time/step": 1.0})
        room.measured(key, {"system/peak_megabytes": 450.0, "system/held_megabytes": held})
    # 300 are shared, an arm may hold 100
    assert room.arms() == 7
    assert "free memory has room for 7 arms" in caplog.text
    free = 100.0
    assert room.arms() == 1
    free = 1e6
    assert room.arms() == 16
    room.crowded(9)
    assert room.arms() == 4
    room.crowded(16)
    assert room.arms() == 4
    assert Room(3, lambda: None).arms() == 3


def test_measured_memory_reaches_the_next_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=400 * 10**6))
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0)))
    bench = Bench(tmp_path, [make_arm(0, 0), *(make_arm(row, 1) for row in range(4))], device="cpu")
    sizes = []

    def train(arms: Any, directories: Any, recorders: Any, **callbacks: Any) -> Any:
        sizes.append(len(arms))
        for recorder in recorders:
            recorder.metrics(0, {"system/peak_megabytes": 200.0 + 100.0 * len(arms), "system/held_megabytes": 100.0})
        return grid_fakes.train_cohort(arms, directories, recorders, **callbacks)

    assert bench.work(train) == 5
    assert sizes == [1, 2, 2]  # 200 are shared
