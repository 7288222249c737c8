"""The trainer runs on a machine that has only torch and timm."""

from __future__ import annotations

import subprocess
import sys

import pytest

FORBIDDEN = ("mlflow", "optuna", "hydra", "omegaconf", "pandas")


@pytest.mark.parametrize(
    "module",
    ["basd.training.cohort", "basd.training.__main__", "basd.config", "basd.objective", "basd.evaluation", "basd.data"],
)
def test_training_imports_no_tracker_and_no_sweeper(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {FORBIDDEN!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, basd.cli; basd.cli.parser(); print([m for m in ('torch', 'mlflow', 'optuna', 'hydra', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
