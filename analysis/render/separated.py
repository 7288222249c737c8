"""A table's numbers in full precision, and the arms behind them, as CSV."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from analysis.escape import one_line
from analysis.sheets import csv_text, number

if TYPE_CHECKING:
    from analysis.tables import Table

_FIELDS = ("mean", "sd", "pairs", "delta", "low", "high", "p", "p_holm", "p_sign_flip", "verdict")


def numbers_csv(table: Table) -> str:
    """One line per row and metric; figures that others have reported stand in a column of their own, without a mean."""
    from analysis.precision import CSV_FIELDS, csv_values

    layout = table.layout
    first = ("row", "label", "section", "reference", "metric", "unit", "n", *_FIELDS)
    lines: list[Sequence[object]] = [(*first, *CSV_FIELDS, "reported", "source", *layout.marks)]
    for line in table.lines:
        for shown, result in zip(layout.metrics, line.comparisons, strict=True):
            scaled = [value * shown.scale for value in (result.mean, result.sd, result.delta, result.low, result.high)]
            middle, sd, delta, low, high = (number(value) for value in scaled)
            chances = [number(value) for value in (result.p, result.p_holm, result.p_sign_flip)]
            values = [middle, sd, result.pairs, delta, low, high, *chances, result.verdict if result.n else ""]
            values += csv_values(layout, shown, result)
            start = [line.row.name, one_line(line.row.label), line.row.section, layout.reference]
            unit = "points" if shown.percent else ""
            lines.append([*start, shown.name, unit, result.n, *values, "", "", *line.row.marks])
    for figures in layout.reported:
        for shown in layout.metrics:
            if shown.name in figures.values:
                start = ["", one_line(figures.label), figures.section, "", shown.name]
                unit = "points" if shown.percent else ""
                told = [figures.values[shown.name], one_line(figures.source)]
                lines.append([*start, unit, "", *[""] * len((*_FIELDS, *CSV_FIELDS)), *told, *[""] * len(layout.marks)])
    return csv_text(lines)


def runs_csv(table: Table) -> str:
    """One line per row and seed, metric values as logged."""
    return csv_text([table.run_columns, *table.runs])
