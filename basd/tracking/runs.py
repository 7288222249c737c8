"""Runs as a tracking store holds them, read in one of two ways that give the same.

The tables of a database are read directly where their schema is one that is known here (`basd.tracking.sql_runs`): thousands of
runs take a moment. A server, a folder and a database of another MLflow are read through MLflow's client, page by page. Reading
creates nothing and migrates nothing.
"""

from __future__ import annotations

import math
import os
import re
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from basd.errors import UserError
from basd.tracking.mlflow_store import SUPERSEDED, check_tracking, http_problem, open_client, shown, sqlite_path

BESIDE = ("basd.again", "basd.run", SUPERSEDED)  # tags of runs that stand beside the ledger's
NONFINITE = "basd.nonfinite."  # tag of a metric that was once not finite: "nan at step 40"
PAGE = 1000  # runs in one request
WAY_OUT = "set tracking.uri=… to where the runs are; `basd sync` fills a new store from the journals"
_STORED_INFINITY = 1.79e308  # MLflow's SQL stores hold an infinity as the largest double
_MARK = re.compile(r"(nan|-?inf) at step (\d+)")
_AT_ONCE = 8


@dataclass(frozen=True)
class Experiment:
    """An experiment; `stage` is "active" or "deleted"."""

    number: str
    name: str
    stage: str


class Point(NamedTuple):
    """One logged value, as the store holds it."""

    run_id: str
    metric: str
    step: int
    milliseconds: int
    value: float


@dataclass(frozen=True)
class Run:
    """A run that is not deleted."""

    run_id: str
    name: str
    status: str
    started: int
    artifacts: str  # address of the folder of its artifacts
    tags: dict[str, str]
    latest: dict[str, tuple[float, int]]  # metric -> last value and its step, which reports read

    @property
    def beside(self) -> bool:
        """It stands beside the ledger's runs and counts in no table."""
        return any(tag in self.tags for tag in BESIDE)

    @property
    def marks(self) -> dict[str, tuple[float, int]]:
        """Metric -> the last value that was not finite, and its step; such values are no points."""
        found = {}
        for tag, text in self.tags.items():
            if tag.startswith(NONFINITE) and (match := _MARK.match(text)):
                found[tag.removeprefix(NONFINITE)] = (float(match[1]), int(match[2]))
        return found

    def finals(self) -> dict[str, float]:
        """The last value of each metric; a mark that it was not finite counts from its step on."""
        values = {name: restored(value) for name, (value, _) in self.latest.items()}
        for name, (value, step) in self.marks.items():
            if name not in self.latest or step > self.latest[name][1]:
                values[name] = value
        return values


class RunReader(Protocol):
    """A tracking store. Errors are whatever the store throws; `reading` makes a sentence of them."""

    def experiments(self) -> list[Experiment]:
        """All of them, deleted ones too, by name."""

    def holding(self, tag: str) -> set[str]:
        """Numbers of the experiments with a run that has this tag and is not deleted."""

    def runs(self, experiment: str, tag: str | None = None) -> list[Run]:
        """Runs of the experiment of that number, by start, then id; only those with this tag where one is given."""

    def points(self, runs: Iterable[Run], metrics: Collection[str] | None = None) -> Iterator[Point]:
        """Every point of the runs' metrics, or of the named ones, in no order."""

    def close(self) -> None:
        """Give back what is open."""


class ApiRuns:
    """Read through MLflow's client, from a server or any other store."""

    def __init__(self, uri: str, page: int = PAGE) -> None:
        """`page`: runs in one request, at most what the store allows (50,000)."""
        _check(uri)
        self._page = page
        self._client = open_client(uri)

    def experiments(self) -> list[Experiment]:
        from mlflow.entities import ViewType

        found = _pages(lambda token: self._client.search_experiments(view_type=ViewType.ALL, page_token=token))
        return sorted(
            (Experiment(str(one.experiment_id), one.name, one.lifecycle_stage) for one in found),
            key=lambda one: one.name,
        )

    def holding(self, tag: str) -> set[str]:
        numbers = [one.number for one in self.experiments() if one.stage == "active"]
        return {number for number in numbers if self._client.search_runs([number], _having(tag), max_results=1)}

    def runs(self, experiment: str, tag: str | None = None) -> list[Run]:
        def search(token: str | None) -> Any:
            # a fixed order, so that no run slips between two pages
            return self._client.search_runs(
                [experiment],
                "" if tag is None else _having(tag),
                max_results=self._page,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )

        return sorted((_from_client(run) for run in _pages(search)), key=_by_start)

    def points(self, runs: Iterable[Run], metrics: Collection[str] | None = None) -> Iterator[Point]:
        # one request for each metric of each run
        wanted = [(run.run_id, name) for run in runs for name in run.latest if metrics is None or name in metrics]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for (run_id, _), history in zip(
                wanted, pool.map(lambda of: self._client.get_metric_history(*of), wanted), strict=True
            ):
                for one in history:
                    yield Point(run_id, one.key, int(one.step), int(one.timestamp), float(one.value))

    def close(self) -> None:
        pass


def _from_client(run: Any) -> Run:
    latest = {metric.key: (float(metric.value), int(metric.step)) for metric in run.data._metric_objs}
    info = run.info
    return Run(
        info.run_id,
        info.run_name or "",
        info.status,
        info.start_time or 0,
        info.artifact_uri or "",
        dict(run.data.tags),
        latest,
    )


def _pages(search: Callable[[str | None], Any]) -> Iterator[Any]:
    token = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return


def _having(tag: str) -> str:
    return f"tags.`{tag}` LIKE '%'"


def _by_start(run: Run) -> tuple[int, str]:
    return run.started, run.run_id


def _check(uri: str) -> None:
    """Whether a client may be opened: it would create a folder that is missing, and ask a dead server for minutes."""
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme in ("http", "https"):
        if problem := http_problem(uri):
            raise UserError(
                f"MLflow at {shown(uri)} cannot be read (it does not answer: {problem}); start it, or {WAY_OUT}"
            )
        return
    directory = Path(urllib.parse.unquote(parts.path) if parts.scheme else uri)
    if parts.scheme in ("", "file") and not directory.is_dir():
        raise UserError(f"The tracking directory {directory} does not exist; {WAY_OUT}")
    if sqlite_path(uri) is None:
        check_tracking(uri)


def open_runs(uri: str, page: int = PAGE) -> RunReader:
    """A reader of the store at `uri`. UserError where it does not exist, does not answer or holds no runs of MLflow."""
    path = sqlite_path(uri)
    if path is not None and not path.is_file():
        raise UserError(f"The tracking store {path} does not exist; {WAY_OUT}")
    with reading(uri):
        if path is not None or uri.startswith("postgresql"):
            from basd.tracking.sql_runs import KNOWN_SCHEMAS, SqlRuns

            reader = SqlRuns(uri)
            if reader.schema in KNOWN_SCHEMAS:
                return reader
            reader.close()
        return ApiRuns(uri, page)


@contextmanager
def reading(uri: str) -> Iterator[None]:
    """A block that only reads the store at `uri`: what the store throws becomes a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # SQLAlchemy's, HTTP's and MLflow's errors alike: the store failed us
        raise UserError(_sentence(uri, error)) from error


def _sentence(uri: str, error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].replace(uri, shown(uri))
    if "database schema" in first:
        import mlflow

        return (
            f"The MLflow database {shown(uri)} was written by another version of MLflow than the installed "
            f"{mlflow.__version__}: install the version that wrote it, or, if that is older, run "
            f"`mlflow db upgrade {shown(uri)}`."
        )
    if isinstance(error, ModuleNotFoundError) and error.name == "psycopg":
        return f"MLflow at {shown(uri)} cannot be read without a driver; pip install 'basd[postgres]'"
    return f"MLflow at {shown(uri)} cannot be read ({first}); {WAY_OUT}"


def restored(value: float) -> float:
    """A stored value, infinities as such."""
    return math.copysign(math.inf, value) if abs(value) >= _STORED_INFINITY else value


def read_artifact(uri: str, run: Run, name: str) -> bytes | None:
    """A small artifact of a run in the store at `uri`; None where the run does not have it."""
    parts = urllib.parse.urlsplit(run.artifacts)
    if parts.scheme in ("", "file"):
        path = Path(urllib.parse.unquote(parts.path)) / name
        return path.read_bytes() if path.is_file() else None
    if parts.scheme == "mlflow-artifacts" and not uri.startswith("http"):
        raise UserError(
            f"The artifacts of {shown(uri)} are kept by its MLflow server; read through it, tracking.uri=http://HOST:PORT"
        )
    import tempfile

    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    client = open_client(uri)
    folder, _, _ = name.rpartition("/")
    if name not in {one.path for one in client.list_artifacts(run.run_id, folder or None)}:
        return None
    with tempfile.TemporaryDirectory(prefix="basd-") as scratch:
        return Path(client.download_artifacts(run.run_id, name, scratch)).read_bytes()
