"""The audit: an intact table is clean, and every record that is broken on purpose is found, named, and put right by its way out."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import re
import shutil
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from grid_fakes import SETTING, make_plan
from rich.console import Console

from basd.cli import main
from basd.errors import UserError
from basd.grid.audit import Audit, audit_plan, print_audit
from basd.grid.audit_records import Tracked, expected_steps, read_journal
from basd.grid.ledger import Ledger
from basd.grid.options import GridOptions
from basd.grid.plan import Plan
from basd.grid.run import labels_of, mirror_of, sync
from basd.grid.worker import Worker
from basd.tracking.files import read_json, write_json
from basd.tracking.journal import Journal
from basd.tracking.mirror import Mirror
from basd.tracking.mlflow_store import fingerprint, open_client
from basd.tracking.runs import ApiRuns
from basd.tracking.sql_runs import SqlRuns

STEPS = 6
PLAN = make_plan(2, 2, steps=STEPS)
KEYS = list(PLAN.arms)  # (row 0, seed 0), (row 1, seed 0), (row 0, seed 1), (row 1, seed 1)


def train(arms: Any, directories: Any, recorders: Any, *, finished: Any, **callbacks: Any) -> list[Any]:
    """Records what is not finite, the same metric from training and at the end, and one only at the end."""
    results = []
    for arm, directory, recorder in zip(arms, directories, recorders, strict=True):
        recorder.rewind(0)
        for step in range(1, STEPS + 1):
            odd = {2: math.nan, 3: -math.inf}.get(step, 1.0 / step) if arm.arm_key == KEYS[3] else 1.0 / step
            recorder.metrics(step, {"train/loss": 1.0 / step + 0.1 * arm.seed, "loss/rsd": odd})
            if step % 3 == 0:
                recorder.metrics(step, {"val/top1": 0.1 * step, "time/images_per_second": 7.0 * step})
        nll = math.inf if arm.arm_key == KEYS[3] else 0.3
        recorder.metrics(STEPS, {"test/top1": 0.5 + 0.01 * arm.seed})
        (directory / "student.safetensors").write_bytes(b"weights")
        final = {"test/top1": 0.5 + 0.01 * arm.seed, "test/nll": nll, "val/top1": 0.1 * STEPS}
        results.append(SimpleNamespace(arm_key=arm.arm_key, status="complete", metrics=final, reason=""))
        finished(results[-1])
    return results


class Table:
    """A table with its three records in one directory."""

    def __init__(self, root: Path, plan: Plan = PLAN) -> None:
        self.root, self.plan = root, plan
        self.options = GridOptions(
            directory=str(root / "runs"),
            ledger_url=f"sqlite:///{root}/ledger.db",
            tracking_uri=f"sqlite:///{root}/mlflow.db",
        )

    def ledger(self) -> Ledger:
        return Ledger(self.options.ledger_url, SETTING, retries=self.options.retries, grace=self.options.grace)

    def enqueue(self, plan: Plan | None = None) -> None:
        plan = plan or self.plan
        self.ledger().ensure(plan.arms.values(), labels_of(plan), plan.name)

    def work(self, plan: Plan | None = None) -> None:
        plan = plan or self.plan
        self.enqueue(plan)
        Worker(plan.arms, self.ledger(), self.options, train=train).work()

    def send(self) -> None:
        mirror = mirror_of(self.plan, self.options, self.ledger())
        assert mirror.drain(30.0), mirror.problem

    def directory(self, arm: int) -> Path:
        return self.options.arm_directory(SETTING, KEYS[arm])

    def journal(self, arm: int) -> Path:
        return self.directory(arm) / "journal.jsonl"

    def edit_journal(self, arm: int, change: Callable[[list[dict[str, Any]]], Any]) -> None:
        lines = [json.loads(line) for line in self.journal(arm).read_text().splitlines()]
        lines = change(lines) or lines
        self.journal(arm).write_text("".join(json.dumps(line) + "\n" for line in lines))

    def sql(self, statement: str, *values: Any) -> list[Any]:
        with sqlite3.connect(self.root / "mlflow.db") as database:
            return database.execute(statement, values).fetchall()

    def run_id(self, arm: int) -> str:
        (found,) = self.sql("SELECT run_uuid FROM tags WHERE key = 'basd.arm_key' AND value = ?", KEYS[arm])
        return str(found[0])

    def parent_id(self, arm: int) -> str:
        ((found,),) = self.sql(
            "SELECT value FROM tags WHERE key = 'mlflow.parentRunId' AND run_uuid = ?", self.run_id(arm)
        )
        return str(found)

    def audit(self, **options: Any) -> Audit:
        changed = dataclasses.replace(self.options, **options)
        return audit_plan(self.plan, changed, "v1")

    def found(self, **options: Any) -> list[tuple[str, str, int | None]]:
        return [(finding.kind, finding.row, finding.seed) for finding in self.audit(**options).findings]

    def follow_ways_out(self) -> None:
        """Do what the audit says."""
        client = open_client(self.options.tracking_uri)
        findings = self.audit().findings
        assert any("`basd sync fake_table`" in finding.way_out for finding in findings)
        for finding in findings:
            for run_id in re.findall(r"`mlflow runs delete --run-id (\w+)`", finding.way_out):
                client.delete_run(run_id)
            removed = re.search(r"remove (\S+),", finding.way_out)
            if removed:
                Path(removed[1]).unlink()
        assert sync(self.plan, self.options).mirrored


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished table. Making a store takes seconds, copying it does not."""
    table = Table(tmp_path_factory.mktemp("intact"))
    table.work()
    table.send()
    return table.root


@pytest.fixture
def table(intact: Path, tmp_path: Path) -> Table:
    root = tmp_path / "table"
    shutil.copytree(intact, root)
    copied = Table(root)
    for path in root.glob("runs/*/*/mirror.json"):
        write_json(path, {**(read_json(path) or {}), "store": fingerprint(copied.options.tracking_uri)})
    return copied


def test_intact_table_is_in_order_and_nothing_is_touched(table: Table) -> None:
    def content() -> dict[Path, str]:
        files = [path for path in table.root.rglob("*") if path.is_file()]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = content()
    audit = table.audit()
    assert audit.findings == [] and audit.problems == [] and audit.notes == [] and audit.in_order
    assert audit.summary == (
        f"fake_table in {SETTING}: 4 of 4 arms complete, nothing missing, failed or duplicate; code version v1."
    )
    assert content() == before


def test_server_and_tables_read_the_same(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    by_tables = Tracked(table.options.tracking_uri, SETTING)
    monkeypatch.setattr("basd.grid.audit_records.open_runs", ApiRuns)
    by_client = Tracked(table.options.tracking_uri, SETTING)
    assert len(by_tables.runs) == 6
    assert by_client.runs == by_tables.runs
    for run in by_tables.runs:
        assert by_client.points(run) == by_tables.points(run)
    assert by_tables.points(next(r for r in by_tables.runs if r.run_id == table.run_id(0)))["val/top1"] == {
        3: [pytest.approx(0.3)],
        6: [pytest.approx(0.6)],
    }


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


@pytest.mark.parametrize("case", MLFLOW_BREAKS)
def test_broken_run_is_found_and_its_way_out_puts_it_right(table: Table, case: str) -> None:
    statement, kind, text = MLFLOW_BREAKS[case]
    with sqlite3.connect(table.root / "mlflow.db") as database:
        assert database.execute(statement, {"run": table.run_id(0)}).rowcount == 1
    (finding,) = table.audit().findings
    assert (finding.kind, finding.subject, finding.row, finding.seed) == (kind, KEYS[0], "Row 0", 0)
    assert text in finding.what
    table.follow_ways_out()
    assert table.found() == [], table.audit().findings


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


def test_store_that_fails_on_the_way_is_a_sentence(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    def points(self: Any, runs: Any) -> Any:
        raise sqlite3.OperationalError("database is locked")

    table.edit_journal(3, lambda lines: lines[:-1])
    monkeypatch.setattr(SqlRuns, "points", points)
    audit = table.audit()
    assert len(audit.problems) == 1 and "cannot be read (database is locked)" in audit.problems[0]
    assert audit.complete == 4 and [finding.subject for finding in audit.findings] == [KEYS[3]]


# -- the ledger --------------------------------------------------------------------------------------------------------


def test_second_complete_trial_is_a_duplicate(table: Table) -> None:
    from optuna.trial import TrialState, create_trial

    ledger = table.ledger()
    state = ledger.arms()[KEYS[0]]
    trial = next(trial for trial in ledger._trials() if trial.number == state.number)
    for metrics, how in ((trial.user_attrs["metrics"], "the same"), ({"test/top1": 0.1}, "different")):
        again = create_trial(state=TrialState.COMPLETE, value=0.5, user_attrs={**trial.user_attrs, "metrics": metrics})
        ledger._database.storage.create_new_trial(ledger._study_id(), again)
        (finding,) = table.audit().findings
        assert (finding.kind, finding.subject) == ("duplicate", KEYS[0])
        assert f"with {how} metrics" in finding.what and f"the first, {state.number}, counts" in finding.way_out
    assert "4 of 4 arms complete, 1 duplicate; code version v1." in table.audit().summary


def test_states_of_the_ledger_are_told(tmp_path: Path, intact: Path) -> None:
    table = Table(tmp_path, make_plan(3, 2, steps=STEPS))
    shutil.copy(intact / "mlflow.db", tmp_path / "mlflow.db")
    Table.sql(table, "DELETE FROM experiments WHERE name = ?", SETTING)
    owner, gone = table.ledger(), table.ledger()
    gone.owner = dataclasses.replace(gone.owner, pid=2**22 + 1)  # no such process
    arms = list(table.plan.arms.values())
    owner.ensure(arms[:5], labels_of(table.plan), "fake_table")  # the sixth was never enqueued
    assert owner.claim([arms[0].arm_key], 1) and gone.claim([arms[1].arm_key], 1)
    for _ in range(2):
        assert owner.claim([arms[2].arm_key], 1)
        owner.fail(arms[2].arm_key, "loss is not finite at step 3", "logs/worker.log")
    journal = Journal(table.options.arm_directory(SETTING, arms[3].arm_key))
    journal.end("complete", "", {"test/top1": 0.5})
    journal.close()
    audit = table.audit()
    told = {(finding.row, finding.seed): finding for finding in audit.findings}
    assert [finding.kind for finding in told.values()] == ["running", "missing", "failed", *["missing"] * 3]
    assert f"in training by process {owner.owner.pid} on {socket.gethostname()}" == told["Row 0", 0].what
    assert "stale: its owner, process 4194305" in told["Row 1", 0].what
    assert told["Row 2", 0].what == "failed: loss is not finite at step 3"
    assert told["Row 2", 0].way_out == "log logs/worker.log; `basd grid fake_table` tries again"
    assert told["Row 0", 1].what == "its journal is complete, the ledger says waiting"
    assert told["Row 1", 1].what == "waiting" and told["Row 2", 1].what == "never enqueued"
    assert audit.summary == f"fake_table in {SETTING}: 0 of 6 arms complete, 4 missing, 1 in training, 1 failed."
    owner.close()
    gone.close()


def test_run_of_an_arm_that_nobody_trains_is_orphaned_until_synced(table: Table) -> None:
    from optuna.trial import TrialState

    table.ledger()._database.storage.set_study_user_attr  # noqa: B018 - the database is opened
    with sqlite3.connect(table.root / "ledger.db") as database:
        number = table.ledger().arms()[KEYS[0]].number
        database.execute("UPDATE trials SET state = ? WHERE number = ?", (TrialState.WAITING.name, number))
    table.edit_journal(0, lambda lines: lines[:-1])
    table.sql("UPDATE runs SET status = 'RUNNING' WHERE run_uuid = ?", table.run_id(0))
    assert table.found() == [("missing", "Row 0", 0), ("orphaned", "Row 0", 0)]
    (orphaned,) = [finding for finding in table.audit().findings if finding.kind == "orphaned"]
    assert "trained by nobody" in orphaned.what and orphaned.way_out == "run `basd sync fake_table`"
    table.follow_ways_out()
    assert table.found() == [("missing", "Row 0", 0)]
    table.sql("UPDATE runs SET status = 'FINISHED' WHERE run_uuid = ?", table.run_id(0))
    assert table.found() == [("missing", "Row 0", 0), ("differing", "Row 0", 0)]


@pytest.mark.parametrize("content", ["none", "garbage", "no study"])
def test_ledger_that_cannot_be_read_is_a_sentence(table: Table, content: str, tmp_path: Path) -> None:
    table.sql("DELETE FROM metrics WHERE run_uuid = ? AND key = 'train/loss' AND step = 2", table.run_id(0))
    (table.root / "ledger.db").unlink()
    if content == "garbage":
        (table.root / "ledger.db").write_text("no database, though longer than the header of one would have to be" * 9)
    if content == "no study":
        Ledger(table.options.ledger_url, "another setting").check()
        assert table.found() == [("missing", f"Row {row}", seed) for seed in (0, 1) for row in (0, 1) for _ in (0,)]
        return
    audit = table.audit()
    assert len(audit.problems) == 1 and "ledger.url=…" in audit.problems[0]
    assert audit.complete == 4 and [finding.kind for finding in audit.findings] == ["differing"]
    assert content == "garbage" or not (table.root / "ledger.db").exists()


def test_ledger_address_that_is_none_is_bad_input(table: Table) -> None:
    with pytest.raises(UserError, match="no database address"):
        table.audit(ledger_url="nonsense")


# -- the journal -------------------------------------------------------------------------------------------------------


def _set(lines: list[dict[str, Any]], line: int, **values: Any) -> None:
    lines[line].update(values)


JOURNAL_BREAKS: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "no end": (lambda lines: lines[:-1], 'ends with step 6 of 6, not with "complete"'),
    "cut": (lambda lines: lines[:4], 'ends with step 3 of 6, not with "complete"'),
    "stopped": (lambda lines: _set(lines, -1, end="stopped"), 'ends with "stopped", not'),
    "line lost": (lambda lines: lines[:1] + lines[2:], "lacks lines before line 2"),
    "step lost at the end": (
        lambda lines: [{**line, "i": i} for i, line in enumerate([x for x in lines if x.get("step") != 6])],
        "ends at step 5, the plan has 6 steps",
    ),
    "twice": (lambda lines: _set(lines, 1, step=1), "has twice: train/loss at step 1, loss/rsd at step 1"),
    "goes back": (lambda lines: _set(lines, 4, step=2), "goes back from step 3 to 2"),
    "goes on": (
        lambda lines: [*lines, {"i": len(lines), "t": 1, "step": 6, "metrics": {"x": 1.0}}],
        "goes on after its end",
    ),
    "no final metrics": (lambda lines: _set(lines, -1, metrics={}), "ends without final metrics"),
    "other final metric": (
        lambda lines: lines[-1]["metrics"].update({"test/nll": 0.4}),
        "closes with test/nll 0.4, the ledger says 0.3",
    ),
    "final metric unlike its point": (
        lambda lines: lines[-1]["metrics"].update({"val/top1": 0.9}),
        "closes with val/top1 0.9, its last point is 0.6",
    ),
}


@pytest.mark.parametrize("case", JOURNAL_BREAKS)
def test_broken_journal_is_found(table: Table, case: str) -> None:
    change, text = JOURNAL_BREAKS[case]
    table.edit_journal(0, lambda lines: change(lines) if isinstance(change(list(lines)), list) else lines)
    (finding,) = table.audit().findings
    assert (finding.kind, finding.subject) == ("differing", KEYS[0])
    assert text in finding.what.replace("0.6000000000000001", "0.6")
    assert str(table.directory(0)) in finding.way_out and "`basd train --again seed=…`" in finding.way_out


def test_torn_or_missing_files_are_found(table: Table) -> None:
    data = table.journal(0).read_bytes()
    table.journal(0).write_bytes(data[:-20])
    (finding,) = table.audit().findings
    assert "cannot be read after line" in finding.what
    table.journal(0).unlink()
    (table.directory(1) / "student.safetensors").unlink()
    assert [finding.what.split(":")[0] for finding in table.audit().findings] == [
        "its journal is missing",
        "its student.safetensors is missing",
    ]


def test_arm_trained_on_another_machine_is_judged_by_what_is_known(table: Table) -> None:
    with sqlite3.connect(table.root / "ledger.db") as database:
        host = socket.gethostname()
        database.execute(
            "UPDATE trial_user_attributes SET value_json = REPLACE(value_json, ?, '\"node7\"')", (f'"{host}"',)
        )
    shutil.rmtree(table.directory(0))
    audit = table.audit()
    assert audit.in_order
    assert audit.notes == ["1 arm was trained on another machine; the journals there were not compared."]
    table.sql("UPDATE latest_metrics SET value = 0.1 WHERE run_uuid = ? AND key = 'test/top1'", table.run_id(0))
    (finding,) = table.audit().findings
    assert "ends with test/top1 0.1, the ledger says 0.5" in finding.what
    assert finding.way_out.endswith("run `basd sync fake_table` on the machine that trained it")


@pytest.mark.parametrize("epochs, length, every, validate", [(4, 5, 3, 2), (3, 10, 10, 5), (1, 1, 7, 1), (5, 2, 1, 3)])
def test_steps_to_expect(epochs: int, length: int, every: int, validate: int) -> None:
    total = epochs * length
    loss, ends, val = set(), set(), set()
    for epoch in range(epochs):  # as the training loop decides what to record
        for position in range(length):
            step = epoch * length + position + 1
            last = position == length - 1
            if step == 1 or step % every == 0 or last:
                loss.add(step)
            if last:
                ends.add(step)
            if last and ((epoch + 1) % validate == 0 or step == total):
                val.add(step)
    config = {
        "runtime": {"log_every": every},
        "recipe": {"duration": f"{epochs} epochs", "validate_every": validate},
    }
    assert expected_steps(total, config) == {"train/loss": loss, "time/images_per_second": ends, "val/top1": val}
    config["recipe"]["duration"] = f"{total} steps"  # where an epoch ends is not known
    known = expected_steps(total, config)
    assert known["train/loss"] == {1, total, *range(every, total + 1, every)} and known["val/top1"] == {total}
    assert expected_steps(total, {}) == {}


def test_gap_of_a_journal_is_found(tmp_path: Path) -> None:
    def record(steps: list[int], validated: list[int]) -> list[str]:
        shutil.rmtree(tmp_path / "arm", ignore_errors=True)
        journal = Journal(tmp_path / "arm")
        for step in sorted({*steps, *validated}):
            if step in steps:
                journal.metrics(step, {"train/loss": 1.0})
            if step in validated:
                journal.metrics(step, {"val/top1": 0.5, "time/images_per_second": 1.0})
        journal.end("complete", "", {"val/top1": 0.5})
        journal.close()
        config = {"runtime": {"log_every": 4}, "recipe": {"duration": "2 epochs", "validate_every": 1}}
        return read_journal(journal.path, 12, config).defects

    assert record([1, 3, 4, 6, 8, 12], [6, 12]) == []  # 3: a loss begins to count
    assert record([1, 6, 12], [6, 12]) == ["its journal lacks train/loss at step 4, 8"]
    assert record([1, 4, 8, 12], [6, 12]) == ["its journal lacks train/loss at step 6"]
    assert record([1, 4, 6, 8, 12], [12]) == [
        "its journal lacks time/images_per_second at step 6",
        "its journal lacks val/top1 at step 6",
    ]


# -- code --------------------------------------------------------------------------------------------------------------


def test_code_that_changed_since_is_told(table: Table) -> None:
    audit = audit_plan(table.plan, table.options, "v2")
    assert {(finding.kind, finding.what) for finding in audit.findings} == {
        ("stale", "trained with code v1, installed is v2")
    }
    assert len(audit.findings) == 4 and not audit.in_order
    assert audit.summary.endswith("4 of 4 arms complete, 4 of stale code; code version v1, installed is v2.")
    assert audit.findings[0].way_out == "`basd grid fake_table --retrain-stale` trains it again"


def test_several_code_versions_are_mixed(tmp_path: Path, intact: Path) -> None:
    table = Table(tmp_path)
    shutil.copy(intact / "mlflow.db", tmp_path / "mlflow.db")
    table.sql("UPDATE experiments SET name = 'another' WHERE name = ?", SETTING)
    changed = {key: dataclasses.replace(arm, version="v0-dirty") for key, arm in table.plan.arms.items()}
    table.work(dataclasses.replace(table.plan, arms={KEYS[0]: changed[KEYS[0]]}, cells={"row0": {0: KEYS[0]}}))
    table.work()
    table.send()
    audit = table.audit()
    (finding,) = audit.findings
    assert (finding.kind, finding.row, finding.seed) == ("stale", "Row 0", 0)
    assert audit.summary.endswith(
        "1 of stale code; mixed code versions v0-dirty (1 arm), v1 (3 arms), installed is v1."
    )
    assert any("--allow-mixed-code" in note for note in audit.notes)
    assert any(note.startswith("-dirty:") for note in audit.notes)


# -- the command -------------------------------------------------------------------------------------------------------


def test_findings_of_a_row_share_a_line(table: Table) -> None:
    text = io.StringIO()
    print_audit(audit_plan(table.plan, table.options, "v2"), Console(file=text, width=160))
    lines = [line for line in text.getvalue().splitlines() if "Row" in line]
    assert len(lines) == 2 and all("0, 1" in line and "trained with code v1" in line for line in lines)
    assert text.getvalue().startswith("fake_table in") and "--retrain-stale" in text.getvalue()


def test_command_says_it_with_its_exit_status(
    table: Table, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(table.root)
    monkeypatch.setattr("basd.version.code_version", lambda: "v1")
    path = table.plan.save(table.options.setting_directory(SETTING) / "plans" / "fake_table-abc123.json")
    assert main(["audit", "fake_table"]) == 0
    assert capsys.readouterr().out == (
        f"fake_table in {SETTING}: 4 of 4 arms complete, nothing missing, failed or duplicate; code version v1.\n"
    )
    assert main(["audit", "fake_table", f"setting={SETTING}", "tracking.uri=sqlite:///gone.db"]) == 1
    assert "MLflow was not audited" in capsys.readouterr().out
    for outside in ("../runs", "*", "/", ".."):
        assert main(["audit", "fake_table", f"setting={outside}"]) == 2
        assert "is not the name of a setting" in capsys.readouterr().err
    assert main(["audit", "fake_table", "setting=none"]) == 2
    assert f"choose another with setting=… ({SETTING})" in capsys.readouterr().err
    assert main(["audit", "mian"]) == 2
    assert "did you mean main?" in capsys.readouterr().err
    assert main(["audit", "main"]) == 2
    assert "run basd grid main first" in capsys.readouterr().err
    assert main(["audit", "fake_table", "ledger.url=nonsense"]) == 2
    assert "no database address" in capsys.readouterr().err
    # the plan of another setting cannot be read: the rest is audited
    other = table.root / "runs" / "other" / "plans" / path.name
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    assert main(["audit", "fake_table"]) == 1
    said = capsys.readouterr()
    assert "4 of 4 arms complete" in said.out and "not a plan" in said.err
