"""A directory in which two small tables were trained by the commands that a user calls."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import yaml
from command import basd_here
from tiny import TINY

SETTINGS = [*TINY, "recipe.duration=1 epochs", "recipe.validate_every=1", "runtime.threads=1", "runtime.processes=1"]
TABLE = ["leave_one_out", *SETTINGS, "rows=[basd,without_attn,ce]", "seeds=[0,1,2]"]
# a factorial that shares two of its four rows with the table
FACTORIAL = {
    "question": "Do rsd and attn earn their place?",
    "reference": "rsd+attn",
    "seeds": [0, 1, 2],
    "overrides": ["method=basd"],
    "factors": {loss: {"on": [], "off": [f"losses.{loss}.enabled=false"]} for loss in ("rsd", "attn")},
    "figures": ["rsd+attn"],
}
SMALL = ["small", *SETTINGS]


@dataclass(frozen=True)
class Project:
    """`work` is the directory, `cache` holds its teacher, `said` what `basd grid` printed."""

    folder: Path

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def said(self) -> str:
        return (self.folder / "said.txt").read_text()

    def make(self, store: Path) -> None:
        (self.work / "experiments").mkdir(parents=True)
        (self.work / "experiments" / "small.yaml").write_text(yaml.safe_dump(FACTORIAL, sort_keys=False))
        shutil.copy(store, self.work / "mlflow.db")
        status, said = basd_here("grid", *TABLE, cwd=self.work, cache=self.cache)
        assert status == 0, said
        (self.folder / "said.txt").write_text(said)
        status, said = basd_here("grid", *SMALL, cwd=self.work, cache=self.cache)
        assert status == 0 and "Trained 6 arms" in said, said

    def copy(self, folder: Path) -> Path:
        """A copy of the directory, to be changed. MLflow's artifacts stay where they were written."""
        shutil.copytree(self.work, folder, dirs_exist_ok=True)
        return folder
