"""The trainer runs on a machine that has only torch and timm."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import basd

FORBIDDEN = ("mlflow", "optuna", "hydra", "omegaconf", "pandas")


@pytest.mark.parametrize(
    "module",
    ["basd.training.cohort", "basd.training.__main__", "basd.config", "basd.objective", "basd.evaluation", "basd.data"],
)
def test_training_imports_no_tracker_and_no_sweeper(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {FORBIDDEN!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_only_the_command_line_knows_the_analysis() -> None:
    package = Path(basd.__file__).parent

    def imported(path: Path) -> set[str]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        return names | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}

    importing = {path.relative_to(package).parts[0] for path in package.rglob("*.py")
                 if any(name.split(".")[0] == "analysis" for name in imported(path))}  # fmt: skip
    assert importing == {"commands"}


def test_what_reads_runs_and_plans_waits_for_no_timm() -> None:
    """It takes longer than torch, and brings torchvision and torch's compiler with it."""
    modules = "basd.compose, basd.grid.status, basd.grid.plan, basd.grid.worker, basd.commands.tables"
    code = f"import sys, {modules}; print([m for m in ('timm', 'torchvision', 'torch._dynamo') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, basd.cli; basd.cli.parser(); print([m for m in ('torch', 'mlflow', 'optuna', 'hydra', 'rich') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
