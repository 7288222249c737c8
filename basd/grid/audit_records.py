"""What `basd audit` compares: an arm's journal with what is wrong in it, and the runs of an MLflow experiment. Reads only."""

from __future__ import annotations

import math
import re
import sqlite3
import urllib.parse
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from basd.errors import UserError
from basd.tracking.journal import Event, read_events
from basd.tracking.mirror import check_tracking
from basd.tracking.mlflow_store import SUPERSEDED, open_client, shown, sqlite_path

BESIDE = ("basd.again", "basd.run", SUPERSEDED)  # tags of runs that stand beside the ledger's
NONFINITE = "basd.nonfinite."
# clocks and system load: a stretch that was trained twice measures them anew, and MLflow keeps the first
MEASURED = ("time/", "system/")
STORED_INFINITY = 1.79e308  # MLflow's SQL stores hold an infinity as the largest double
WAY_OUT = "set tracking.uri=… to where the runs are; `basd sync` fills a new store from the journals"
Points = dict[str, dict[int, list[float]]]  # metric -> step -> values


def few(items: Iterable[str], shown: int = 3) -> str:
    """The first of many, and how many more there are."""
    every = list(items)
    more = f" and {len(every) - shown} more" if len(every) > shown else ""
    return ", ".join(every[:shown]) + more


def same(one: float, other: float) -> bool:
    """Equal to the last bit, NaN to NaN."""
    return one == other or (math.isnan(one) and math.isnan(other))


# -- the journal -------------------------------------------------------------------------------------------------------


@dataclass
class JournalRecord:
    """What a journal holds, and what is wrong with it."""

    points: dict[str, dict[int, float]] = field(default_factory=dict)
    closing: Event | None = None
    defects: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        return max((step for steps in self.points.values() for step in steps), default=0)

    def sent(self) -> tuple[dict[str, dict[int, float]], dict[str, str]]:
        """What the mirror makes of it: the finite points, and metric -> "nan at step 40" for the last that is not finite."""
        points = {name: dict(steps) for name, steps in self.points.items()}
        for name, value in (self.closing.metrics if self.closing else {}).items():
            points.setdefault(name, {self.last_step: value})  # training reported the others already
        finite = {name: {s: v for s, v in steps.items() if math.isfinite(v)} for name, steps in points.items()}
        marks = {}
        for name, steps in points.items():
            odd = [step for step, value in steps.items() if not math.isfinite(value)]
            if odd:
                marks[name] = f"{steps[max(odd)]} at step {max(odd)}"
        return {name: steps for name, steps in finite.items() if steps}, marks


def read_journal(path: Path, total_steps: int, config: Mapping[str, Any]) -> JournalRecord:
    """Read the journal of an arm that is said to be complete. `config`: as it was trained, for the steps to expect."""
    record = JournalRecord()
    again: list[str] = []
    back: list[str] = []
    step = lines = end = 0
    for event in read_events(path):
        if event.index != lines:
            record.defects.append(f"its journal lacks lines before line {event.index}")
        if record.closing is not None:
            record.defects.append(f"its journal goes on after its end (line {event.index})")
        lines, end = event.index + 1, event.next
        record.closing = event if event.end else None
        if event.end:
            continue
        if event.step < step:
            back.append(f"{step} to {event.step}")
        step = event.step
        for name, value in event.metrics.items():
            steps = record.points.setdefault(name, {})
            if event.step in steps:
                again.append(f"{name} at step {event.step}")
            steps[event.step] = value
    if path.stat().st_size != end:
        record.defects.append(f"its journal cannot be read after line {lines}")
    if back:
        record.defects.append(f"its journal goes back from step {few(back)}")
    if again:
        record.defects.append(f"its journal has twice: {few(again)}")
    if record.closing is None or record.closing.end != "complete":
        how = f'"{record.closing.end}"' if record.closing else f"step {record.last_step} of {total_steps}"
        record.defects.append(f'its journal ends with {how}, not with "complete"')
    elif record.last_step != total_steps:
        record.defects.append(f"its journal ends at step {record.last_step}, the plan has {total_steps} steps")
    if not record.defects:
        for name, wanted in expected_steps(total_steps, config).items():
            lacking = sorted(wanted - set(record.points.get(name, ())))
            if lacking:
                record.defects.append(f"its journal lacks {name} at step {few(map(str, lacking))}")
    if record.closing is not None and not record.defects:
        if not record.closing.metrics:
            record.defects.append("its journal ends without final metrics")
        for name, value in record.closing.metrics.items():
            steps = record.points.get(name, {})
            if steps and not same(steps[max(steps)], value):
                record.defects.append(f"its journal closes with {name} {value}, its last point is {steps[max(steps)]}")
    return record


def expected_steps(total_steps: int, config: Mapping[str, Any]) -> dict[str, set[int]]:
    """The steps at which training must have recorded some metrics, as far as the configuration tells.

    Losses are recorded at other steps besides, where one begins to count. Ends of epochs follow from a length in epochs.
    """
    every = int((config.get("runtime") or {}).get("log_every", 0))
    if every < 1:
        return {}
    recipe = config.get("recipe") or {}
    ends = {total_steps}
    validated = {total_steps}
    epochs = re.fullmatch(r"\s*(\d+)(\.0*)?\s*(epochs?|ep)\s*", str(recipe.get("duration", "")))
    if epochs and int(epochs[1]) > 0 and total_steps % int(epochs[1]) == 0:
        length = total_steps // int(epochs[1])
        ends |= set(range(length, total_steps + 1, length))
        validated |= set(range(0, total_steps + 1, length * int(recipe.get("validate_every", 1)))) - {0}
    return {
        "train/loss": {1, *ends, *range(every, total_steps + 1, every)},
        "time/images_per_second": ends,
        "val/top1": validated,
    }


# -- MLflow ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run that is not deleted."""

    run_id: str
    name: str
    status: str
    started: int
    tags: dict[str, str]
    latest: dict[str, tuple[float, int]]  # metric -> last value and its step, which reports read

    @property
    def beside(self) -> bool:
        """It stands beside the ledger's runs and counts in no table."""
        return any(tag in self.tags for tag in BESIDE)

    def final(self, name: str) -> float | None:
        """The last value of a metric; a mark that it was not finite counts from its step on."""
        value, step = self.latest.get(name, (None, -1))
        mark = re.match(r"(nan|-?inf) at step (\d+)", self.tags.get(NONFINITE + name, ""))
        if mark and int(mark[2]) > step:
            return float(mark[1])
        return math.copysign(math.inf, value) if value is not None and abs(value) >= STORED_INFINITY else value


class Tracked(Protocol):
    """The runs of one experiment."""

    runs: list[Run]

    def points(self, run: Run) -> Points:
        """Every point of every metric of a run."""


class SqliteRuns:
    """Read from the tables: thousands of points in a moment, and no store is created or migrated."""

    def __init__(self, path: Path, experiment: str) -> None:
        # not mode=ro: after a killed writer SQLite has to undo half a transaction before it can read
        self._database = sqlite3.connect(f"file:{urllib.parse.quote(str(path))}?mode=rw", uri=True, timeout=30.0)
        self._database.execute("PRAGMA query_only = ON")
        chosen = (
            "SELECT run_uuid FROM runs JOIN experiments USING (experiment_id) "
            "WHERE experiments.name = ? AND runs.lifecycle_stage = 'active'"
        )
        for number, stage in self._all(
            "SELECT experiment_id, lifecycle_stage FROM experiments WHERE name = ?", experiment
        ):
            _check_stage(experiment, number, stage)
        tags: dict[str, dict[str, str]] = {}
        for run, key, value in self._all(
            f"SELECT run_uuid, key, value FROM tags WHERE run_uuid IN ({chosen})", experiment
        ):
            tags.setdefault(run, {})[key] = value
        latest: dict[str, dict[str, tuple[float, int]]] = {}
        query = f"SELECT run_uuid, key, value, is_nan, step FROM latest_metrics WHERE run_uuid IN ({chosen})"
        for run, key, value, is_nan, step in self._all(query, experiment):
            latest.setdefault(run, {})[key] = (math.nan if is_nan else float(value), step)
        query = f"SELECT run_uuid, name, status, start_time FROM runs WHERE run_uuid IN ({chosen})"
        self.runs = [
            Run(run, name or "", status, started or 0, tags.get(run, {}), latest.get(run, {}))
            for run, name, status, started in self._all(query, experiment)
        ]

    def _all(self, query: str, value: str) -> list[tuple[Any, ...]]:
        return self._database.execute(query, (value,)).fetchall()

    def points(self, run: Run) -> Points:
        found: Points = {}
        query = "SELECT key, step, value, is_nan FROM metrics WHERE run_uuid = ?"
        for key, step, value, is_nan in self._all(query, run.run_id):
            found.setdefault(key, {}).setdefault(step, []).append(math.nan if is_nan else float(value))
        return found


class ClientRuns:
    """Read through MLflow's client, from a server or any other store."""

    def __init__(self, uri: str, experiment: str) -> None:
        check_tracking(uri)
        parts = urllib.parse.urlsplit(uri)
        directory = Path(urllib.parse.unquote(parts.path) if parts.scheme else uri)
        if parts.scheme in ("", "file") and not directory.is_dir():  # the client would create it
            raise UserError(f"The tracking directory {directory} does not exist; {WAY_OUT}")
        self.client = open_client(uri)
        self.runs = []
        found = self.client.get_experiment_by_name(experiment)
        if found is not None:
            _check_stage(experiment, found.experiment_id, found.lifecycle_stage)
        token = None
        while found is not None:
            page = self.client.search_runs([found.experiment_id], page_token=token)
            self.runs += [self._run(run) for run in page]
            token = page.token
            if not token:
                break

    @staticmethod
    def _run(run: Any) -> Run:
        latest = {metric.key: (float(metric.value), int(metric.step)) for metric in run.data._metric_objs}
        info = run.info
        return Run(info.run_id, info.run_name or "", info.status, info.start_time or 0, dict(run.data.tags), latest)

    def points(self, run: Run) -> Points:
        found: Points = {}
        with ThreadPoolExecutor(8) as pool:  # one request for each metric
            for history in pool.map(lambda name: self.client.get_metric_history(run.run_id, name), run.latest):
                for metric in history:
                    found.setdefault(metric.key, {}).setdefault(int(metric.step), []).append(float(metric.value))
        return found


def _check_stage(experiment: str, number: Any, stage: str) -> None:
    if stage != "active":
        raise UserError(f"The MLflow experiment {experiment} is deleted; run `mlflow experiments restore -x {number}`")


def open_runs(uri: str, experiment: str) -> Tracked:
    """The runs of an experiment; none where it does not exist. UserError when the store cannot be read."""
    path = sqlite_path(uri)
    try:
        if path is None:
            return ClientRuns(uri, experiment)
        if not path.exists():
            raise UserError(f"The tracking store {path} does not exist; {WAY_OUT}")
        return SqliteRuns(path, experiment)
    except UserError:
        raise
    except Exception as error:  # SQLite's, HTTP's and MLflow's errors alike: the store failed us
        raise unreadable(uri, error) from error


def unreadable(uri: str, error: Exception) -> UserError:
    """What a store threw, in a sentence."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return (
        error
        if isinstance(error, UserError)
        else UserError(f"MLflow at {shown(uri)} cannot be read ({first}); {WAY_OUT}")
    )


def compare_points(record: JournalRecord, run: Run, points: Points, mirrored: bool) -> tuple[int, list[str]]:
    """How many points of a journal the run lacks only because they were not sent yet, and sentences about all other differences."""
    expected, marks = record.sent()
    late = 0
    lacking: list[str] = []
    twice: list[str] = []
    extra: list[str] = []
    other: list[str] = []
    for name in sorted({*expected, *points}):
        journal, server = expected.get(name, {}), points.get(name, {})
        last = max(server, default=-1)  # the mirror sends what comes after the last point of each metric
        for step, value in sorted(journal.items()):
            if step in server:
                if value not in server[step] and not name.startswith(MEASURED):
                    other.append(f"{name} at step {step} is {server[step][0]}, in the journal {value}")
            elif mirrored or step < last:
                lacking.append(f"{name} at step {step}")
            else:
                late += 1
        twice += [f"{name} at step {step}" for step in sorted(server) if len(server[step]) > 1]
        extra += [f"{name} at step {step}" for step in sorted(server) if step not in journal]
    marked = {tag.removeprefix(NONFINITE): text for tag, text in run.tags.items() if tag.startswith(NONFINITE)}
    for name in sorted({*marks, *marked}):
        if name in marks and name not in marked and not mirrored:
            late += 1
        elif marks.get(name) != marked.get(name):
            other.append(f"{name} is marked {marked.get(name, 'finite')}, in the journal {marks.get(name, 'finite')}")
    found = {"lacks": lacking, "has twice": twice, "has, and the journal has not:": extra, "differs:": other}
    return late, [f"its MLflow run {words} {few(items)}" for words, items in found.items() if items]
