"""Runs read from the tables of an MLflow database, in one read-only transaction, so that all of a call is of one moment."""

from __future__ import annotations

import math
import sqlite3
import urllib.parse
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import sqlalchemy as sa

from basd.errors import UserError
from basd.tracking.mlflow_store import shown, sqlite_path
from basd.tracking.runs import WAY_OUT, Experiment, Point, Run

# Revisions of MLflow's schema between which the tables below are the same; 3.17 writes the last one.
KNOWN_SCHEMAS = {
    "a5b4c3d2e1f0", "ae8bbe7743c9", "7d34483879f0", "da6fb0208061", "89d3d66ed43f", "b7e4c1a90f23", "a8b9c0d1e2f3",
    "c1d2e3f4a5b6", "c3d9e7f1a2b4", "6f8d9c3b2a1e", "1971f2d9a75b", "17e22815139b", "b7e2c1a4d9f3", "75868b020152",
    "dc11669786a5",
}  # fmt: skip
_WORKSPACE = "default"  # of a store without workspaces; those of a server are read through it
_CONNECT_SECONDS = 5
_LOCKED_SECONDS = 30.0
_TOGETHER = 500  # runs in one condition


def _table(name: str, *columns: str) -> sa.TableClause:
    return sa.table(name, *map(sa.column, columns))


EXPERIMENTS = _table("experiments", "experiment_id", "name", "lifecycle_stage", "workspace")
RUNS = _table("runs", "run_uuid", "experiment_id", "name", "status", "start_time", "lifecycle_stage", "artifact_uri")
TAGS = _table("tags", "run_uuid", "key", "value")
LATEST = _table("latest_metrics", "run_uuid", "key", "value", "is_nan", "step")
POINTS = _table("metrics", "run_uuid", "key", "step", "timestamp", "value", "is_nan")


class SqlRuns:
    """A `RunReader` of an SQLite file or a PostgreSQL database. `schema`: the revision that its MLflow wrote."""

    def __init__(self, uri: str) -> None:
        self._engine = _engine(uri)
        try:
            self._connection = self._engine.connect()
            with self._moment():
                if not sa.inspect(self._connection).has_table("alembic_version"):
                    raise UserError(f"The database {shown(uri)} holds no runs of MLflow; {WAY_OUT}")
                self.schema = str(
                    self._connection.scalar(sa.select(sa.column("version_num")).select_from(_table("alembic_version")))
                )
        except BaseException:
            self.close()
            raise

    def _moment(self) -> AbstractContextManager[Any]:
        return self._connection.begin()

    def _rows(self, query: sa.Executable) -> Any:
        return self._connection.execute(query)

    def experiments(self) -> list[Experiment]:
        with self._moment():
            columns = EXPERIMENTS.c
            query = sa.select(columns.experiment_id, columns.name, columns.lifecycle_stage)
            found = self._rows(query.where(columns.workspace == _WORKSPACE)).all()
        return sorted((Experiment(str(number), name, stage) for number, name, stage in found), key=lambda one: one.name)

    def holding(self, tag: str) -> set[str]:
        active = {one.number for one in self.experiments() if one.stage == "active"}
        with self._moment():
            query = sa.select(RUNS.c.experiment_id).distinct().where(_alive(), _having(tag))
            return {str(number) for (number,) in self._rows(query)} & active

    def runs(self, experiment: str, tag: str | None = None) -> list[Run]:
        conditions = [_alive(), RUNS.c.experiment_id == int(experiment), *([_having(tag)] if tag is not None else [])]
        chosen = sa.select(RUNS.c.run_uuid).where(*conditions)
        tags: dict[str, dict[str, str]] = {}
        latest: dict[str, dict[str, tuple[float, int]]] = {}
        with self._moment():
            query = sa.select(RUNS.c.run_uuid, RUNS.c.name, RUNS.c.status, RUNS.c.start_time, RUNS.c.artifact_uri)
            found = [
                Run(
                    run,
                    name or "",
                    status,
                    started or 0,
                    artifacts or "",
                    tags.setdefault(run, {}),
                    latest.setdefault(run, {}),
                )
                for run, name, status, started, artifacts in self._rows(
                    query.where(*conditions).order_by(RUNS.c.start_time, RUNS.c.run_uuid)
                )
            ]
            query = sa.select(TAGS.c.run_uuid, TAGS.c.key, TAGS.c.value).where(TAGS.c.run_uuid.in_(chosen))
            for run, key, value in self._rows(query):
                tags[run][key] = value
            of = LATEST.c
            query = sa.select(of.run_uuid, of.key, of.value, of.is_nan, of.step).where(of.run_uuid.in_(chosen))
            for run, key, value, is_nan, step in self._rows(query):
                latest[run][key] = (math.nan if is_nan else float(value), step)
        return found

    def points(self, runs: Iterable[Run], metrics: Collection[str] | None = None) -> Iterator[Point]:
        of = POINTS.c
        query = sa.select(of.run_uuid, of.key, of.step, of.timestamp, of.value, of.is_nan)
        if metrics is not None:
            query = query.where(of.key.in_(sorted(metrics)))
        ids = [run.run_id for run in runs]
        with self._moment():
            for start in range(0, len(ids), _TOGETHER):
                part = query.where(of.run_uuid.in_(ids[start : start + _TOGETHER]))
                for run, key, step, time, value, is_nan in self._rows(part):
                    yield Point(run, key, step, time, math.nan if is_nan else float(value))

    def close(self) -> None:
        if hasattr(self, "_connection"):
            self._connection.close()
        self._engine.dispose()


def _alive() -> sa.ColumnElement[bool]:
    return RUNS.c.lifecycle_stage == "active"


def _having(tag: str) -> sa.ColumnElement[bool]:
    return RUNS.c.run_uuid.in_(sa.select(TAGS.c.run_uuid).where(TAGS.c.key == tag))


def _engine(uri: str) -> sa.Engine:
    """Connections that cannot write."""
    path = sqlite_path(uri)
    if path is None:
        url = sa.engine.make_url(uri)
        if url.drivername == "postgresql":
            # the driver that the extra installs; SQLAlchemy would look for its predecessor
            url = url.set(drivername="postgresql+psycopg")
        return sa.create_engine(
            url,
            poolclass=sa.NullPool,
            connect_args={"connect_timeout": _CONNECT_SECONDS},
            execution_options={"isolation_level": "REPEATABLE READ", "postgresql_readonly": True},
        )

    def connect() -> sqlite3.Connection:
        # not mode=ro: after a killed writer SQLite has to undo half a transaction before it can read
        address = f"file:{urllib.parse.quote(str(path))}?mode=rw"
        connection = sqlite3.connect(address, uri=True, timeout=_LOCKED_SECONDS, isolation_level=None)
        connection.execute("PRAGMA query_only = ON")
        return connection

    engine = sa.create_engine("sqlite://", creator=connect, poolclass=sa.NullPool)
    # Python's driver opens no transaction for a query by itself
    sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine
