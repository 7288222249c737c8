"""How and where a grid runs. Nothing here changes a result."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from basd.errors import UserError

# In the environment of workers that were started together: how many, each of which takes its share of a cohort.
WORKERS = "BASD_WORKERS"
TRAINER = "basd.training.cohort:train_cohort"
# Settings, arm keys and plans become folders and files; none of these names leads anywhere else.
FOLDER = re.compile(r"\w[\w.=+-]*")


def as_folder(name: str) -> str:
    """A name that may have come from a file or from the ledger; `UserError` unless it is that of one folder."""
    if not FOLDER.fullmatch(name):
        raise UserError(
            f"{name!r} cannot be the name of a setting or of an arm (letters, digits, dots, dashes); was its plan or ledger changed "
            "by hand? Remove it and plan again."
        )
    return name


@dataclass(frozen=True)
class GridOptions:
    """The `runtime`, `ledger` and `tracking` sections of a configuration, as far as the grid needs them."""

    directory: str = "runs"
    ledger_url: str = "sqlite:///ledger.db"
    tracking_uri: str = "sqlite:///mlflow.db"
    retries: int = 1
    grace: float = 120.0  # seconds
    processes: int = 0  # 0: one per `threads` cores on CPU, one per GPU
    cohort_size: int = 16
    threads: int = 1
    device: str = "auto"
    # seconds to wait for a locked ledger: eight processes that start at once on a busy machine took longer than 30
    ledger_timeout: float = 180.0
    trainer: str = TRAINER  # module:function; tests put a quick one here

    @classmethod
    def from_config(cls, config: Any, **changes: Any) -> GridOptions:
        """From a resolved configuration: basd.config.Config or its plain nested dict."""
        parts = ("runtime", "ledger", "tracking")
        if isinstance(config, Mapping):
            sections = {name: dict(config.get(name) or {}) for name in parts}
        else:
            sections = {name: vars(getattr(config, name)) for name in parts}
        names = {"directory", "processes", "cohort_size", "threads", "device"}
        found = {name: value for name, value in sections["runtime"].items() if name in names}
        found |= {name: value for name, value in sections["ledger"].items() if name in ("retries", "grace")}
        found |= {"ledger_url": sections["ledger"]["url"]} if "url" in sections["ledger"] else {}
        found |= {"tracking_uri": sections["tracking"]["uri"]} if "uri" in sections["tracking"] else {}
        return cls(**{**found, **changes})

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `GridOptions(**d)` is its inverse."""
        return dataclasses.asdict(self)

    def setting_directory(self, setting: str) -> Path:
        """Where the arms of a setting lie."""
        return Path(self.directory) / as_folder(setting)

    def arm_directory(self, setting: str, key: str) -> Path:
        """Where one arm lies."""
        return self.setting_directory(setting) / as_folder(key)

    def devices(self) -> list[str]:
        """The CUDA devices that workers choose from; empty on CPU."""
        # a device named by its number is used as it is, by one worker
        if self.device == "cpu" or self.device.startswith("cuda:"):
            return []
        from basd.grid.leases import visible_devices

        return [device.entry for device in visible_devices()]

    def workers(self, devices: int) -> int:
        """How many worker processes to start."""
        if self.processes > 0:
            return self.processes
        if self.device.startswith("cuda:"):
            return 1
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return devices or max(1, cores // max(1, self.threads))
