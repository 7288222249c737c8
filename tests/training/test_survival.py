"""SIGKILL inside the writing of a checkpoint: whichever rename it strikes, the arm goes on and ends with the same bits."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import MemoryRecorder, same_bits, state_of

from basd.config import FrozenArm
from basd.training.__main__ import FileRecorder
from basd.training.checkpoint import CURRENT, PREVIOUS, load_checkpoint
from basd.training.cohort import train_cohort, write_arm

# A process for each argument FOLDER:NAME:COUNT, which dies where a file is to be renamed to NAME for the COUNTth time.
KILLED = """
import os, signal, sys
from pathlib import Path
from basd.training import __main__ as training, checkpoint

def dying(folder, name, left, replace=os.replace):
    def replaced(source, target):
        nonlocal left
        left -= Path(target).name == name
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target)

    checkpoint.os.replace = replaced
    training.main([f"{folder}/arm.json"])

for argument in sys.argv[1:]:
    folder, name, count = argument.split(":")
    child = os.fork()
    if not child:
        dying(folder, name, int(count))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
MOMENTS = ((CURRENT, 1), (PREVIOUS, 1), (CURRENT, 2))


@pytest.mark.full
def test_killed_between_a_checkpoints_write_and_its_rename(few_arm: Callable[..., FrozenArm], tmp_path: Path) -> None:
    arm = few_arm("method=ce")
    whole = MemoryRecorder()
    (tmp_path / "whole").mkdir()
    train_cohort([arm], [tmp_path / "whole"], [whole])
    folders = [tmp_path / f"{name}-{count}" for name, count in MOMENTS]
    for folder in folders:
        folder.mkdir()
        write_arm(folder, arm)
    moments = [f"{folder}:{name}:{count}" for folder, (name, count) in zip(folders, MOMENTS, strict=True)]
    done = subprocess.run([sys.executable, "-c", KILLED, *moments], capture_output=True, text=True)
    assert [int(code) for code in done.stdout.split()] == [-signal.SIGKILL] * len(MOMENTS), done.stderr
    for folder in folders:
        # what was written and not renamed is there, and is not taken for a checkpoint
        assert list(folder.glob("checkpoint*.tmp"))
        state, notice = load_checkpoint(folder)
        assert notice is None and (state is None) == (folder.name == f"{CURRENT}-1")
        (result,) = train_cohort([arm], [folder], [FileRecorder(folder / "metrics.jsonl")])
        assert result.status == "complete"
        again = MemoryRecorder()
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            again.metrics(json.loads(line)["step"], json.loads(line)["metrics"])
        assert again.results == whole.results
        assert same_bits(state_of(folder), state_of(tmp_path / "whole"))
        assert not list(folder.glob("checkpoint*"))
