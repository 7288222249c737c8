"""`basd status`: how far each table is, and about how long it will take."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from basd.errors import UserError
from basd.grid.display import data_wait, duration, said_of
from basd.grid.ledger import ArmState, Ledger
from basd.grid.options import GridOptions
from basd.tracking.files import read_json

if TYPE_CHECKING:
    from rich.console import Console

    from basd.grid.plan import Plan

FRESH = 60.0  # seconds after which a reported speed says nothing about now


@dataclass(frozen=True)
class Counts:
    """Arms by what became of them; `waiting` includes those that were never enqueued."""

    done: int = 0
    running: int = 0
    waiting: int = 0
    failed: int = 0
    pruned: int = 0  # left by a sweep

    @property
    def total(self) -> int:
        """All arms."""
        return self.done + self.running + self.waiting + self.failed + self.pruned


@dataclass(frozen=True)
class TableStatus:
    """How far one ablation is in one setting."""

    setting: str
    name: str
    plan_path: Path
    counts: Counts
    rows: dict[str, Counts]  # by row label, in the table's order
    share: float  # of all arm-steps that are done, 0 to 1
    seconds_left: float | None  # None: nobody is training
    data_wait: float | None = None  # share of their last epochs that the arms in training waited for images
    failures: list[tuple[str, str, str]] = field(default_factory=list)  # arm, reason, log


def status(options: GridOptions, name: str | None = None, setting: str | None = None) -> list[TableStatus]:
    """The newest plan of every ablation in every setting under the run directory, or of those asked for."""
    tables = []
    for path in newest_plans(Path(options.directory), name, setting):
        from basd.grid.plan import Plan

        try:
            plan = Plan.load(path)
        except UserError:  # written by another version of BASD
            continue
        ledger = Ledger.of(options, plan.setting)
        states = ledger.arms(list(plan.arms)) if ledger.exists else {}
        tables.append(_table(plan, path, states, options))
    return tables


def newest_plans(directory: Path, name: str | None, setting: str | None) -> list[Path]:
    newest: dict[tuple[str, str], Path] = {}
    for path in sorted(directory.glob(f"{setting or '*'}/plans/*-*.json"), key=lambda p: p.stat().st_mtime):
        ablation = path.stem.rpartition("-")[0]
        if name is None or ablation == name:
            newest[path.parent.parent.name, ablation] = path
    return [newest[key] for key in sorted(newest)]


def _table(plan: Plan, path: Path, states: dict[str, ArmState], options: GridOptions) -> TableStatus:
    rows = {row.label: _count([states.get(key) for key in plan.cells[row.name].values()]) for row in plan.rows}
    total = done = 0
    speed = 0.0
    training = []
    for key, arm in plan.arms.items():
        state = states.get(key)
        total += arm.total_steps
        if state is not None and state.state in ("complete", "pruned"):
            done += arm.total_steps
            continue
        progress = read_json(options.arm_directory(plan.setting, key) / "progress.json") or {}
        done += min(arm.total_steps, int(progress.get("step", 0)))
        if state is not None and state.state == "running" and time.time() - float(progress.get("time", 0)) < FRESH:
            speed += float(progress.get("steps_per_second") or 0.0)
            training.append(options.arm_directory(plan.setting, key))
    failures = [
        (f"{state.name} seed={state.seed}", state.reason, state.log) for state in states.values() if state.permanent
    ]
    counts = _count([states.get(key) for key in plan.arms])
    left = 0.0 if counts.done + counts.pruned == counts.total else (total - done) / speed if speed > 0 else None
    share, wait = done / max(1, total), data_wait(training)
    return TableStatus(plan.setting, plan.name, path, counts, rows, share, left, wait, failures)


def _count(states: list[ArmState | None]) -> Counts:
    found: Counter[str] = Counter()
    for state in states:
        if state is None or state.state == "waiting" or (state.state == "failed" and not state.permanent):
            found["waiting"] += 1
        else:
            found[{"complete": "done", "failed": "failed", "pruned": "pruned"}.get(state.state, "running")] += 1
    return Counts(**found)


def print_status(tables: list[TableStatus], console: Console) -> None:
    """One table per ablation, failures below it."""
    from rich.table import Table
    from rich.text import Text

    if not tables:
        console.print("Nothing was planned here yet; start with `basd grid NAME`.", markup=False)
    for table in tables:
        counts, left = table.counts, table.seconds_left
        title = f"{table.name} in {table.setting}: {counts.done} of {counts.total} arms done, {100 * table.share:.0f} % of the steps"
        if counts.pruned:
            title += f", {counts.pruned} left by the sweep"
        if counts.done + counts.pruned < counts.total:
            title += f", about {duration(left)} left" if left is not None else ", nobody is training"
            title += said_of(table.data_wait)
        console.print(title, markup=False, highlight=False, soft_wrap=True)
        kinds = ["done", "running", "waiting", "failed", *(["pruned"] if counts.pruned else [])]
        shown = Table("row", *kinds)
        for label, row in table.rows.items():
            shown.add_row(Text(label), *(str(getattr(row, kind) or "") for kind in kinds))
        console.print(shown)
        for arm, reason, log in table.failures:
            console.print(f"Failed: {arm}: {reason}" + (f"; log: {log}" if log else ""), markup=False, soft_wrap=True)
