"""The audit of the journals: what is torn, lost, changed or twice is found and named."""

from __future__ import annotations

import shutil
import socket
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from audit_fakes import KEYS, Table

from basd.grid.audit_records import expected_steps, read_journal
from basd.tracking.journal import Journal


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


def test_broken_journal_is_found(table: Table) -> None:
    intact = table.journal(0).read_bytes()
    for case, (change, text) in JOURNAL_BREAKS.items():
        table.journal(0).write_bytes(intact)
        table.edit_journal(0, change)
        (finding,) = table.audit().findings
        assert (finding.kind, finding.subject) == ("differing", KEYS[0]), case
        assert text in finding.what.replace("0.6000000000000001", "0.6"), case
        assert str(table.directory(0)) in finding.way_out and "`basd train --again seed=…`" in finding.way_out, case


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
