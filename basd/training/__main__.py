"""`python -m basd.training ARM.json …`: run frozen arms of one cohort, with only torch and timm installed.

Each arm's directory is the folder of its file. Metrics go to `metrics.jsonl` there; nothing is tracked or reported.
`torchrun --nproc_per_node=N -m basd.training ARM.json …` trains on several devices.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from basd.distributed import PeerLostError, launched
from basd.errors import UserError
from basd.training.cohort import read_arm, train_cohort
from basd.training.team import together


class FileRecorder:
    """One JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, "metrics": dict(values)}) + "\n")

    def flush(self) -> int:
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def rewind(self, position: int) -> None:
        if position > self.flush():
            raise ValueError(f"{self.path} is shorter than its checkpoint knows")
        os.truncate(self.path, position)


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not arguments:
        print("usage: python -m basd.training ARM.json …", file=sys.stderr)
        return 2
    try:
        return together(lambda: run(arguments)) if launched() else run(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


def run(arguments: list[str]) -> int:
    """Train the arms of these files and print what became of them; returns the exit status."""
    paths = [Path(argument) for argument in arguments]
    try:
        arms = [read_arm(path) for path in paths]
        if len({arm.cohort_key for arm in arms}) > 1:
            raise UserError(
                "these arms are not of one cohort (data, teacher, batch, seed or length differ); run them one by one."
            )
        recorders = [FileRecorder(path.parent / "metrics.jsonl") for path in paths]
        results = train_cohort(arms, [path.parent for path in paths], recorders)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except PeerLostError as error:
        print(error, file=sys.stderr)
        return 1
    for result in results:
        print(result.arm_key, result.status, result.reason, json.dumps(result.metrics))
    return 0 if all(result.status == "complete" for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
