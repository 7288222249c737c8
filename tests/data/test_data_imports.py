"""The data part runs where only torch, torchvision and NumPy are installed."""

import subprocess
import sys

import pytest


@pytest.mark.full
def test_imports_nothing_heavy() -> None:
    code = (
        "import sys, basd.data, basd.evaluation.classification\n"
        "print([m for m in ('mlflow', 'optuna', 'hydra', 'omegaconf', 'pandas', 'sklearn') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
