"""`basd doctor`: what this machine has, and whether everything that a grid needs answers."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from basd.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "mlflow",
    "optuna",
    "hydra-core",
    "pandas",
    "scipy",
    "matplotlib",
    "seaborn",
)


def examine(overrides: Sequence[str], screen: Console) -> int:
    """Print one line a check; returns 0 when all pass, 1 otherwise."""
    from basd.compose import compose, setting_name
    from basd.version import code_version

    config = compose(overrides).config
    failed = 0

    def check(what: str, look: Callable[[], str]) -> None:
        nonlocal failed
        try:
            mark, said = "ok  ", look()
        except UserError as error:
            mark, said = "FAIL", str(error)
        except Exception as error:
            # whatever it is, the other checks go on
            mark, said = "FAIL", f"{type(error).__name__}: {' '.join(str(error).split())}"
        failed += mark == "FAIL"
        screen.print(f"{mark}  {what}: {said}", markup=False)

    check(
        "code",
        lambda: f"basd {code_version()}, Python {platform.python_version()}, {platform.system()} {platform.machine()}",
    )
    check("packages", _packages)
    check("device", lambda: _device(config))
    check("data", lambda: _data(config))
    check("teacher", lambda: _teacher(config))
    check("working directory", lambda: _writable(Path(config.runtime.directory)))
    check("ledger", lambda: _ledger(config, setting_name(overrides)))
    check("tracking", lambda: _tracking(config))
    if Path("mlruns").is_dir():
        screen.print(
            "note  ./mlruns is here: a plain `mlflow ui` may show it instead of mlflow.db; move it away.", markup=False
        )
    return 1 if failed else 0


def _packages() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


def _device(config) -> str:
    import torch

    from basd.training.device import choose_device

    device = choose_device(config.runtime.device)
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {torch.cuda.device_count()} in all"
    return f"{device}, {os.cpu_count()} cores, {config.runtime.threads} threads a training process"


def _data(config) -> str:
    from basd.data import fingerprint, load

    splits = load(config.data)
    sizes = f"{len(splits.train)} training, {len(splits.validation)} validation, {len(splits.test)} test images"
    return f"{config.data.name}, {sizes}, content {fingerprint(splits)}"


def _teacher(config) -> str:
    from basd.data import load
    from basd.training.teachers import cached_teacher, prepare_teacher

    if config.teacher.name == "digits_vit":
        splits = load(config.data)
        if cached_teacher(config.teacher, config.data, splits) is None:
            return "not fitted yet; the first grid, or `basd teacher`, does it"
        prepared = prepare_teacher(config.teacher, config.data, splits, logits=config.demands.logits)
        return f"{config.teacher.name}, {prepared.accuracy}, {prepared.path}"
    from basd.models.teacher import check_timm_teacher

    file = check_timm_teacher(config.teacher)
    if file is not None:
        return f"{config.teacher.model}, {file.path}: {file.description}"
    return f"{config.teacher.model}, weights {config.teacher.weights} (checked when it is built: `basd teacher`)"


def _writable(path: Path) -> str:
    nearest = next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())
    if not os.access(nearest, os.W_OK):
        raise UserError(f"{nearest} cannot be written; run elsewhere or set runtime.directory.")
    return f"runs go to {path.resolve()}"


def _ledger(config, setting: str) -> str:
    from basd.grid.ledger import Ledger

    ledger = Ledger(config.ledger.url, setting, retries=0, grace=config.ledger.grace)
    if not ledger.exists:
        return f"{config.ledger.url}, not there yet"
    return f"{config.ledger.url} answers; {len(ledger.arms())} arms of {setting}"


def _tracking(config) -> str:
    from basd.tracking.mirror import check_tracking

    uri = config.tracking.uri
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        return f"{uri}, not there yet"
    check_tracking(uri)
    return f"{uri} answers"
