"""`torchrun … -m basd grid`: two processes on JPEGs, killed on the way, finished by one process; the numbers of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
    "recipe.duration=4 epochs",
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
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


class Place:
    """A working directory with a table of its own, on data that several of them share."""

    def __init__(self, folder: Path, data: Path, cache: Path) -> None:
        self.folder, self.data, self.cache = folder, data, cache
        self.environment = {**os.environ, "BASD_CACHE": str(cache), "COLUMNS": "160", "OMP_NUM_THREADS": "1"}
        (folder / "experiments").mkdir(parents=True)
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
        """The command in this process, which starts the workers that it needs."""
        return basd_here(*self.words(command, *overrides), cwd=self.folder, cache=self.cache)

    def run_in_two(self, command: str, *overrides: str) -> tuple[int, str]:
        started = self.start(command, *overrides)
        try:
            said = started.communicate(timeout=240)[0]
        finally:
            if started.poll() is None:
                os.killpg(started.pid, signal.SIGKILL)
        return started.returncode, said

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
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_folder(folder, train=24)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def alone(data: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The table in one process."""
    place = Place(tmp_path_factory.mktemp("alone") / "work", data, cache)
    code, said = place.run("grid", "runtime.processes=1")
    assert code == 0, said
    return place


def check_same(place: Place, alone: Place) -> None:
    ends, expected = place.ends(), alone.ends()
    assert ends.keys() == expected.keys() == {"basd", "ce"}
    for method, metrics in expected.items():
        # float32: what is reduced in another order differs in the last digits, and training carries that on
        assert ends[method]["test/nll"] == pytest.approx(metrics["test/nll"], rel=1e-3), method


@pytest.mark.slow
def test_a_grid_in_two_processes_is_the_grid(data: Path, cache: Path, alone: Place, tmp_path: Path) -> None:
    place = Place(tmp_path / "work", data, cache)
    code, said = place.run_in_two("grid")
    assert code == 0, said
    # the first process speaks for all
    assert said.count("Runs:") == 1 and "Traceback" not in said, said
    check_same(place, alone)
    code, said = place.run("audit")
    assert code == 0, said
    before = place.ends()
    code, said = place.run("grid")
    assert code == 0 and place.ends() == before, said


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_in_two_processes_it_ends_in_one(
    number: signal.Signals, data: Path, cache: Path, alone: Place, tmp_path: Path
) -> None:
    place = Place(tmp_path / "work", data, cache)
    started = place.start("grid", "ledger.grace=1")
    try:
        limit = time.monotonic() + 200
        while place.step() < 4 and time.monotonic() < limit and started.poll() is None:
            time.sleep(0.05)
        os.killpg(started.pid, number)
        said = started.communicate(timeout=60)[0]
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode != 0, said
    code, said = place.run("grid", "ledger.grace=1", "runtime.processes=1")
    assert code == 0, said
    check_same(place, alone)
    code, said = place.run("audit")
    assert code == 0 and "complete" in said, said


@pytest.mark.slow
def test_more_processes_than_the_batch_can_be_split_into(data: Path, cache: Path, tmp_path: Path) -> None:
    place = Place(tmp_path / "work", data, cache)
    code, said = place.run_in_two("grid", "recipe.batch_size=6")
    # torchrun adds its own report of a process that ended with a status
    assert code != 0 and said.count("basd: recipe.batch_size=6 cannot be split") == 1 and not place.arms(), said
