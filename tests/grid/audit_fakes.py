"""A table whose three records (ledger, journals, MLflow) lie in one directory, to be broken on purpose."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from grid_fakes import SETTING, make_plan

from basd.grid.audit import Audit, audit_plan
from basd.grid.ledger import Ledger
from basd.grid.options import GridOptions
from basd.grid.plan import Plan
from basd.grid.run import labels_of, mirror_of, sync
from basd.grid.worker import Worker
from basd.tracking.mlflow_store import open_client

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
        (found,) = self.sql(
            "SELECT run_uuid FROM tags JOIN runs USING (run_uuid) "
            "WHERE key = 'basd.arm_key' AND tags.value = ? AND lifecycle_stage = 'active'",
            KEYS[arm],
        )
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
