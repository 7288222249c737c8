"""What the mirror needs of MLflow: a tracking store that is created once, and runs found by their tags."""

from __future__ import annotations

import getpass
import hashlib
import logging
import os
import sqlite3
import statistics
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basd.errors import UserError, without_passwords
from basd.tracking.files import file_lock
from basd.tracking.notes import LONGEST, NOTE, configuration_note, noted

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Run

BATCH = 1000  # MLflow's limit of metrics in one request
SUPERSEDED = "basd.superseded"
# Characters of a run's name in MLflow's database; of a longer one the middle is left out, the seed stands at its end.
LONGEST_NAME = 250


def sqlite_path(uri: str) -> Path | None:
    """The file behind a `sqlite:///` address, or None when it is no SQLite file."""
    if not uri.startswith("sqlite:"):
        return None
    path = urllib.parse.unquote(uri.split("?", 1)[0].removeprefix("sqlite:").removeprefix("//").removeprefix("/"))
    return Path(path).absolute() if path else None


def fingerprint(uri: str) -> str:
    """A short name of a tracking address that shows no password."""
    path = sqlite_path(uri)
    return hashlib.sha256((str(path) if path else uri).encode()).hexdigest()[:16]


def shown(uri: str) -> str:
    """The address without a password."""
    return without_passwords(uri)


def check_tracking(uri: str, timeout: float = 4.0) -> None:
    """Raise UserError when the tracking address cannot be used; answers within a few seconds and does not import mlflow."""
    path = sqlite_path(uri)
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme in ("http", "https"):
        if problem := http_problem(uri, timeout):
            raise UserError(
                f"The MLflow server {shown(uri)} does not answer ({problem}); start it or choose another with tracking.uri=…"
            )
    elif path is not None:
        _check_sqlite(uri, path)
    elif parts.scheme in ("", "file"):
        directory = Path(urllib.parse.unquote(parts.path) if parts.scheme else uri).absolute()
        existing = next(p for p in (directory, *directory.parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise UserError(f"The tracking directory {directory} cannot be written; choose another with tracking.uri=…")
    elif parts.scheme.split("+")[0] not in ("postgresql", "mysql", "mssql", "databricks"):
        raise UserError(f"tracking.uri={shown(uri)} is no MLflow address; use sqlite:///FILE or http://HOST:PORT")


def http_problem(uri: str, timeout: float = 4.0) -> str:
    """Why a server does not answer within the seconds of `timeout`; "" where it does."""
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=timeout):
            return ""
    except urllib.error.HTTPError as error:
        # below 500 it answers; a proxy may hide or guard /health
        return f"it answered {error.code}" if error.code >= 500 else ""
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__


def _check_sqlite(uri: str, path: Path) -> None:
    way_out = "choose another with tracking.uri=sqlite:///FILE"
    try:
        if path.exists() and path.stat().st_size:
            with open(path, "r+b") as file:
                if file.read(15) != b"SQLite format 3":
                    raise UserError(f"The tracking store {path} is not an SQLite database; {way_out}")
            connection = sqlite3.connect(path, timeout=2.0)
            try:
                connection.execute("BEGIN IMMEDIATE")
                connection.rollback()
            finally:
                connection.close()
        else:
            with tempfile.TemporaryFile(dir=path.parent):
                pass
    except (OSError, sqlite3.Error) as error:
        if "locked" in str(error):  # busy, not broken: the mirror waits for it
            return
        raise UserError(f"The tracking store {shown(uri)} cannot be written ({_reason(error)}); {way_out}") from error


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def open_client(uri: str) -> MlflowClient:
    """An MlflowClient whose store exists; of many processes one creates an SQLite store, the others wait for it."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # the mirror has its own, longer patience
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    quiet()
    from mlflow import MlflowClient

    quiet()  # importing mlflow sets its own levels
    path = sqlite_path(uri)
    if path is None:
        return MlflowClient(uri)
    with file_lock(path.with_name(path.name + ".lock")):
        if not path.exists() or not path.stat().st_size:
            _create(path)
        return MlflowClient(f"sqlite:///{path}")


def _create(path: Path) -> None:
    """Make the database aside and rename it: a process killed among the dozens of migrations leaves no half of one."""
    from mlflow import MlflowClient

    for left in path.parent.glob(f".{path.name}.*.new"):
        left.unlink(missing_ok=True)  # of a process that was killed here; the lock is ours
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    MlflowClient(f"sqlite:///{fresh}").search_experiments(max_results=1)  # the first request creates the tables
    os.replace(fresh, path)


def quiet() -> None:
    """Keep MLflow and alembic from telling the user about table migrations."""
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Store:
    """One experiment of a tracking server: finds, creates and closes the runs of arms and of configurations."""

    def __init__(self, uri: str, setting: str) -> None:
        self.client = open_client(uri)
        found = self.client.get_experiment_by_name(setting)
        if found is None:
            path = sqlite_path(uri)
            place = (path.parent / "mlartifacts" / setting).as_uri() if path else None
            try:
                experiment = str(self.client.create_experiment(setting, artifact_location=place))
            except Exception:  # another process was faster
                found = self.client.get_experiment_by_name(setting)
                if found is None:
                    raise
        if found is not None:
            if found.lifecycle_stage != "active":
                raise UserError(
                    f"The MLflow experiment {setting} is deleted; run `mlflow experiments restore -x {found.experiment_id}` "
                    "or `mlflow gc`"
                )
            experiment = str(found.experiment_id)
        self.experiment = experiment

    def runs(self, **tags: str) -> list[Run]:
        """Active runs with all of these tags (`__` in a name stands for a dot), oldest first."""
        clauses = [f"tags.`{name.replace('__', '.')}` = '{value}'" for name, value in tags.items()]
        runs: list[Run] = []
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment], " and ".join(clauses), order_by=["attributes.start_time ASC"], page_token=token
            )
            runs += page
            token = page.token
            if not token:
                break
        return sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))

    def parent(
        self, configuration: str, name: str, tags: Mapping[str, str], params: Mapping[str, str], start: int
    ) -> str:
        """The run of a configuration, created when there is none. Call it under the setting's lock."""
        found = [r for r in self.runs(basd__configuration_key=configuration) if "basd.arm_key" not in r.data.tags]
        if found:
            return str(found[0].info.run_id)
        note = noted({}, configuration_note(name, {}))
        return self.create(name, {**tags, **note, "basd.configuration_key": configuration}, params, start)

    def arm(self, key: str, run_tag: str) -> Run | None:
        """The run of an arm, unless it was superseded."""
        runs = [r for r in self.runs(basd__arm_key=key) if SUPERSEDED not in r.data.tags]
        runs = [r for r in runs if r.data.tags.get("basd.run", "") == run_tag]
        return runs[0] if runs else None

    def create_arm(self, parent: str, name: str, tags: Mapping[str, str], params: Mapping[str, str], start: int) -> str:
        """A new run nested under its configuration's run."""
        return self.create(name, {**tags, "mlflow.parentRunId": parent}, params, start)

    def create(self, name: str, tags: Mapping[str, str], params: Mapping[str, str], start: int) -> str:
        """A new run; returns its id."""
        from mlflow.entities import Param

        every = {"mlflow.source.name": "basd", "mlflow.source.type": "LOCAL", "mlflow.user": _user(), **tags}
        # SQLite takes any length, a PostgreSQL backend refuses what MLflow's column does not hold
        short = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 50]}…{name[-49:]}"
        run = self.client.create_run(self.experiment, start_time=start, tags=every, run_name=short)
        run_id = str(run.info.run_id)
        items = [Param(key, value[:6000]) for key, value in params.items()]
        for i in range(0, len(items), 100):
            self.client.log_batch(run_id, params=items[i : i + 100])
        return run_id

    def describe(self, run: Run, text: str) -> None:
        """Set the description of a run, unless a person has written one."""
        self.tag(str(run.info.run_id), noted(run.data.tags, text))

    def describe_experiment(self, text: str) -> None:
        """Set the description of the experiment where it has none."""
        if NOTE not in self.client.get_experiment(self.experiment).tags:
            self.client.set_experiment_tag(self.experiment, NOTE, noted({}, text)[NOTE])

    def log_datasets(self, run_id: str, datasets: list[DatasetInput]) -> None:
        """Say which data a run used, once."""
        had = self.client.get_run(run_id).inputs if datasets else None
        if datasets and not (had and had.dataset_inputs):
            self.client.log_inputs(run_id, datasets)

    def last_steps(self, run_id: str) -> dict[str, int]:
        """The last step the server has of each metric of a run."""
        metrics: list[Any] = self.client.get_run(run_id).data._metric_objs
        return {metric.key: int(metric.step) for metric in metrics}

    def log(self, run_id: str, metrics: list[tuple[str, float, int, int]]) -> None:
        """Send (name, value, milliseconds, step) rows in one request; at most BATCH."""
        from mlflow.entities import Metric

        self.client.log_batch(run_id, metrics=[Metric(k, v, t, s) for k, v, t, s in metrics])

    def log_all(self, run_id: str, metrics: list[tuple[str, float, int, int]]) -> None:
        """As `log`, any number of rows."""
        for i in range(0, len(metrics), BATCH):
            self.log(run_id, metrics[i : i + BATCH])

    def tag(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags on a run."""
        from mlflow.entities import RunTag

        if tags:
            self.client.log_batch(run_id, tags=[RunTag(key, value[:LONGEST]) for key, value in tags.items()])

    def close_orphans(self, ended: Mapping[str, str]) -> list[str]:
        """Close the runs of arms that are RUNNING though nobody trains them: arm key -> FAILED or KILLED. Returns their keys.

        Where another mirror goes on with such an arm, it opens the run again. Call it under the setting's lock.
        """
        closed: list[str] = []
        parents: dict[str, str] = {}
        for run in self.runs() if ended else []:
            key = run.data.tags.get("basd.arm_key", "")
            if key not in ended or run.info.status != "RUNNING" or {SUPERSEDED, "basd.run"} & set(run.data.tags):
                continue
            self.close(run.info.run_id, ended[key], time.time_ns() // 1_000_000)
            parents[run.data.tags.get("mlflow.parentRunId", "")] = run.data.tags.get("basd.configuration_key", "")
            closed.append(key)
        known = {run.info.run_id for run in self.runs()} if parents else set()
        for parent, configuration in parents.items():
            if parent in known:
                # how many seeds it should have is not known here, so it is never closed as FINISHED
                self.aggregate(configuration, parent, len(known), settle=True)
        return closed

    def reopen(self, run_id: str) -> None:
        """Set a run that had ended to RUNNING."""
        if self.client.get_run(run_id).info.status != "RUNNING":
            self.client.update_run(run_id, status="RUNNING")

    def close(self, run_id: str, status: str, milliseconds: int) -> None:
        """End a run with FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run_id, status=status, end_time=milliseconds)

    def upload(self, run_id: str, path: Path, directory: str | None = None) -> None:
        """Store a file as the run's artifact."""
        self.client.log_artifact(run_id, str(path), directory)

    def aggregate(self, configuration: str, parent: str, expected: int, *, settle: bool = False) -> bool:
        """Bring a configuration's run up to date: means and deviations over its finished arms, logged with step = number of seeds.

        It is closed as FINISHED once `expected` arms are finished. `settle` also closes one whose arms have all ended otherwise.
        Returns whether it is closed. Call it under the setting's lock.
        """
        arms = [r for r in self.runs(basd__configuration_key=configuration) if "basd.arm_key" in r.data.tags]
        arms = [r for r in arms if SUPERSEDED not in r.data.tags and "basd.run" not in r.data.tags]
        done = [r for r in arms if r.info.status == "FINISHED"]
        ended = max((int(r.info.end_time or 0) for r in arms), default=0)
        run = self.client.get_run(parent)
        seeds = [r.data.tags.get("basd.seed", "") for r in done]
        self.describe(run, configuration_note(run.info.run_name, run.data.tags, seeds))
        if done:
            known = {m.key: (m.value, m.step) for m in run.data._metric_objs}
            rows = [(k, v, ended, len(done)) for k, v in _summary(done).items() if known.get(k) != (v, len(done))]
            self.log_all(parent, rows)
            versions = ", ".join(sorted({r.data.tags.get("basd.version", "") for r in done}))
            if run.data.tags.get("basd.version") != versions:
                self.tag(parent, {"basd.version": versions})
        if len(done) >= expected:
            status = "FINISHED"
        elif not settle or any(r.info.status == "RUNNING" for r in arms):
            return False
        else:
            status = "FAILED" if any(r.info.status == "FAILED" for r in arms) else "KILLED"
        if run.info.status != status:
            self.close(parent, status, ended)
        return True


def _summary(runs: list[Run]) -> dict[str, float]:
    """Mean of each test/*, val/* and probe/* metric over runs, and its standard deviation (n-1) from two runs on."""
    out: dict[str, float] = {}
    for key in sorted({key for run in runs for key in run.data.metrics if key.startswith(("test/", "val/", "probe/"))}):
        values = [run.data.metrics[key] for run in runs if key in run.data.metrics]
        out[key] = statistics.fmean(values)
        if len(values) > 1:
            out[f"{key}_std"] = statistics.stdev(values)
    return out


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"
