"""Read the arms of an ablation from MLflow into one tidy frame: one line per row and seed."""

from __future__ import annotations

import math
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from basd.errors import UserError, without_passwords

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

DEFAULT_TRACKING_URI = "sqlite:///mlflow.db"
# The columns that are not metrics, in their order.
COLUMNS = ("row", "seed", "run_id", "arm_key", "configuration_key", "version", "status")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
UNKNOWN_VERSION = "unknown"
# MLflow's SQL stores hold an infinity as the largest double.
_STORED_INFINITY = 1.79e308
_CONNECT_SECONDS = 5.0
_BESIDE = ("basd.again", "basd.run", "basd.superseded")
_NONFINITE = "basd.nonfinite."  # tag of a metric that was once not finite: "nan at step 40"
_MARK = re.compile(r"(nan|-?inf) at step (\d+)")
_RANK = {"FINISHED": 0, "RUNNING": 1, "SCHEDULED": 2}


def load(
    ablation: str,
    *,
    tracking_uri: str = DEFAULT_TRACKING_URI,
    setting: str | None = None,
    rows: Mapping[str, str | Mapping[int, str]] | None = None,
    page_size: int = 1000,
) -> pd.DataFrame:
    """The arms of `ablation`: one line per row and seed; columns are `COLUMNS` and every final metric (raw units).

    `rows` says what each row is today: a plan's cells (row -> seed -> arm key) or row -> configuration key. Arms are
    then found by their keys, whichever table they were trained for; runs of a row's former configuration are left out.
    Without `rows` the runs' own tags `basd.ablation.<ablation>` (row names, comma-separated) decide.

    Runs that stand beside the ledger's (tagged `basd.again`, `basd.run` or `basd.superseded`) are left out. Of several
    runs of one row and seed the finished one that started first is kept. What was left out is told in
    `frame.attrs["warnings"]`, a list of sentences; `frame.attrs["setting"]` names the setting. Runs that have not
    finished stay in the frame with their status. UserError: no such runs, a setting that must be chosen, a tracking
    store that does not answer.
    """
    if not NAME.fullmatch(ablation):
        raise UserError(f"'{ablation}' is no name of an ablation: use letters, digits, '_', '-' and '.'.")
    client = _client(tracking_uri, ablation)
    tag = f"basd.ablation.{ablation}"
    try:
        experiment = _experiment(client, tag, ablation, setting, shown(tracking_uri), by_key=rows is not None)
        wanted = f"tags.`{tag}` LIKE '%'" if rows is None else "tags.`basd.arm_key` LIKE '%'"
        runs = list(_pages(client, experiment.experiment_id, wanted, page_size))
    except UserError:
        raise
    except Exception as error:  # SQLAlchemy, HTTP and MLflow errors alike: the store failed us
        raise _unreadable(tracking_uri, error) from error

    warnings: list[str] = []
    arms = _arms(runs, tag, rows, warnings)
    if rows is None:
        _one_configuration_each(arms, ablation)
    chosen = _without_duplicates(arms, warnings)
    if not chosen:
        raise UserError(_nothing(ablation, f"setting '{experiment.name}' in {shown(tracking_uri)}"))
    return _frame(chosen, list(rows) if rows is not None else None, ablation, experiment.name, warnings)


def _client(tracking_uri: str, ablation: str) -> MlflowClient:
    """A client of a store that is there; a missing SQLite file is not created and a closed port not waited for."""
    parts = urlsplit(tracking_uri)
    if parts.scheme.startswith("sqlite"):
        path = Path(unquote(tracking_uri.partition(":///")[2].split("?")[0]))
        if not path.is_file():
            raise UserError(_nothing(ablation, f"{path}, which does not exist"))
    elif parts.scheme in ("http", "https"):
        try:  # MLflow itself would retry for minutes
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_SECONDS).close()
        except (OSError, ValueError) as error:
            raise _unreadable(tracking_uri, error) from error
    from mlflow import MlflowClient

    try:
        return MlflowClient(tracking_uri=tracking_uri)
    except Exception as error:
        raise _unreadable(tracking_uri, error) from error


def _unreadable(tracking_uri: str, error: Exception) -> UserError:
    where = shown(tracking_uri)
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].replace(tracking_uri, where)
    if "database schema" in first:
        import mlflow

        return UserError(
            f"The MLflow database {where} was written by another version of MLflow than the installed "
            f"{mlflow.__version__}: install the version that wrote it, or, if that is older, run "
            f"`mlflow db upgrade {where}`."
        )
    return UserError(
        f"MLflow at {where} cannot be read ({first}): start it, or set tracking.uri to where the runs are."
    )


def shown(tracking_uri: str) -> str:
    """The address without its password."""
    return without_passwords(tracking_uri)


def _nothing(ablation: str, where: str) -> str:
    return (
        f"No runs of '{ablation}' in {where}: train them with `basd grid {ablation}`, "
        "or set tracking.uri to where they are."
    )


def _experiments(client: MlflowClient) -> Iterator[Experiment]:
    token = None
    while True:
        page = client.search_experiments(max_results=1000, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _pages(client: MlflowClient, experiment_id: str, wanted: str, page_size: int) -> Iterator[Run]:
    """Every run of the experiment that fits, page after page."""
    token = None
    while True:
        page = client.search_runs(
            [experiment_id], wanted, max_results=page_size, order_by=["attributes.start_time ASC"], page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def _experiment(
    client: MlflowClient, tag: str, ablation: str, setting: str | None, uri: str, *, by_key: bool
) -> Experiment:
    """The experiment to read: the setting's own, or the only one that holds the table."""
    experiments = sorted(_experiments(client), key=lambda experiment: experiment.name)
    if setting is not None and by_key:  # arms found by key need not carry this table's tag
        for experiment in experiments:
            if experiment.name == setting:
                return experiment
    holding = [e for e in experiments if client.search_runs([e.experiment_id], f"tags.`{tag}` LIKE '%'", max_results=1)]
    if not holding:
        raise UserError(_nothing(ablation, uri))
    choices = ", ".join(e.name for e in holding)
    if setting is not None:
        for experiment in holding:
            if experiment.name == setting:
                return experiment
        raise UserError(f"No runs of '{ablation}' in setting '{setting}'; the settings that have some: {choices}.")
    if len(holding) > 1:
        raise UserError(f"Several settings hold runs of '{ablation}': choose one with setting=NAME out of {choices}.")
    return holding[0]


def _arms(
    runs: list[Run], tag: str, rows: Mapping[str, str | Mapping[int, str]] | None, warnings: list[str]
) -> list[dict[str, Any]]:
    """One record per run and row it serves. Parent runs have no arm key and are passed over."""
    arms: list[dict[str, Any]] = []
    former: dict[str, int] = {}
    for run in runs:
        tags = run.data.tags
        if "basd.arm_key" not in tags or any(name in tags for name in _BESIDE):
            continue
        arm_key, configuration_key = tags["basd.arm_key"], tags.get("basd.configuration_key", "")
        try:
            seed = int(tags.get("basd.seed", ""))
        except ValueError:
            warnings.append(f"Run {run.info.run_id} has no seed in its tags and is left out.")
            continue
        tagged = [name.strip() for name in tags.get(tag, "").split(",") if name.strip()]
        if rows is None:
            serves = list(dict.fromkeys(tagged))
        else:
            serves = [
                name
                for name, key in rows.items()
                if (configuration_key == key if isinstance(key, str) else key.get(seed) == arm_key)
            ]
            for name in tagged:
                # A seed that the plan no longer has is no change of the row; another key for the same seed is.
                if name in rows and name not in serves and (isinstance(rows[name], str) or seed in rows[name]):
                    former[name] = former.get(name, 0) + 1
        record = {
            "run_id": run.info.run_id,
            "arm_key": arm_key,
            "configuration_key": configuration_key,
            "version": tags.get("basd.version") or UNKNOWN_VERSION,
            "status": run.info.status,
            "start": run.info.start_time or 0,
            "metrics": _final(run),
        }
        arms += [{"row": name, "seed": seed, **record} for name in serves]
    for name, number in former.items():
        warnings.append(f"Row '{name}': {count(number, 'run')} of a former configuration of this row left out.")
    return arms


def _final(run: Run) -> dict[str, float]:
    """The last value of each metric; what was last seen as not finite is never replaced by an older finite value."""
    metrics = {
        name: math.copysign(math.inf, value) if abs(value) >= _STORED_INFINITY else value
        for name, value in run.data.metrics.items()
    }
    steps = {metric.key: int(metric.step) for metric in getattr(run.data, "_metric_objs", None) or ()}
    for tag, text in run.data.tags.items():
        if tag.startswith(_NONFINITE) and (match := _MARK.match(text)):
            name = tag.removeprefix(_NONFINITE)
            if int(match[2]) > steps.get(name, -1):
                metrics[name] = float(match[1])
    return metrics


def count(number: int, noun: str) -> str:
    """As in "1 arm" and "2 arms"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _one_configuration_each(arms: list[dict[str, Any]], ablation: str) -> None:
    """Runs of two configurations must never be averaged into one row."""
    keys: dict[str, set[str]] = {}
    for arm in arms:
        keys.setdefault(arm["row"], set()).add(arm["configuration_key"])
    for name in sorted(keys):
        if len(keys[name]) > 1:
            raise UserError(
                f"Row '{name}' of '{ablation}' has runs of {len(keys[name])} configurations "
                f"({', '.join(sorted(keys[name]))}), so it, its data or its teacher changed in between: "
                f"say which is meant with rows={{'{name}': KEY, …}} or the plan's cells."
            )


def _without_duplicates(arms: list[dict[str, Any]], warnings: list[str]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for arm in arms:
        groups.setdefault((arm["row"], arm["seed"]), []).append(arm)
    chosen = []
    for (name, seed), group in sorted(groups.items()):
        group.sort(key=lambda arm: (_RANK.get(arm["status"], 3), arm["start"], arm["run_id"]))
        kept, finished = group[0], sum(arm["status"] == "FINISHED" for arm in group)
        chosen.append(kept)
        if len(group) > 1:
            which = (
                f"the finished one that started first ({kept['run_id']})"
                if finished
                else f"{kept['run_id']} ({kept['status']})"
            )
            warnings.append(
                f"Row '{name}', seed {seed}: {len(group)} runs, {finished} of them finished; {which} is used."
            )
    return chosen


def _frame(
    arms: list[dict[str, Any]], order: list[str] | None, ablation: str, setting: str, warnings: list[str]
) -> pd.DataFrame:
    import pandas as pd

    position = {name: index for index, name in enumerate(order or sorted({arm["row"] for arm in arms}))}
    arms = sorted(arms, key=lambda arm: (position[arm["row"]], arm["seed"]))
    metrics = sorted({name for arm in arms for name in arm["metrics"]} - set(COLUMNS))
    records = [
        {
            **{column: arm[column] for column in COLUMNS},
            **{name: arm["metrics"].get(name, math.nan) for name in metrics},
        }
        for arm in arms
    ]
    frame = pd.DataFrame.from_records(records, columns=[*COLUMNS, *metrics])
    frame.attrs.update(ablation=ablation, setting=setting, warnings=warnings)
    return frame
