"""Read the arms of an ablation from MLflow into one tidy frame: one line per row and seed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from basd.errors import UserError
from basd.tracking.mlflow_store import shown, sqlite_path
from basd.tracking.runs import PAGE, Experiment, Run, RunReader, open_runs, reading

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"
# The columns that are not metrics, in their order.
COLUMNS = ("row", "seed", "run_id", "arm_key", "configuration_key", "version", "status")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
UNKNOWN_VERSION = "unknown"
# What each row is today: seed -> arm key, or its configuration key.
Rows = Mapping[str, str | Mapping[int, str]]
_ARM_KEY = "basd.arm_key"
_RANK = {"FINISHED": 0, "RUNNING": 1, "SCHEDULED": 2}


@dataclass(frozen=True)
class Arm:
    """A run and the row that it serves."""

    row: str
    seed: int
    run: Run

    @property
    def arm_key(self) -> str:
        return self.run.tags[_ARM_KEY]

    @property
    def configuration_key(self) -> str:
        return self.run.tags.get("basd.configuration_key", "")

    @property
    def version(self) -> str:
        return self.run.tags.get("basd.version") or UNKNOWN_VERSION


@dataclass(frozen=True)
class Selection:
    """The arms that stand for an ablation, one for each row and seed, by row and seed; and what was left out, in sentences."""

    ablation: str
    setting: str
    arms: list[Arm]
    warnings: list[str]

    def describe(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The frame, with what it is of in its `attrs`."""
        frame.attrs.update(ablation=self.ablation, setting=self.setting, warnings=self.warnings)
        return frame


def load(
    ablation: str,
    *,
    tracking_uri: str = DEFAULT_TRACKING_URI,
    setting: str | None = None,
    rows: Rows | None = None,
    page_size: int = PAGE,
) -> pd.DataFrame:
    """The arms of `ablation`: one line per row and seed; columns are `COLUMNS` and every final metric (raw units).

    `rows` says what each row is today: a plan's cells (row -> seed -> arm key) or row -> configuration key. Arms are
    then found by their keys, whichever table they were trained for; runs of a row's former configuration are left out.
    Without `rows` the runs' own tags `basd.ablation.<ablation>` (row names, comma-separated) decide.

    Runs that stand beside the ledger's (tagged `basd.again`, `basd.run` or `basd.superseded`) are left out. Of several
    runs of one row and seed the finished one that started first is kept. What was left out is told in
    `frame.attrs["warnings"]`, a list of sentences; `frame.attrs["setting"]` names the setting. Runs that have not
    finished stay in the frame with their status. An SQLite or PostgreSQL store is read from its tables, any other through
    MLflow's API, `page_size` runs a request. UserError: no such runs, a setting that must be chosen, a tracking store that
    does not answer.
    """
    with closing(open_store(ablation, tracking_uri, page_size)) as reader:
        selection = select(reader, ablation, tracking_uri, setting, rows)
    return _frame(selection)


def open_store(ablation: str, tracking_uri: str, page_size: int = PAGE) -> RunReader:
    """A reader of the store that should hold the ablation's runs."""
    if not NAME.fullmatch(ablation):
        raise UserError(f"'{ablation}' is no name of an ablation: use letters, digits, '_', '-' and '.'.")
    path = sqlite_path(tracking_uri)
    if path is not None and not path.is_file():
        raise UserError(_nothing(ablation, f"{path}, which does not exist"))
    return open_runs(tracking_uri, page_size)


def select(
    reader: RunReader, ablation: str, tracking_uri: str, setting: str | None = None, rows: Rows | None = None
) -> Selection:
    """The arms that `load` describes, with their runs."""
    tag = f"basd.ablation.{ablation}"
    with reading(tracking_uri):
        experiment = _experiment(reader, tag, ablation, setting, shown(tracking_uri), by_key=rows is not None)
        runs = reader.runs(experiment.number, tag if rows is None else _ARM_KEY)
    warnings: list[str] = []
    arms = _arms(runs, tag, rows, warnings)
    if rows is None:
        _one_configuration_each(arms, ablation)
    chosen = _without_duplicates(arms, warnings)
    if not chosen:
        raise UserError(_nothing(ablation, f"setting '{experiment.name}' in {shown(tracking_uri)}"))
    position = {name: index for index, name in enumerate(rows or sorted({arm.row for arm in chosen}))}
    chosen.sort(key=lambda arm: (position[arm.row], arm.seed))
    return Selection(ablation, experiment.name, chosen, warnings)


def _nothing(ablation: str, where: str) -> str:
    return (
        f"No runs of '{ablation}' in {where}: train them with `basd grid {ablation}`, "
        "or set tracking.uri to where they are."
    )


def _experiment(
    reader: RunReader, tag: str, ablation: str, setting: str | None, uri: str, *, by_key: bool
) -> Experiment:
    """The experiment to read: the setting's own, or the only one that holds the table."""
    experiments = [one for one in reader.experiments() if one.stage == "active"]
    if setting is not None and by_key:  # arms found by key need not carry this table's tag
        for experiment in experiments:
            if experiment.name == setting:
                return experiment
    numbers = reader.holding(tag)
    holding = [one for one in experiments if one.number in numbers]
    if not holding:
        raise UserError(_nothing(ablation, uri))
    choices = ", ".join(one.name for one in holding)
    if setting is not None:
        for experiment in holding:
            if experiment.name == setting:
                return experiment
        raise UserError(f"No runs of '{ablation}' in setting '{setting}'; the settings that have some: {choices}.")
    if len(holding) > 1:
        raise UserError(f"Several settings hold runs of '{ablation}': choose one with setting=NAME out of {choices}.")
    return holding[0]


def _arms(runs: list[Run], tag: str, rows: Rows | None, warnings: list[str]) -> list[Arm]:
    """One arm per run and row it serves. Parent runs have no arm key and are passed over."""
    arms: list[Arm] = []
    former: dict[str, int] = {}
    served: dict[str | tuple[int, str], list[str]] = {}  # configuration key, or seed and arm key -> rows
    for name, keys in (rows or {}).items():
        for key in [keys] if isinstance(keys, str) else keys.items():
            served.setdefault(key, []).append(name)
    for run in runs:
        if _ARM_KEY not in run.tags or run.beside:
            continue
        try:
            seed = int(run.tags.get("basd.seed", ""))
        except ValueError:
            warnings.append(f"Run {run.run_id} has no seed in its tags and is left out.")
            continue
        tagged = [name.strip() for name in run.tags.get(tag, "").split(",") if name.strip()]
        if rows is None:
            serves = list(dict.fromkeys(tagged))
        else:
            serves = [
                *served.get(run.tags.get("basd.configuration_key", ""), ()),
                *served.get((seed, run.tags[_ARM_KEY]), ()),
            ]
            for name in tagged:
                # A seed that the plan no longer has is no change of the row; another key for the same seed is.
                if name in rows and name not in serves and (isinstance(rows[name], str) or seed in rows[name]):
                    former[name] = former.get(name, 0) + 1
        arms += [Arm(name, seed, run) for name in serves]
    for name, number in former.items():
        warnings.append(f"Row '{name}': {count(number, 'run')} of a former configuration of this row left out.")
    return arms


def count(number: int, noun: str) -> str:
    """As in "1 arm" and "2 arms"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _one_configuration_each(arms: list[Arm], ablation: str) -> None:
    """Runs of two configurations must never be averaged into one row."""
    keys: dict[str, set[str]] = {}
    for arm in arms:
        keys.setdefault(arm.row, set()).add(arm.configuration_key)
    for name in sorted(keys):
        if len(keys[name]) > 1:
            raise UserError(
                f"Row '{name}' of '{ablation}' has runs of {len(keys[name])} configurations "
                f"({', '.join(sorted(keys[name]))}), so it, its data or its teacher changed in between: "
                f"say which is meant with rows={{'{name}': KEY, …}} or the plan's cells."
            )


def _without_duplicates(arms: list[Arm], warnings: list[str]) -> list[Arm]:
    groups: dict[tuple[str, int], list[Run]] = {}
    for arm in arms:
        groups.setdefault((arm.row, arm.seed), []).append(arm.run)
    chosen = []
    for (name, seed), group in sorted(groups.items()):
        group.sort(key=lambda run: (_RANK.get(run.status, 3), run.started, run.run_id))
        kept, finished = group[0], sum(run.status == "FINISHED" for run in group)
        chosen.append(Arm(name, seed, kept))
        if len(group) > 1:
            which = (
                f"the finished one that started first ({kept.run_id})" if finished else f"{kept.run_id} ({kept.status})"
            )
            warnings.append(
                f"Row '{name}', seed {seed}: {len(group)} runs, {finished} of them finished; {which} is used."
            )
    return chosen


def _frame(selection: Selection) -> pd.DataFrame:
    import pandas as pd

    arms = selection.arms
    finals = {arm.run.run_id: arm.run.finals() for arm in arms}
    columns: dict[str, list[object]] = {
        "row": [arm.row for arm in arms],
        "seed": [arm.seed for arm in arms],
        "run_id": [arm.run.run_id for arm in arms],
        "arm_key": [arm.arm_key for arm in arms],
        "configuration_key": [arm.configuration_key for arm in arms],
        "version": [arm.version for arm in arms],
        "status": [arm.run.status for arm in arms],
    }
    for name in sorted({name for final in finals.values() for name in final} - set(COLUMNS)):
        columns[name] = [finals[arm.run.run_id].get(name, math.nan) for arm in arms]
    return selection.describe(pd.DataFrame(columns))
