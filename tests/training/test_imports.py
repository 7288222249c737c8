"""What a command or the trainer loads at its start: the trainer runs on a machine that has only torch and timm."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import basd

PACKAGE = Path(basd.__file__).parent
# modules → what importing them does not load
LIGHT = {
    "basd.training.cohort, basd.training.__main__, basd.config, basd.objective, basd.evaluation, basd.data": (
        *("mlflow", "optuna", "hydra", "omegaconf", "pandas"),
    ),
    # timm takes longer than torch, and brings torchvision and torch's compiler with it
    "basd.compose, basd.grid.status, basd.grid.plan, basd.grid.worker, basd.commands.tables": (
        *("timm", "torchvision", "torch._dynamo"),
    ),
    "basd.cli": ("torch", "mlflow", "optuna", "hydra", "rich"),
    "analysis": ("mlflow", "pandas", "scipy", "rich", "torch", "numpy"),
}


def at_start(nodes: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements that run when the module is imported."""
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_start(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from at_start([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])


@cache
def imported(module: str) -> frozenset[str]:
    """Names that a module of ours imports at its start; of `from a import b` both a and a.b."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    names: set[str] = set()
    for node in at_start(ast.parse(Path(spec.origin).read_text()).body):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            assert node.level == 0 and node.module is not None, f"{module} imports relatively"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


def loaded(modules: list[str]) -> set[str]:
    """Everything that importing these modules imports, through modules of ours."""
    found, left = set(), list(modules)
    while left:
        name = left.pop()
        # a package is imported before what lies in it
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            part = ".".join(parts[:end])
            if part in found:
                continue
            found.add(part)
            if parts[0] in ("basd", "analysis") and is_module(part):
                left += imported(part)
    return found


@cache
def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_our_modules_import_nothing_heavy_at_their_start() -> None:
    for modules, heavy in LIGHT.items():
        found = loaded(modules.split(", "))
        assert len(found) > 3
        assert found & set(heavy) == set(), modules
    assert {"torch", "timm.models.vision_transformer"} <= loaded(["basd.training.cohort"])


@pytest.mark.full
def test_nothing_heavy_is_loaded_by_what_our_modules_import_either() -> None:
    for modules, heavy in LIGHT.items():
        code = f"import sys, {modules}; print([m for m in {heavy!r} if m in sys.modules])"
        if modules == "basd.cli":
            code = code.replace("; ", "; basd.cli.parser(); ", 1)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "[]", modules


def test_only_the_command_line_knows_the_analysis() -> None:
    def names(path: Path) -> set[str]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imports = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        return imports | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}

    importing = {path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")
                 if any(name.split(".")[0] == "analysis" for name in names(path))}  # fmt: skip
    assert importing == {"commands"}
