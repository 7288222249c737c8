"""`basd train -m`: Hydra's multirun over arms, with any launcher or sweeper, e.g. `basd train -m seed=0,1 selector=uniform,forward`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from basd.compose import compose, register
from basd.errors import UserError
from basd.grid.display import make_console
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

    Sweeps that cannot be listed (intervals) and Hydra's own settings are left to Hydra.
    """
    fixed: list[str] = []
    swept: list[list[str]] = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.key_or_group.split("/")[0].split(".")[0] == "hydra":
            continue
        if not override.is_sweep_override():
            fixed.append(override.input_line or "")
        elif override.is_discrete_sweep():
            swept.append([f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()])
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
    sys.argv = ["basd train", "--multirun", *overrides]
    statuses.clear()
    hydra.main(config_path="pkg://basd.conf", config_name="config")(job)()
    return max(statuses, default=0)
