"""`basd worker NAME -m`: Hydra's launchers start workers on one ledger."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import basd_here
from tiny import TINY

from basd.cli import main

TABLE = [*TINY, "rows=[basd,ce]", "seeds=[0,1]", "recipe.duration=1 epochs"]


@pytest.mark.full
@pytest.mark.parametrize("launcher", [("joblib",), ("submitit_local", "hydra.launcher.timeout_min=5")])
def test_a_launcher_starts_workers_that_share_the_table(launcher: tuple[str, ...], tmp_path: Path) -> None:
    environment = {**os.environ, "BASD_CACHE": str(tmp_path / "cache"), "COLUMNS": "160"}

    def basd(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "basd", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    kind, *settings = launcher
    started = basd("worker", "leave_one_out", "-m", "worker=range(2)", f"hydra/launcher={kind}", *settings, *TABLE)
    assert started.returncode == 0, started.stdout + started.stderr
    status, said = basd_here("audit", "leave_one_out", cwd=tmp_path, cache=tmp_path / "cache")
    assert status == 0 and "4 of 4 arms complete" in said, said
    words = ["worker", "leave_one_out", "-m", "worker=0", f"hydra/launcher={kind}", *settings, "lr=1"]
    status, said = basd_here(*words, cwd=tmp_path, cache=tmp_path / "cache")
    assert status == 2 and "Traceback" not in said, said


def test_workers_are_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    for numbers in ([], ["worker=a,b"], ["worker=0,0"], ["worker=range(0)"], ["worker=0", "worker=1"]):
        assert main(["worker", "leave_one_out", "-m", *numbers]) == 2, numbers
        assert "write worker=0,1,2 or 'worker=range(8)'" in capsys.readouterr().err, numbers
