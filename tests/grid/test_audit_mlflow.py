"""The audit of MLflow: every record that is broken on purpose is found, named, and put right by its way out."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sqlite3
from typing import Any

import pytest
from audit_fakes import KEYS, PLAN, Table
from grid_fakes import SETTING, make_plan

from basd.tracking.files import read_json, write_json
from basd.tracking.mirror import Mirror
from basd.tracking.mlflow_store import open_client
from basd.tracking.runs import ApiRuns
from basd.tracking.sql_runs import SqlRuns


def test_server_and_tables_read_the_same(table: Table) -> None:
    def read(reader: SqlRuns | ApiRuns) -> list[Any]:
        (number,) = [one.number for one in reader.experiments() if one.name == SETTING]
        runs = reader.runs(number)
        points = [sorted((p.metric, p.step, p.value) for p in reader.points([run])) for run in runs]
        reader.close()
        return list(zip(runs, points, strict=True))

    by_tables = read(SqlRuns(table.options.tracking_uri))
    assert len(by_tables) == 6 and by_tables == read(ApiRuns(table.options.tracking_uri))
    points = next(points for run, points in by_tables if run.run_id == table.run_id(0))
    assert [point for point in points if point[0] == "val/top1"] == [
        ("val/top1", 3, pytest.approx(0.3)),
        ("val/top1", 6, pytest.approx(0.6)),
    ]


IN_RUN = "WHERE run_uuid = :run AND key = 'train/loss' AND step = 2"
MLFLOW_BREAKS = {
    "point deleted": (f"DELETE FROM metrics {IN_RUN}", "differing", "lacks train/loss at step 2"),
    "last point deleted": (
        "DELETE FROM metrics WHERE run_uuid = :run AND key = 'train/loss' AND step = 6",
        "differing",
        "lacks train/loss at step 6",
    ),
    "point twice": (
        f"INSERT INTO metrics (key, value, timestamp, step, is_nan, run_uuid) SELECT key, value, timestamp + 1, step, is_nan, run_uuid FROM metrics {IN_RUN}",
        "differing",
        "has twice train/loss at step 2",
    ),
    "point too many": (
        f"INSERT INTO metrics (key, value, timestamp, step, is_nan, run_uuid) SELECT key, value, timestamp, 7, is_nan, run_uuid FROM metrics {IN_RUN}",
        "differing",
        "the journal has not: train/loss at step 7",
    ),
    "value changed": (f"UPDATE metrics SET value = 9.0 {IN_RUN}", "differing", "step 2 is 9.0, in the journal 0.5"),
    "final value changed": (
        "UPDATE latest_metrics SET value = 0.9 WHERE run_uuid = :run AND key = 'test/top1'",
        "differing",
        "ends with test/top1 0.9, the ledger says 0.5",
    ),
    "run RUNNING": ("UPDATE runs SET status = 'RUNNING' WHERE run_uuid = :run", "orphaned", "is RUNNING, though"),
    "run KILLED": ("UPDATE runs SET status = 'KILLED' WHERE run_uuid = :run", "differing", "is KILLED"),
    "run deleted": (
        "UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = :run",
        "differing",
        "no MLflow run any more",
    ),
    "elsewhere": (
        "UPDATE tags SET value = 'nobody' WHERE run_uuid = :run AND key = 'mlflow.parentRunId'",
        "differing",
        "does not lie under its configuration's run",
    ),
    "not tagged": (
        "DELETE FROM tags WHERE run_uuid = :run AND key = 'basd.ablation.fake_table'",
        "differing",
        "not tagged as fake_table: row0",
    ),
    "other version": (
        "UPDATE tags SET value = 'v0' WHERE run_uuid = :run AND key = 'basd.version'",
        "differing",
        "says code v0, trained with v1",
    ),
    "mark of a NaN": (
        "INSERT INTO tags (key, value, run_uuid) VALUES ('basd.nonfinite.train/loss', 'nan at step 2', :run)",
        "differing",
        "train/loss is marked nan at step 2, in the journal finite",
    ),
}


@pytest.mark.parametrize("repaired", [["point too many", "run deleted"], pytest.param(list(MLFLOW_BREAKS), marks=pytest.mark.full)],
                         ids=["two", "all"])  # fmt: skip
def test_broken_run_is_found_and_its_way_out_puts_it_right(table: Table, repaired: list[str]) -> None:
    intact = (table.root / "mlflow.db").read_bytes()
    for case, (statement, kind, text) in MLFLOW_BREAKS.items():
        with sqlite3.connect(table.root / "mlflow.db") as database:
            assert database.execute(statement, {"run": table.run_id(0)}).rowcount == 1, case
        (finding,) = table.audit().findings
        assert (finding.kind, finding.subject, finding.row, finding.seed) == (kind, KEYS[0], "Row 0", 0), case
        assert text in finding.what, case
        if case in repaired:
            table.follow_ways_out()
            assert table.found() == [], (case, table.audit().findings)
        else:
            (table.root / "mlflow.db").write_bytes(intact)


def test_times_measured_anew_do_not_differ(table: Table) -> None:
    table.sql("UPDATE metrics SET value = 1.0 WHERE key = 'time/images_per_second'")
    assert table.found() == []
    table.sql("DELETE FROM metrics WHERE key = 'time/images_per_second' AND step = 3")
    assert table.found() == [("differing", f"Row {row}", seed) for seed in (0, 1) for row in (0, 1)]


def test_values_that_are_not_finite_must_be_marked(table: Table) -> None:
    rows = table.sql("SELECT key, value FROM tags WHERE run_uuid = ? AND key LIKE 'basd.nonfinite.%'", table.run_id(3))
    assert dict(rows) == {"basd.nonfinite.loss/rsd": "-inf at step 3", "basd.nonfinite.test/nll": "inf at step 6"}
    table.sql("DELETE FROM tags WHERE key = 'basd.nonfinite.loss/rsd'")
    (finding,) = table.audit().findings
    assert (finding.kind, finding.row, finding.seed) == ("differing", "Row 1", 1)
    assert "loss/rsd is marked finite, in the journal -inf at step 3" in finding.what
    table.follow_ways_out()
    assert table.found() == []


def test_runs_that_stand_beside_the_tables_do_not_count(table: Table) -> None:
    directory = table.options.arm_directory(SETTING, f"{KEYS[0]}-again")
    shutil.copytree(table.directory(0), directory)
    (directory / "mirror.json").unlink()
    mirror = Mirror(table.options.tracking_uri)
    mirror.add(directory, run_tag="again-1")
    assert mirror.drain(30.0)
    assert len(table.sql("SELECT 1 FROM tags WHERE key = 'basd.arm_key' AND value = ?", KEYS[0])) == 2
    assert table.found() == []
    table.sql(
        "UPDATE runs SET start_time = start_time + 1 WHERE run_uuid IN (SELECT run_uuid FROM tags WHERE key = 'basd.run')"
    )
    # without its tag it is a second run of the arm
    table.sql("DELETE FROM tags WHERE key = 'basd.run'")
    (finding,) = table.audit().findings
    assert (finding.kind, finding.subject) == ("duplicate", KEYS[0]) and finding.what.startswith("2 MLflow runs")
    (extra,) = re.findall(r"--run-id (\w+)", finding.way_out)
    open_client(table.options.tracking_uri).delete_run(extra)
    assert table.found() == []


def test_second_run_of_a_configuration_is_found(table: Table) -> None:
    client = open_client(table.options.tracking_uri)
    (experiment,) = table.sql("SELECT experiment_id FROM experiments WHERE name = ?", SETTING)[0]
    second = client.create_run(str(experiment), tags={"basd.configuration_key": PLAN.rows[1].configuration_key})
    client.set_terminated(second.info.run_id)
    (finding,) = table.audit().findings
    assert (finding.kind, finding.row, finding.seed) == ("duplicate", "Row 1", None)
    assert f"`mlflow runs delete --run-id {second.info.run_id}`" == finding.way_out
    client.delete_run(second.info.run_id)
    assert table.found() == []


def test_unended_runs_of_others_are_judged_by_the_ledger(table: Table) -> None:
    table.sql("UPDATE runs SET status = 'RUNNING' WHERE run_uuid = ?", table.parent_id(0))
    (finding,) = table.audit().findings
    assert (finding.kind, finding.row, finding.seed) == ("orphaned", "Row 0", None)
    assert "run of its configuration" in finding.what and "trained by nobody" in finding.what
    shutil.move(table.directory(0) / "mirror.json", table.root)  # as after a crash before all was sent
    (finding,) = table.audit().findings
    assert (finding.kind, finding.row, finding.way_out) == ("unsent", "Row 0", "run `basd sync fake_table`")
    shutil.move(table.root / "mirror.json", table.directory(0))
    table.follow_ways_out()
    assert table.found() == []
    # an arm of another table: running as long as the ledger says so
    client = open_client(table.options.tracking_uri)
    (experiment,) = table.sql("SELECT experiment_id FROM experiments WHERE name = ?", SETTING)[0]
    other = make_plan(3, 1).arms_of("row2")[0]
    tags = {"basd.arm_key": other.arm_key, "basd.configuration_key": other.configuration_key, "basd.seed": "0"}
    client.create_run(str(experiment), run_name="other", tags={**tags, "basd.ablation.other_table": "row2"})
    client.create_run(str(experiment), run_name="by hand")  # not BASD's
    ledger = table.ledger()
    ledger.ensure([other], {}, "other_table")
    (finding,) = table.audit().findings
    assert (finding.kind, finding.row, finding.seed) == ("orphaned", "other", 0)
    assert finding.way_out == "`basd audit other_table` says more"
    assert ledger.claim([other.arm_key], 1)
    assert table.found() == []
    # a configuration of which one arm waits: its run stays open while a grid is at work
    client.create_run(str(experiment), run_name="open", tags={"basd.configuration_key": "c" * 16})
    waiting = dataclasses.replace(other, arm_key="a" * 16, configuration_key="c" * 16)
    ledger.ensure([waiting], {}, "other_table")
    assert table.found() == []
    ledger.fail(other.arm_key, "it broke")
    assert table.found() == [("orphaned", "other", 0), ("orphaned", "open", None)]
    ledger.close()


def test_what_was_not_sent_is_told_apart_from_what_got_lost(table: Table) -> None:
    state = read_json(table.directory(0) / "mirror.json") or {}
    # as when the mirror's process was killed after step 3
    table.sql("DELETE FROM metrics WHERE run_uuid = ? AND step > 3", table.run_id(0))
    table.sql("DELETE FROM latest_metrics WHERE run_uuid = ?", table.run_id(0))
    for key, step in (("train/loss", 3), ("loss/rsd", 3), ("val/top1", 3), ("time/images_per_second", 3)):
        table.sql(
            "INSERT INTO latest_metrics (key, value, timestamp, step, is_nan, run_uuid) SELECT key, value, timestamp, step, is_nan, run_uuid FROM metrics "
            "WHERE run_uuid = ? AND key = ? AND step = ?",
            *(table.run_id(0), key, step),
        )
    table.sql("UPDATE runs SET status = 'RUNNING' WHERE run_uuid IN (?, ?)", table.run_id(0), table.parent_id(0))
    write_json(table.directory(0) / "mirror.json", {**state, "position": 300, "status": ""})
    (finding,) = table.audit().findings
    assert (finding.kind, finding.what, finding.way_out) == ("unsent", "not sent yet", "run `basd sync fake_table`")
    assert "1 not sent to MLflow yet" in table.audit().summary
    table.sql("DELETE FROM metrics WHERE run_uuid = ? AND key = 'train/loss' AND step = 2", table.run_id(0))
    assert [kind for kind, _, _ in table.found()] == ["differing", "unsent"]
    table.follow_ways_out()
    assert table.found() == []


def test_arms_of_a_dead_server_are_sent_later(table: Table) -> None:
    (table.root / "mlflow.db").unlink()
    audit = table.audit()
    assert audit.findings == [] and not audit.in_order
    assert "nothing missing, failed or duplicate as far as could be read" in audit.summary
    assert "does not exist" in audit.problems[0] and "`basd sync`" in audit.problems[0]
    assert not (table.root / "mlflow.db").exists()
    assert "does not answer" in table.audit(tracking_uri="http://127.0.0.1:9").problems[0]
    (table.root / "mlflow.db").write_text("this is not a database, and longer than a header of one hundred bytes" * 3)
    assert "not a database" in table.audit().problems[0]


def test_store_that_fails_on_the_way_is_a_sentence(table: Table) -> None:
    table.edit_journal(3, lambda lines: lines[:-1])
    table.sql("ALTER TABLE metrics RENAME TO gone")
    audit = table.audit()
    assert len(audit.problems) == 1 and "no such table: metrics" in audit.problems[0]
    assert audit.complete == 4 and [finding.subject for finding in audit.findings] == [KEYS[3]]
