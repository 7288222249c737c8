"""A table as it was planned: which arm stands in which cell, and how the table is laid out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from analysis.layout import Layout, LayoutRow, Reported
from analysis.metrics import metric
from basd.errors import UserError

if TYPE_CHECKING:
    from basd.grid.plan import Plan


def plan_of(name: str, *, runs: str | Path = "runs", setting: str | None = None) -> Plan:
    """The newest plan of a table or a sweep in a directory of runs. UserError: none, or several settings hold one."""
    from basd.grid.plan import Plan

    return Plan.load(plan_path(name, runs=runs, setting=setting))


def plan_path(name: str, *, runs: str | Path = "runs", setting: str | None = None) -> Path:
    """The file of the plan that `plan_of` gives."""
    from basd.grid.status import newest_plans

    paths = newest_plans(Path(runs), name, setting)
    if not paths:
        where = f"{runs}/{setting}" if setting else f"{runs}"
        raise UserError(f"nothing was planned here for {name} ({where}); run basd grid {name} first.")
    if len(paths) > 1:
        choices = ", ".join(path.parent.parent.name for path in paths)
        raise UserError(f"several settings hold {name}; choose one with setting=… ({choices}).")
    return paths[0]


def layout_of(plan: Plan, wanted_delta: float | None = None) -> Layout:
    """The layout that a table's file asks for. `wanted_delta`: as of `Layout`."""
    marks = plan.row_marks
    return Layout(
        name=plan.name,
        title=plan.name,
        rows=tuple(LayoutRow(row.name, row.label, row.section, marks[row.name], row.factors) for row in plan.rows),
        reference=plan.reference,
        metrics=tuple(metric(name) for name in plan.metrics),
        question=plan.question,
        seeds=plan.seeds,
        notes=plan.notes,
        marks=tuple(plan.marks),
        reported=tuple(Reported(one.label, one.source, one.values, one.section) for one in plan.reported),
        setting=plan.setting,
        teacher=plan.teacher,
        plan=plan.hash,
        wanted_delta=wanted_delta,
    )
