"""From an arms frame and a layout to a table of cells, which `analysis.render` writes in every format.

The same runs always give the same bytes: no dates, rows in the layout's order, seeds and versions sorted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from analysis import statistics
from analysis.escape import one_line
from analysis.layout import Layout, LayoutRow, Reported
from analysis.load import COLUMNS
from analysis.metrics import Metric, metric
from analysis.notes import table_notes
from analysis.sheets import NONE, Cell, Column, Sheet, fixed, p_text
from analysis.statistics import Comparison

if TYPE_CHECKING:
    import pandas as pd
    import rich.console

__all__ = ["CHECK", "NONE", "Cell", "Column", "Layout", "LayoutRow", "Line", "Metric", "Reported", "Table", "build_table", "metric"]  # fmt: skip

CHECK = "✓"
REPORTED = "reported"  # verdict of figures that others have reported


@dataclass(frozen=True)
class Line:
    """One row of the table with a comparison per metric, in the layout's order."""

    row: LayoutRow
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class Table:
    """A computed table; `build_table` makes it."""

    layout: Layout
    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    run_columns: tuple[str, ...]
    runs: tuple[tuple[object, ...], ...]  # the arms behind the cells, as in <name>.runs.csv
    versions: tuple[str, ...] = ()  # of the code that trained them

    @property
    def columns(self) -> list[Column]:
        """Columns in their order."""
        columns = [Column("row", "left"), *(Column(title, "center") for title in self.layout.marks)]
        several = len(self.layout.metrics) > 1
        for shown in self.layout.metrics:
            which = f" {shown.label}" if several else ""
            columns.append(Column(shown.heading))
            if shown.tested and self.layout.is_split:
                continue
            if shown.tested:
                columns += [Column(f"Δ{which} [95 % interval]"), Column(f"p{which} (Holm)")]
                columns.append(Column(f"verdict{which}", "left"))
            else:
                columns.append(Column("÷ reference"))
        return [*columns, Column("n")]

    def header(self) -> list[str]:
        """Column titles."""
        return [column.title for column in self.columns]

    def cells(self, line: Line) -> list[Cell]:
        """The cells of one measured row, in the order of `columns`."""
        row = [Cell(one_line(line.row.label)), *(Cell(one_line(mark)) for mark in line.row.marks)]
        for shown, result, base in zip(self.layout.metrics, line.comparisons, self.reference.comparisons, strict=True):
            split = shown.tested and self.layout.is_split
            row.append(Cell(mean_text(result, shown), bold=split and result.significant))
            if not shown.tested:
                row.append(Cell(_ratio(result, base)))
            if not shown.tested or split:
                continue
            row += [
                Cell(_delta(result, shown), bold=result.significant),
                Cell(NONE if math.isnan(result.p_holm) else p_text(result.p_holm)),
                Cell(result.verdict if result.n else NONE),
            ]
        return [*row, Cell(n_text(line.comparisons))]

    def reported_cells(self, figures: Reported) -> list[Cell]:
        """The cells of figures that others have reported; `[1]` is the number of their source in the notes."""
        sources = list(dict.fromkeys(other.source for other in self.layout.reported))
        texts = [f"{one_line(figures.label)} [{sources.index(figures.source) + 1}]", *[""] * len(self.layout.marks)]
        for shown in self.layout.metrics:
            texts.append(figures.values.get(shown.name, NONE).replace("-", "−"))
            if not (shown.tested and self.layout.is_split):
                texts += [NONE, NONE, REPORTED] if shown.tested else [NONE]
        return [Cell(text, italic=True) for text in (*texts, NONE)]

    @property
    def reference(self) -> Line:
        """The row that the others are compared with."""
        return next(line for line in self.lines if line.row.name == self.layout.reference)

    def blocks(self) -> list[tuple[str, list[list[Cell]]]]:
        """Sections with their rows of cells: consecutive rows of one section together, reported figures at its end."""
        blocks: list[tuple[str, list[list[Cell]]]] = []
        for line in self.lines:
            if not blocks or blocks[-1][0] != line.row.section:
                blocks.append((line.row.section, []))
            blocks[-1][1].append(self.cells(line))
        for figures in self.layout.reported:
            rows = next((rows for section, rows in reversed(blocks) if section == figures.section), None)
            if rows is None:
                rows = []
                blocks.append((figures.section, rows))
            rows.append(self.reported_cells(figures))
        return blocks

    @property
    def sheet(self) -> Sheet:
        """Its cells under their columns, which Markdown, LaTeX and the terminal print."""
        sections = tuple((section, tuple(map(tuple, rows))) for section, rows in self.blocks())
        return Sheet(tuple(self.columns), sections)

    @property
    def details(self) -> list[Table]:
        """Of a table that is split, one of each tested metric alone; else none."""
        places = [place for place, shown in enumerate(self.layout.metrics) if shown.tested]
        return [self._of_metric(place) for place in places] if self.layout.is_split else []

    def _of_metric(self, place: int) -> Table:
        rows = tuple(replace(row, marks=()) for row in self.layout.rows)
        layout = replace(self.layout, rows=rows, marks=(), metrics=(self.layout.metrics[place],), reported=(), question="",
                         title=f"{self.layout.title}: {self.layout.metrics[place].label}")  # fmt: skip
        lines = [Line(row, (line.comparisons[place],)) for row, line in zip(rows, self.lines, strict=True)]
        return replace(self, layout=layout, lines=tuple(lines), notes=())

    def to_markdown(self) -> str:
        """A page of Markdown: title, question, table, notes; then the tables of single metrics, if it is split."""
        from analysis.render.markdown import markdown

        return markdown(self)

    def to_latex(self) -> str:
        """A `table` environment, or several where it is split; the document needs booktabs alone (`Sheet.latex`)."""
        from analysis.render.latex import latex

        return latex(self)

    def to_html(self, figures: Sequence[str] = ()) -> str:
        """A page that needs nothing but the files beside it; `figures`: names of PNG files among them."""
        from analysis.render.html import table_page

        return table_page(self, figures)

    def to_csv(self) -> str:
        """One line per row and metric, in full precision; `unit` says whether values are percentage points."""
        from analysis.render.separated import numbers_csv

        return numbers_csv(self)

    def to_runs_csv(self) -> str:
        """The arms behind the cells: one line per row and seed, metric values as logged."""
        from analysis.render.separated import runs_csv

        return runs_csv(self)

    def to_rich(self) -> rich.console.Group:
        """For a terminal: `rich.console.Console().print(table.to_rich())`."""
        from analysis.render.terminal import rich_tables

        return rich_tables(self)

    def to_text(self, width: int = 160) -> str:
        """The terminal's table as plain text without colours, wrapped at `width`."""
        from analysis.render.terminal import plain_text

        return plain_text(self, width)


def build_table(frame: pd.DataFrame, layout: Layout, *, allow_mixed_code: bool = False) -> Table:
    """Compute the table of an arms frame (`analysis.load`).

    Rows of the frame that the layout does not name are passed over; rows of the layout without a finished arm are shown
    empty.
    UserError: nothing finished yet, an unknown metric, or arms of several code versions without `allow_mixed_code`.
    """
    names = [row.name for row in layout.rows]
    part = frame[frame["row"].isin(names)]
    if layout.seeds:
        part = part[part["seed"].isin(layout.seeds)]
    seeds = tuple(sorted(set(layout.seeds) or {int(seed) for seed in part["seed"]}))
    compared = [
        statistics.compare(
            part,
            shown.name,
            reference=layout.reference,
            rows=names,
            seeds=seeds,
            higher_is_better=shown.higher_is_better,
        )
        for shown in layout.metrics
    ]
    lines = tuple(Line(row, tuple(results[row.name] for results in compared)) for row in layout.rows)
    results = [(line.row, line.comparisons) for line in lines]
    notes = table_notes(layout, results, seeds, part, allow_mixed_code=allow_mixed_code)
    finished = part[part["status"] == "FINISHED"]
    run_columns = (*COLUMNS, *(shown.name for shown in layout.metrics))
    order = {name: index for index, name in enumerate(names)}
    records = sorted(
        zip(*(part[column] for column in run_columns), strict=True), key=lambda record: (order[record[0]], record[1])
    )
    # As logged, to the last digit; a value that is not a number stays visible where the run has finished.
    runs = tuple(
        (
            *record[: len(COLUMNS)],
            *(_logged(float(value), record[-1 - len(layout.metrics)]) for value in record[len(COLUMNS) :]),
        )
        for record in records
    )
    versions = tuple(sorted({str(version) for version in finished["version"]}))
    return Table(layout, lines, notes, run_columns, runs, versions)


def mean_text(result: Comparison, shown: Metric) -> str:
    if not result.n:
        return NONE
    text = fixed(result.mean * shown.scale, shown.digits)
    return text if math.isnan(result.sd) else f"{text} ± {fixed(result.sd * shown.scale, shown.digits)}"


def _delta(result: Comparison, shown: Metric) -> str:
    if math.isnan(result.delta) or result.verdict == statistics.SAME_RUNS:
        return NONE
    delta, low, high = (
        fixed(value * shown.scale, shown.digits, sign=True) for value in (result.delta, result.low, result.high)
    )
    return delta if math.isnan(result.low) else f"{delta} [{low}, {high}]"


def _ratio(result: Comparison, reference: Comparison) -> str:
    """The mean over the reference's, where both are of the same seeds."""
    if not result.n or result.seeds != reference.seeds or reference.mean == 0:
        return NONE
    return f"{result.mean / reference.mean:.2f}"


def n_text(results: Sequence[Comparison]) -> str:
    """Seeds in the mean (of how many, if some lack) and pairs where they are fewer; once if all metrics agree."""
    texts = []
    for result in results:
        planned = result.n + len(result.missing) + len(result.nonfinite)
        text = f"{result.n}/{planned}" if planned > result.n else f"{result.n}"
        texts.append(
            f"{text}, {result.pairs} paired"
            if result.verdict != statistics.REFERENCE and result.pairs < result.n
            else text
        )
    return texts[0] if len(set(texts)) == 1 else "; ".join(texts)


def _logged(value: float, status: object) -> str:
    return "" if math.isnan(value) and status != "FINISHED" else repr(value)
