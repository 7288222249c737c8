"""`torchrun … -m basd grid`: two processes train on JPEGs, are killed and resumed; the numbers are those of one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from command import basd_here
from stored_fakes import write_folder
from tiny import TINY

from basd.config import FrozenArm

SETTINGS = [
    *TINY,
    "data=folder",
    "teacher.batch_size=16",
    "recipe.batch_size=8",
    "student.drop_path=0.0",
    "recipe.duration=3 epochs",
    "recipe.validate_every=1",
]
TABLE = """
question: Does anything change with the number of processes?
reference: basd
seeds: [0]
rows:
  - {name: basd, overrides: [method=basd]}
  - {name: ce, overrides: [method=ce]}
"""
# steps of an epoch
STEPS = 8
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


class Shared(NamedTuple):
    data: Path
    cache: Path
    store: Path


class Place:
    """A working directory with a table of its own."""

    def __init__(self, folder: Path, shared: Shared) -> None:
        self.folder, self.data, self.cache = folder, shared.data, shared.cache
        self.environment = {**os.environ, "BASD_CACHE": str(self.cache), "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
        (folder / "experiments").mkdir(parents=True)
        shutil.copy(shared.store, folder / "mlflow.db")
        (folder / "experiments" / "pair.yaml").write_text(TABLE)

    def words(self, command: str, *overrides: str) -> list[str]:
        return [command, "pair", *SETTINGS, f"data.root={self.data}", *overrides]

    def start(self, command: str, *overrides: str) -> subprocess.Popen[str]:
        """The command in two processes."""
        return subprocess.Popen(
            [sys.executable, *TWO, "-m", "basd", *self.words(command, *overrides)],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, command: str, *overrides: str) -> tuple[int, str]:
        """The command in this process."""
        return basd_here(*self.words(command, *overrides), cwd=self.folder, cache=self.cache)

    def run_in_two(self, command: str, *overrides: str) -> tuple[int, str]:
        started = self.start(command, *overrides)
        try:
            said = started.communicate(timeout=240)[0]
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)
        return started.returncode, said

    def signal_in_two(self, number: signal.Signals) -> None:
        """Start the grid in two processes, and send all of them a signal when an arm has a checkpoint."""
        started = self.start("grid", "ledger.grace=1")
        try:
            limit = time.monotonic() + 200
            while self.step() <= STEPS and time.monotonic() < limit and started.poll() is None:
                time.sleep(0.05)
            os.killpg(started.pid, number)
            said = started.communicate(timeout=60)[0]
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)
        assert started.returncode != 0 and self.step() > STEPS, said

    def arms(self) -> list[Path]:
        return [path.parent for path in sorted(self.folder.glob("runs/*/*/arm.json"))]

    def step(self) -> int:
        """The furthest that an arm has come."""
        steps = [0]
        for path in self.folder.glob("runs/*/*/progress.json"):
            steps.append(int(json.loads(path.read_text())["step"]))
        return max(steps)

    def ends(self) -> dict[str, dict[str, Any]]:
        """Final metrics by the name of the method; each arm has one end."""
        found = {}
        for directory in self.arms():
            events = [json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines()]
            (end,) = [event for event in events if event.get("end") == "complete"]
            arm = FrozenArm.from_dict(json.loads((directory / "arm.json").read_text()))
            found[arm.config["method"]] = end["metrics"]
        return found


@pytest.fixture(scope="module")
def shared(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    folder = tmp_path_factory.mktemp("images")
    write_folder(folder, train=24)
    return Shared(folder, tmp_path_factory.mktemp("cache"), store)


@pytest.fixture(scope="module")
def alone(shared: Shared, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The table in one process."""
    place = Place(tmp_path_factory.mktemp("alone") / "work", shared)
    code, said = place.run("worker")
    assert code == 0, said
    return place


def check_same(place: Place, alone: Place) -> None:
    ends, expected = place.ends(), alone.ends()
    assert ends.keys() == expected.keys() == {"basd", "ce"}
    for method, metrics in expected.items():
        # float32: what is reduced in another order differs in the last digits, and training carries that on
        assert ends[method]["test/nll"] == pytest.approx(metrics["test/nll"], rel=1e-3), method


@pytest.mark.full
def test_terminated_in_two_processes_it_ends_in_two(shared: Shared, alone: Place, tmp_path: Path) -> None:
    place = Place(tmp_path / "work", shared)
    place.signal_in_two(signal.SIGTERM)
    code, said = place.run_in_two("grid", "ledger.grace=1")
    assert code == 0, said
    # the first process speaks for all
    assert said.count("Runs:") == 1 and "Traceback" not in said, said
    check_same(place, alone)
    code, said = place.run("audit")
    assert code == 0 and "complete" in said, said
    before = place.ends()
    code, said = place.run("grid")
    assert code == 0 and place.ends() == before, said


@pytest.mark.full
def test_killed_in_two_processes_it_ends_in_one(shared: Shared, alone: Place, tmp_path: Path) -> None:
    place = Place(tmp_path / "work", shared)
    place.signal_in_two(signal.SIGKILL)
    code, said = place.run("worker", "ledger.grace=1")
    assert code == 0, said
    check_same(place, alone)
    code, said = place.run("audit")
    assert code == 0 and "complete" in said, said


@pytest.mark.full
def test_more_processes_than_the_batch_can_be_split_into(shared: Shared, tmp_path: Path) -> None:
    place = Place(tmp_path / "work", shared)
    code, said = place.run_in_two("grid", "recipe.batch_size=6")
    # torchrun adds its own report of a process that ended with a status
    assert code != 0 and said.count("basd: recipe.batch_size=6 cannot be split") == 1 and not place.arms(), said
