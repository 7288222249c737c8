"""One store in SQLite and one in PostgreSQL, each read from its tables and through MLflow's API: all four give the same frames."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from grid.postgres import PASSWORD, Server, programs
from mlflow.entities import Metric

import analysis
from basd.errors import UserError
from basd.tracking.mlflow_store import open_client
from basd.tracking.runs import ApiRuns, open_runs
from basd.tracking.sql_runs import KNOWN_SCHEMAS, SqlRuns

TAG = "basd.ablation.losses"
MIXTURE = "step,point,layer,share\n5,2,0,0.25\n5,2,1,0.75\n10,2,0,0.5\n10,2,1,0.5\n"
# (metric, value, milliseconds, step)
BASD_0 = [
    *(("train/loss", 2.0, 10, 1), ("train/loss", 1.5, 20, 5), ("train/loss", 1.0, 30, 10)),
    *(("weight/rsd", 0.25, 20, 5), ("weight/rsd", 0.5, 30, 10), ("weight/attn", 0.125, 30, 10)),
    *(("selector/entropy", 0.8, 30, 10), ("selector/entropy/2", 0.75, 30, 10), ("test/top1", 0.875, 30, 10)),
]
BASD_1 = [
    *(("train/loss", 3.0, 10, 1), ("train/loss", math.nan, 20, 5), ("selector/entropy", 0.9, 20, 5)),
    # the later of two values of one step counts, wherever the store puts it
    *(("weight/rsd", 0.75, 25, 5), ("weight/rsd", 0.625, 20, 5), ("test/top1", math.inf, 30, 10)),
]
CE_0 = [("train/loss", 0.5, 10, 1), ("val/top1", 0.25, 10, 1)]


class Written:
    """A tracking store of one table, with what must not be in it."""

    def __init__(self, uri: str, artifacts: Path) -> None:
        self.uri = uri
        self.client = open_client(uri)
        self.artifacts = artifacts
        self.setting = self._experiment("digits")
        self.deleted = self._experiment("thrown-away")
        self.basd_0 = self.arm("basd, full", 0, BASD_0)
        self.basd_1 = self.arm("basd, full", 1, BASD_1, tags={"basd.nonfinite.loss/rsd": "-inf at step 7"})
        self.ce_0 = self.arm("ce", 0, CE_0, status="RUNNING", version="def5678")
        self.no_seed = self.arm("ce", None, CE_0)
        for changes in ({"tags": {"basd.superseded": "true"}}, {"tags": {"basd.again": "true"}}):
            self.arm("ce", 0, CE_0, **changes)
        self.client.delete_run(self.arm("ce", 1, CE_0))
        self.arm("ce", 2, CE_0, tag="basd.ablation.main")
        self.arm("ce", 3, CE_0, experiment=self.deleted)
        self.client.delete_experiment(self.deleted)
        (artifacts / "selector_history.csv").write_text(MIXTURE)
        self.client.log_artifact(self.basd_0, str(artifacts / "selector_history.csv"))

    def _experiment(self, name: str) -> str:
        return self.client.create_experiment(name, artifact_location=(self.artifacts / name).as_uri())

    def arm(
        self,
        rows: str,
        seed: int | None,
        metrics: list[tuple[str, float, int, int]],
        *,
        tag: str = TAG,
        tags: dict[str, str] | None = None,
        status: str = "FINISHED",
        version: str = "abc1234",
        experiment: str = "",
    ) -> str:
        key = f"c-{rows.partition(',')[0]}"
        own = {tag: rows, "basd.arm_key": f"{key}-{seed}", "basd.configuration_key": key, "basd.version": version}
        own |= {} if seed is None else {"basd.seed": str(seed)}
        run = self.client.create_run(experiment or self.setting, start_time=1000 + (seed or 0), tags=own | (tags or {}))
        self.client.log_batch(run.info.run_id, metrics=[Metric(*one) for one in metrics])
        if status != "RUNNING":
            self.client.set_terminated(run.info.run_id, status)
        return str(run.info.run_id)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if programs() is None:
        pytest.skip("PostgreSQL's server is not installed")
    one = Server()
    yield one
    one.close()


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.full)])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "sqlite":
        empty = request.getfixturevalue("store")
        return Written(f"sqlite:///{shutil.copy(empty, folder / 'mlflow.db')}", folder)
    address = request.getfixturevalue("server").database()
    # MLflow's own driver is another than the one that the extra installs
    return Written(address.replace("postgresql:", "postgresql+psycopg:"), folder)


@pytest.fixture(params=["tables", "api"])
def reading(request: pytest.FixtureRequest, written: Written, monkeypatch: pytest.MonkeyPatch) -> Written:
    def reader(uri: str, page: int = 2) -> SqlRuns | ApiRuns:
        return SqlRuns(uri) if request.param == "tables" else ApiRuns(uri, page=2)

    # of the module, which its function covers
    monkeypatch.setattr(sys.modules["analysis.load"], "open_runs", reader)
    return written


def columns(frame: object, *names: str) -> list[tuple[object, ...]]:
    return list(zip(*(frame[name] for name in names), strict=True))  # type: ignore[index]


def test_arms(reading: Written) -> None:
    frame = analysis.load("losses", tracking_uri=reading.uri)
    assert columns(frame, "row", "seed", "run_id", "version", "status") == [
        ("basd", 0, reading.basd_0, "abc1234", "FINISHED"),
        ("basd", 1, reading.basd_1, "abc1234", "FINISHED"),
        ("ce", 0, reading.ce_0, "def5678", "RUNNING"),
        ("full", 0, reading.basd_0, "abc1234", "FINISHED"),
        ("full", 1, reading.basd_1, "abc1234", "FINISHED"),
    ]
    assert list(frame.columns[7:]) == sorted({one[0] for one in BASD_0 + BASD_1 + CE_0} | {"loss/rsd"})
    known = frame.set_index(["row", "seed"])
    assert known.loc[("basd", 0), "train/loss"] == 1.0 and known.loc[("basd", 0), "weight/rsd"] == 0.5
    assert math.isnan(known.loc[("basd", 1), "train/loss"]) and known.loc[("basd", 1), "test/top1"] == math.inf
    assert known.loc[("basd", 1), "loss/rsd"] == -math.inf and known.loc[("full", 1), "weight/rsd"] == 0.75
    assert math.isnan(known.loc[("ce", 0), "test/top1"])
    assert frame.attrs["warnings"] == [f"Run {reading.no_seed} has no seed in its tags and is left out."]


def test_arms_by_their_keys_and_only_in_settings_that_are_there(reading: Written) -> None:
    frame = analysis.load("losses", tracking_uri=reading.uri, rows={"mine": {2: "c-ce-2", 0: "c-ce-0"}})
    assert columns(frame, "row", "seed") == [("mine", 0), ("mine", 2)]
    with pytest.raises(UserError, match="in setting 'thrown-away'; the settings that have some: digits"):
        analysis.load("losses", tracking_uri=reading.uri, setting="thrown-away")
    with pytest.raises(UserError, match="No runs of 'rows'") as caught:
        analysis.load("rows", tracking_uri=reading.uri)
    assert PASSWORD not in str(caught.value)


def test_histories_are_every_value_that_was_logged(reading: Written) -> None:
    frame = analysis.histories("losses", ["train/loss", "loss/*"], tracking_uri=reading.uri)
    assert frame.attrs["setting"] == "digits" and list(frame.columns) == ["row", "seed", "step", "metric", "value"]
    of_basd = [
        *(("basd", 0, step, "train/loss", value) for step, value in ((1, 2.0), (5, 1.5), (10, 1.0))),
        ("basd", 1, 7, "loss/rsd", -math.inf),
        *(("basd", 1, step, "train/loss", value) for step, value in ((1, 3.0), (5, "nan"))),
    ]
    lines = [
        (*place, "nan" if math.isnan(value) else value)
        for *place, value in columns(frame, "row", "seed", "step", "metric", "value")
    ]
    assert lines == [*of_basd, ("ce", 0, 1, "train/loss", 0.5), *(("full", *line[1:]) for line in of_basd)]


def test_weights_and_mixtures_over_training(reading: Written) -> None:
    rows = {"basd": "c-basd"}
    weights = analysis.weight_history("losses", tracking_uri=reading.uri, setting="digits", rows=rows)
    assert columns(weights, "row", "seed", "step", "part", "value") == [
        ("basd", 0, 10, "attn", 0.125),
        ("basd", 0, 5, "rsd", 0.25),
        ("basd", 0, 10, "rsd", 0.5),
        ("basd", 1, 5, "rsd", 0.75),
    ]
    mixtures = analysis.selector_history("losses", tracking_uri=reading.uri, setting="digits", rows=rows)
    assert columns(mixtures, "row", "seed", "step", "point", "layer", "value") == [
        ("basd", 0, 5, 2, 0, 0.25),
        ("basd", 0, 5, 2, 1, 0.75),
        ("basd", 0, 10, 2, 0, 0.5),
        ("basd", 0, 10, 2, 1, 0.5),
    ]
    assert mixtures.attrs["warnings"][1:] == ["Row 'basd', seed 1: no selector history yet (FINISHED)."]
    assert mixtures.attrs["setting"] == weights.attrs["setting"] == "digits"
    with pytest.raises(UserError, match="No arm of 'losses' has a selector history: none of its rows"):
        analysis.selector_history("losses", tracking_uri=reading.uri, setting="digits", rows={"ce": "c-ce"})


def test_a_metric_that_no_arm_has_is_named_with_the_nearest(reading: Written) -> None:
    with pytest.raises(UserError, match=r"no metric 'weight/rds'; the nearest they have: weight/rsd"):
        analysis.histories("losses", ["train/*", "weight/rds"], tracking_uri=reading.uri)
    with pytest.raises(UserError, match=r"no metric 'probe/\*'; "):
        analysis.histories("losses", "probe/*", tracking_uri=reading.uri)


def test_a_file_that_is_no_mixture_is_one_sentence(reading: Written) -> None:
    client = reading.client
    run = client.create_run(
        reading.setting, tags={"basd.ablation.odd": "x", "basd.arm_key": "k", "basd.seed": "0"}
    ).info.run_id
    client.log_text(run, "step,point\n1,2\n", "selector_history.csv")
    with pytest.raises(UserError, match=f"selector_history.csv of MLflow's run {run} cannot be read"):
        analysis.selector_history("odd", tracking_uri=reading.uri)
    client.delete_run(run)


def test_artifacts_that_a_server_keeps_are_read_through_it(reading: Written) -> None:
    with sa.create_engine(reading.uri).begin() as connection:
        change = sa.text("UPDATE runs SET artifact_uri = :to WHERE run_uuid = :run")
        before = connection.scalar(
            sa.text("SELECT artifact_uri FROM runs WHERE run_uuid = :run"), {"run": reading.basd_0}
        )
        connection.execute(change, {"to": "mlflow-artifacts:/1/x", "run": reading.basd_0})
    with pytest.raises(UserError, match="kept by its MLflow server; read through it, tracking.uri=http://"):
        analysis.selector_history("losses", tracking_uri=reading.uri)
    with sa.create_engine(reading.uri).begin() as connection:
        connection.execute(change, {"to": before, "run": reading.basd_0})


def test_reading_cannot_write(written: Written) -> None:
    def writes(connection: sa.Connection, _cursor: object, statement: str, *_: object) -> None:
        if "FROM runs" in statement:
            connection.connection.cursor().execute("DELETE FROM runs")

    sa.event.listen(sa.Engine, "before_cursor_execute", writes)
    try:
        with pytest.raises(Exception, match="read-?only"):
            analysis.load("losses", tracking_uri=written.uri)
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", writes)
    assert len(analysis.load("losses", tracking_uri=written.uri)) == 5


def test_tables_are_read_while_a_run_is_written(written: Written) -> None:
    if not written.uri.startswith("sqlite"):
        pytest.skip("writers of PostgreSQL lock no readers out")
    writer = sa.create_engine(written.uri).connect()
    writer.exec_driver_sql("BEGIN IMMEDIATE")
    assert len(analysis.load("losses", tracking_uri=written.uri)) == 5
    writer.close()


def test_tables_are_read_where_their_schema_is_known(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = SqlRuns(written.uri).schema
    monkeypatch.setattr("basd.tracking.sql_runs.KNOWN_SCHEMAS", {schema})
    assert isinstance(open_runs(written.uri), SqlRuns)
    monkeypatch.setattr("basd.tracking.sql_runs.KNOWN_SCHEMAS", {"of another MLflow"})
    assert isinstance(open_runs(written.uri), ApiRuns)
    assert len(analysis.load("losses", tracking_uri=written.uri)) == 5


def test_the_known_schemas_are_of_one_line_of_mlflow_and_none_of_them_changes_the_tables() -> None:
    """Only indices were added to the tables that are read; an MLflow older or newer than 3.17 has other migrations."""
    from alembic.script import ScriptDirectory
    from mlflow.store import db_migrations

    script = ScriptDirectory(str(Path(db_migrations.__file__).parent))
    known = [one for one in script.walk_revisions() if one.revision in KNOWN_SCHEMAS]
    assert len(known) == len(KNOWN_SCHEMAS)
    for one in known[:-1]:
        source = Path(one.path).read_text()
        assert one.down_revision in KNOWN_SCHEMAS
        for table in ("runs", "tags", "metrics", "latest_metrics"):
            assert f'batch_alter_table("{table}"' not in source and f'_column("{table}"' not in source, one.path


@pytest.mark.full
def test_a_database_that_refuses_is_one_sentence(server: Server) -> None:
    for change, words in (
        (lambda url: url.replace(PASSWORD, "wrong"), "password authentication failed"),
        (lambda url: url.rpartition("/")[0] + "/nothere", "does not exist"),
        (lambda url: url, "holds no runs of MLflow"),
    ):
        address = server.database()
        with pytest.raises(UserError, match=words) as caught:
            analysis.load("losses", tracking_uri=change(address))
        said = str(caught.value)
        assert PASSWORD not in said and "wrong" not in said and "\n" not in said and "tracking.uri=" in said, words
        with sa.create_engine(address.replace("postgresql:", "postgresql+psycopg:")).connect() as connection:
            assert sa.inspect(connection).get_table_names() == [], words


def test_an_empty_file_is_no_store_and_a_missing_driver_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow.db").touch()
    with pytest.raises(UserError, match="holds no runs of MLflow"):
        analysis.load("losses", tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    assert (tmp_path / "mlflow.db").stat().st_size == 0
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(UserError, match=r"pip install 'basd\[postgres\]'"):
        analysis.load("losses", tracking_uri="postgresql://basd@127.0.0.1:1/x")
