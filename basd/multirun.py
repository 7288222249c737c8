"""Hydra's multirun: `basd train -m seed=0,1 selector=uniform,forward` over arms, with any launcher or sweeper, and
`basd worker NAME -m 'worker=range(8)' hydra/launcher=joblib`, which has a launcher start workers."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.errors import HydraException
from omegaconf import DictConfig

from basd.compose import compose, register
from basd.errors import UserError
from basd.grid.display import make_console
from basd.grid.options import WORKERS
from basd.grid.single import train_one

# In the environment, so that it reaches a job wherever a launcher runs it.
AGAIN = "BASD_TRAIN_AGAIN"
# Of the jobs that ran in this process.
statuses: list[int] = []


def job(_config: DictConfig) -> float:
    """One combination: train its arm. Returns val/top1 for a sweeper to maximise; the test set chooses nothing."""
    overrides = list(HydraConfig.get().overrides.task)
    screen = make_console(quiet=True)
    try:
        status, metrics = train_one(overrides, screen=screen, again=bool(os.environ.get(AGAIN)), quiet=True)
    except UserError as error:
        screen.print(f"basd: {' '.join(overrides)}: {error}", markup=False)
        status, metrics = 1, {}
    if status == 130:
        # one Ctrl-C ends the sweep, not only its current arm
        raise KeyboardInterrupt
    statuses.append(status)
    return metrics.get("val/top1", float("nan")) if status == 0 else float("nan")


def check(overrides: Sequence[str]) -> None:
    """Compose the first job of a sweep, and every other value of each key beside it; `UserError` before anything runs.

    Of an interval both ends. Hydra's own settings are left to Hydra.
    """
    compose(
        [text for text in overrides if "_target_" in text]
    )  # refuses them: Hydra would call what its launcher names
    fixed: list[str] = []
    swept: list[list[str]] = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.key_or_group.split("/")[0].split(".")[0] == "hydra":
            continue
        if not override.is_sweep_override():
            fixed.append(override.input_line or "")
            continue
        value = override.value()
        ends = [str(value.start), str(value.end)] if isinstance(value, IntervalSweep) else None
        swept.append([f"{override.key_or_group}={one}" for one in ends or override.sweep_string_iterator()])
    first = [values[0] for values in swept]
    compose([*fixed, *first])
    for place, values in enumerate(swept):
        for value in values[1:]:
            compose([*fixed, *first[:place], value, *first[place + 1 :]])


def multirun(overrides: Sequence[str], *, again: bool) -> int:
    """Hand the command line to Hydra. Interrupted, run it again: finished arms are not repeated."""
    try:
        check(overrides)
    except HydraException as error:
        raise UserError(f"{' '.join(str(error).split())}; write KEY=VALUE or KEY=A,B.") from error
    register()
    os.environ[AGAIN] = "1" if again else ""
    sys.argv = ["basd train", "--multirun", *overrides, *_for_optuna(overrides)]
    statuses.clear()
    hydra.main(config_path="pkg://basd.conf", config_name="config")(job)()
    return max(statuses, default=0)


def _for_optuna(overrides: Sequence[str]) -> list[str]:
    """What Hydra's Optuna sweeper has to be told beside the command line; `UserError` where it is not installed."""
    if "hydra/sweeper=optuna" not in overrides:
        return []
    if importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper") is None:
        raise UserError("hydra/sweeper=optuna is not installed; run `pip install 'basd[clusters]'`, or use basd sweep.")
    # a job returns its accuracy, which the sweeper would minimise
    said = any(text.startswith("hydra.sweeper.direction=") for text in overrides)
    return [] if said else ["hydra.sweeper.direction=maximize"]


# -- workers -----------------------------------------------------------------------------------------------------------

# The folder in which each worker leaves the status that it ended with; in the environment, like AGAIN.
STATUSES = "BASD_WORKER_STATUSES"


@dataclass
class WorkerJob:
    """What a launcher hands to one worker."""

    ablation: str = ""
    worker: int = 0
    # the settings of the command line, as they were written
    settings: list[str] = field(default_factory=list)


def worker_job(config: Any) -> None:
    """One worker, in whatever process the launcher runs it; its messages and its status are those of `basd worker`."""
    from basd.cli import main

    status = main(["worker", str(config.ablation), "--quiet", *(str(text) for text in config.settings)])
    (Path(os.environ[STATUSES]) / str(config.worker)).write_text(str(status))


def start_workers(ablation: str, overrides: Sequence[str]) -> int:
    """Hand workers of an ablation to Hydra's launcher: one for each value of `worker=…`; returns the worst of their statuses."""
    compose([text for text in overrides if "_target_" in text])  # refuses them
    hydras = [text for text in overrides if text.startswith(("hydra/", "hydra."))]
    numbers = [text for text in overrides if text.startswith("worker=")]
    settings = [text for text in overrides if text not in (*hydras, *numbers)]
    count = _worker_count(numbers)
    if "hydra/launcher=joblib" in hydras and not any(text.startswith("hydra.launcher.n_jobs=") for text in hydras):
        hydras.append(f"hydra.launcher.n_jobs={count}")
    ConfigStore.instance().store(name="basd_worker", node=WorkerJob, replace=True)
    given = json.dumps(settings, ensure_ascii=False)
    sys.argv = ["basd worker", "--multirun", f"ablation={ablation}", f"settings={given}", *numbers, *hydras]
    with tempfile.TemporaryDirectory(prefix="basd-workers-") as folder:
        os.environ |= {STATUSES: folder, WORKERS: str(count)}
        hydra.main(config_path=None, config_name="basd_worker")(worker_job)()
        ended = [int(path.read_text()) for path in Path(folder).iterdir()]
    if len(ended) < count:
        raise UserError(f"{count - len(ended)} of {count} workers ended without a word; see the launcher's output.")
    return max(ended)


def _worker_count(numbers: Sequence[str]) -> int:
    """How many workers `worker=…` asks for."""
    wanted = "write worker=0,1,2 or 'worker=range(8)', a number for each worker."
    if len(numbers) != 1:
        raise UserError(f"basd worker -m starts a worker for each value of worker=…; {wanted}")
    try:
        (override,) = OverridesParser.create().parse_overrides(list(numbers))
        values = list(override.sweep_string_iterator()) if override.is_discrete_sweep() else [str(override.value())]
    except HydraException as error:
        raise UserError(f"{numbers[0]} is no list of workers; {wanted}") from error
    if not values or len(set(values)) < len(values) or not all(value.isdigit() for value in values):
        raise UserError(f"{numbers[0]} is no list of workers; {wanted}")
    return len(values)
