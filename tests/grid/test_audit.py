"""The audit: an intact table is clean; what the ledger knows of other arms, other code, and the command."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import shutil
import socket
import sqlite3
from pathlib import Path

import pytest
from audit_fakes import KEYS, STEPS, Table
from grid_fakes import SETTING, make_plan
from optuna.trial import TrialState, create_trial
from rich.console import Console

from basd.cli import main
from basd.errors import UserError
from basd.grid.audit import audit_plan, print_audit
from basd.grid.ledger import Ledger
from basd.grid.run import labels_of
from basd.tracking.journal import Journal
from basd.version import code_version


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


# -- the ledger --------------------------------------------------------------------------------------------------------


def test_second_complete_trial_is_a_duplicate(table: Table) -> None:
    ledger = table.ledger()
    storage = ledger.database.storage
    study = storage.get_study_id_from_name(SETTING)
    number = ledger.arms()[KEYS[0]].number
    known = next(trial for trial in storage.get_all_trials(study) if trial.number == number).user_attrs
    for metrics, how in ((known["metrics"], "the same"), ({"test/top1": 0.1}, "different")):
        again = create_trial(state=TrialState.COMPLETE, value=0.5, user_attrs={**known, "metrics": metrics})
        storage.create_new_trial(study, again)
        (finding,) = table.audit().findings
        assert (finding.kind, finding.subject) == ("duplicate", KEYS[0])
        assert f"with {how} metrics" in finding.what and f"the first, {number}, counts" in finding.way_out
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


def test_ledger_that_cannot_be_read_is_a_sentence(table: Table) -> None:
    table.sql("DELETE FROM metrics WHERE run_uuid = ? AND key = 'train/loss' AND step = 2", table.run_id(0))
    ledger = table.root / "ledger.db"
    ledger.unlink()
    for content in ("", "no database, though longer than the header of one would have to be" * 9):
        if content:
            ledger.write_text(content)
        audit = table.audit()
        assert len(audit.problems) == 1 and "ledger.url=…" in audit.problems[0]
        assert audit.complete == 4 and [finding.kind for finding in audit.findings] == ["differing"]
        assert ledger.exists() == bool(content)
    ledger.unlink()
    Ledger(table.options.ledger_url, "another setting").check()
    assert table.found() == [("missing", f"Row {row}", seed) for seed in (0, 1) for row in (0, 1)]


def test_ledger_address_that_is_none_is_bad_input(table: Table) -> None:
    with pytest.raises(UserError, match="no database address"):
        table.audit(ledger_url="nonsense")


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
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(store, tmp_path / "mlflow.db")
    table = Table(tmp_path, make_plan(1, 1, steps=STEPS, version=code_version()))
    table.work()
    table.send()
    path = table.plan.save(table.options.setting_directory(SETTING) / "plans" / "fake_table-abc123.json")
    assert main(["audit", "fake_table"]) == 0
    in_order = f"fake_table in {SETTING}: 1 of 1 arms complete, nothing missing, failed or duplicate; code version"
    assert capsys.readouterr().out.startswith(f"{in_order} {code_version()}.\n")
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
    assert "1 of 1 arms complete" in said.out and "not a plan" in said.err
