"""From an arms frame and a layout to a table: Markdown, LaTeX (booktabs), CSV and terminal, all from the same cells.

The same runs always give the same bytes: no dates, rows in the layout's order, seeds and versions sorted.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis import statistics
from analysis.escape import escape_latex, escape_markdown, one_line
from analysis.load import COLUMNS, NAME, count
from analysis.metrics import Metric, metric
from analysis.statistics import Comparison
from basd.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    import rich.table

NONE = "–"  # nothing can be said here
_DIRTY = "-dirty"


@dataclass(frozen=True)
class LayoutRow:
    """A row of the table: its name in the runs, what is printed for it, and the section it stands in ("" for none)."""

    name: str
    label: str
    section: str = ""


@dataclass(frozen=True)
class Layout:
    """What a table shows. `name` is its file name; `notes` are printed below the table as they are."""

    name: str
    title: str
    rows: tuple[LayoutRow, ...]
    reference: str
    metrics: tuple[Metric, ...] = (metric("test/top1"),)
    question: str = ""
    seeds: tuple[int, ...] = ()  # those planned; empty: every seed that the runs have
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        if not NAME.fullmatch(self.name):
            raise UserError(f"A table cannot be named '{self.name}': use letters, digits, '_', '-' and '.'.")
        if len(set(names)) < len(names):
            raise UserError(f"Table '{self.name}' names a row twice: give every row its own name.")
        if self.reference not in names:
            raise UserError(
                f"The reference '{self.reference}' of table '{self.name}' is not one of its rows: {', '.join(names)}."
            )
        if not self.metrics:
            raise UserError(f"Table '{self.name}' has no metric: name at least one, such as test/top1.")


@dataclass(frozen=True)
class Cell:
    """One printed cell, in plain Unicode."""

    text: str
    bold: bool = False


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

    def header(self) -> list[str]:
        """Column titles."""
        cells, several = ["row"], len(self.layout.metrics) > 1
        for shown in self.layout.metrics:
            which = f" {shown.label}" if several else ""
            unit = " (%)" if shown.percent else ""
            cells.append(f"{shown.label}{unit}")
            if shown.tested:
                cells += [f"Δ{which} [95 % interval]", f"p{which} (Holm)", f"verdict{which}"]
            else:
                cells.append("÷ reference")
        return [*cells, "n"]

    def cells(self, line: Line) -> list[Cell]:
        """The cells of one row, in the order of `header`."""
        row = [Cell(one_line(line.row.label))]
        (reference,) = [other.comparisons for other in self.lines if other.row.name == self.layout.reference]
        for shown, result, base in zip(self.layout.metrics, line.comparisons, reference, strict=True):
            row.append(Cell(_mean(result, shown)))
            if not shown.tested:
                row.append(Cell(_ratio(result, base)))
                continue
            row += [
                Cell(_delta(result, shown), bold=result.significant),
                Cell(NONE if math.isnan(result.p_holm) else _p(result.p_holm)),
                Cell(result.verdict if result.n else NONE),
            ]
        return [*row, Cell(_n(line.comparisons))]

    def _sections(self) -> Iterable[tuple[str, list[Line]]]:
        """Consecutive rows of one section together."""
        groups: list[tuple[str, list[Line]]] = []
        for line in self.lines:
            if not groups or groups[-1][0] != line.row.section:
                groups.append((line.row.section, []))
            groups[-1][1].append(line)
        return groups

    def _left(self) -> list[bool]:
        """Which columns hold words and are set flush left."""
        of = [[False, False, False, True] if shown.tested else [False, False] for shown in self.layout.metrics]
        return [True, *itertools.chain.from_iterable(of), False]

    def to_markdown(self) -> str:
        """A page of Markdown: title, question, table, notes."""
        header = self.header()
        lines = [f"# {escape_markdown(self.layout.title)}", ""]
        if self.layout.question:
            lines += [escape_markdown(self.layout.question), ""]
        lines += [_pipes(header), _pipes([":--" if left else "--:" for left in self._left()])]
        for section, rows in self._sections():
            if section:
                lines.append(_pipes([f"*{escape_markdown(section)}*", *[""] * (len(header) - 1)]))
            for line in rows:
                texts = [(escape_markdown(cell.text), cell.bold) for cell in self.cells(line)]
                lines.append(_pipes([f"**{text}**" if bold else text for text, bold in texts]))
        return "\n".join([*lines, "", *[f"- {escape_markdown(note)}" for note in self.notes], ""])

    def to_latex(self) -> str:
        """A `table` environment; the document needs the package booktabs and nothing else."""
        header = self.header()
        sentences = [one_line(text) for text in (self.layout.title, self.layout.question) if text]
        caption = " ".join(escape_latex(text if text[-1:] in ".?!" else f"{text}.") for text in sentences)
        lines = [
            r"% Needs \usepackage{booktabs}.",
            r"\begin{table}",
            r"  \centering\footnotesize\setlength{\tabcolsep}{3pt}",
            rf"  \caption{{{caption}}}",
            rf"  \label{{tab:{self.layout.name}}}",
            rf"  \begin{{tabular}}{{{''.join('l' if left else 'r' for left in self._left())}}}",
            r"    \toprule",
            "    " + _ampersands(escape_latex(title) for title in header),
        ]
        for section, rows in self._sections():
            lines.append(r"    \midrule")
            if section:
                lines.append(rf"    \multicolumn{{{len(header)}}}{{l}}{{\textit{{{escape_latex(section)}}}}} \\")
            for line in rows:
                texts = [(escape_latex(cell.text), cell.bold) for cell in self.cells(line)]
                lines.append("    " + _ampersands(rf"\textbf{{{text}}}" if bold else text for text, bold in texts))
        lines += [
            r"    \bottomrule",
            r"  \end{tabular}",
            r"  \par\smallskip",
            r"  \begin{minipage}{\linewidth}\footnotesize\raggedright",
        ]
        lines += [f"    {escape_latex(note)}\\par" for note in self.notes]
        return "\n".join([*lines, r"  \end{minipage}", r"\end{table}", ""])

    def to_csv(self) -> str:
        """One line per row and metric, in full precision; `unit` says whether values are percentage points."""
        fields = ("mean", "sd", "pairs", "delta", "low", "high", "p", "p_holm", "p_sign_flip", "verdict")
        lines: list[list[object]] = [["row", "label", "section", "reference", "metric", "unit", "n", *fields]]
        for line in self.lines:
            for shown, result in zip(self.layout.metrics, line.comparisons, strict=True):
                scaled = [
                    value * shown.scale for value in (result.mean, result.sd, result.delta, result.low, result.high)
                ]
                middle, sd, delta, low, high = (_number(value) for value in scaled)
                chances = [_number(value) for value in (result.p, result.p_holm, result.p_sign_flip)]
                values = [middle, sd, result.pairs, delta, low, high, *chances, result.verdict if result.n else ""]
                start = [line.row.name, one_line(line.row.label), line.row.section, self.layout.reference]
                lines.append([*start, shown.name, "points" if shown.percent else "", result.n, *values])
        return _csv(lines)

    def to_runs_csv(self) -> str:
        """The arms behind the cells: one line per row and seed, metric values as logged."""
        return _csv([self.run_columns, *self.runs])

    def to_rich(self) -> rich.table.Table:
        """For a terminal: `rich.console.Console().print(table.to_rich())`."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        title = "\n".join(one_line(text) for text in (self.layout.title, self.layout.question) if text)
        table = RichTable(
            title=Text(title),
            caption=Text("\n".join(self.notes)),
            box=box.SIMPLE_HEAD,
            title_justify="left",
            caption_justify="left",
        )
        header = self.header()
        for name, left in zip(header, self._left(), strict=True):
            table.add_column(Text(name), justify="left" if left else "right")
        for section, rows in self._sections():
            if section:
                table.add_section()
                table.add_row(Text(section, style="italic"), *[""] * (len(header) - 1))
            for line in rows:
                table.add_row(*[Text(cell.text, style="bold" if cell.bold else "") for cell in self.cells(line)])
        return table

    def to_text(self, width: int = 160) -> str:
        """The terminal's table as plain text without colours, wrapped at `width`."""
        from rich.console import Console

        stream = io.StringIO()
        console = Console(file=stream, width=width, color_system=None, force_terminal=False, legacy_windows=False)
        console.print(self.to_rich())
        return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


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
    notes = (
        *_test_notes(layout, lines, seeds),
        *_gap_notes(layout, lines, part),
        _version_note(layout, part, allow_mixed_code),
        *(one_line(note) for note in layout.notes),
        f"Run ids of every cell: {layout.name}.runs.csv.",
    )
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
    return Table(layout, lines, tuple(note for note in notes if note), run_columns, runs)


def _test_notes(layout: Layout, lines: Sequence[Line], seeds: Sequence[int]) -> list[str]:
    reference = next(one_line(row.label) for row in layout.rows if row.name == layout.reference)
    results = [
        result for line in lines for shown, result in zip(layout.metrics, line.comparisons, strict=True) if shown.tested
    ]
    tested = max(sum(not math.isnan(line.comparisons[i].p) for line in lines) for i in range(len(layout.metrics)))
    most = max((result.pairs for result in results), default=0)
    notes = [f"Mean ± standard deviation over n seeds; seeds {', '.join(map(str, seeds))}."]
    if len(results) < len(lines) * len(layout.metrics):
        notes.append(f"÷ reference: the mean over that of {reference}.")
    if not results:
        pass
    elif not any(line.comparisons[0].n for line in lines if line.row.name == layout.reference):
        notes.append(f"The reference, {reference}, has no finished run yet, so there are no differences.")
    elif most >= statistics.INTERVAL_FROM:
        notes.append(
            f"Δ: mean difference to {reference}, paired by seed, with a paired-t 95 % interval, not adjusted for the "
            f"number of rows; p: two-sided paired t test, Holm-adjusted over the {tested} compared rows of a metric."
        )
    else:
        notes.append(
            f"Δ: mean difference to {reference}, paired by seed; "
            f"under {statistics.INTERVAL_FROM} pairs no interval and no p."
        )
    if any(result.verdict == statistics.TOO_SMALL for result in results):
        notes.append(f"n too small: no verdict under {statistics.VERDICT_FROM} pairs.")
    if any(result.significant for result in results):
        notes.append(f"Bold: adjusted p below {statistics.ALPHA:g}.")
    if any(result.verdict == statistics.SAME_RUNS for result in results):
        notes.append(
            "Same runs: the row is the reference's own configuration and shares its runs; nothing is compared."
        )
    if any(result.low == result.high for result in results):
        notes.append("Interval of zero width: all differences are equal; p is then the exact sign-flip p.")
    if any(not math.isnan(result.p_sign_flip) for result in results):
        notes.append(f"Exact sign-flip p (unadjusted): {layout.name}.csv.")
    if any(result.verdict == statistics.DIFFERS for result in results):
        notes.append("Differs: significant, in a metric of which neither direction is better.")
    lower = [shown.label for shown in layout.metrics if shown.higher_is_better is False]
    return [*notes, f"Lower is better: {', '.join(lower)}."] if lower else notes


def _gap_notes(layout: Layout, lines: Sequence[Line], part: pd.DataFrame) -> list[str]:
    """Seeds that are not in a row's mean, and why."""
    status = {
        (row, int(seed)): str(state) for row, seed, state in zip(part["row"], part["seed"], part["status"], strict=True)
    }
    missing, nonfinite = [], []
    for line in lines:
        name, label = line.row.name, one_line(line.row.label)
        gone = [f"{seed} ({status.get((name, seed), 'no run').lower()})" for seed in line.comparisons[0].missing]
        if gone:
            missing.append(f"{label}, seed {', '.join(gone)}")
        for shown, result in zip(layout.metrics, line.comparisons, strict=True):
            if result.nonfinite:
                nonfinite.append(f"{label}, seed {', '.join(map(str, result.nonfinite))} ({shown.label})")
    notes = [f"Not finished, so not in the row's mean: {'; '.join(missing)}."] if missing else []
    return (
        [*notes, f"Without a finite value, so not in the row's mean: {'; '.join(nonfinite)}."] if nonfinite else notes
    )


def _version_note(layout: Layout, part: pd.DataFrame, allow_mixed_code: bool) -> str:
    finished = part[part["status"] == "FINISHED"]
    arms: dict[str, set[str]] = {}
    for version, run in zip(finished["version"], finished["run_id"], strict=True):
        arms.setdefault(str(version), set()).add(str(run))
    listed = ", ".join(f"{version} ({count(len(arms[version]), 'arm')})" for version in sorted(arms))
    if len(arms) > 1 and not allow_mixed_code:
        raise UserError(
            f"The arms of table '{layout.name}' were trained by {len(arms)} versions of the code: {listed}; print "
            f"the table with --allow-mixed-code, or train it with one version by `basd grid {layout.name} --retrain-stale`."
        )
    dirty = (
        " The commit does not pin down code that is -dirty."
        if any(version.endswith(_DIRTY) for version in arms)
        else ""
    )
    return f"{'Arms of several code versions' if len(arms) > 1 else 'Code version'}: {listed}.{dirty}"


def _mean(result: Comparison, shown: Metric) -> str:
    if not result.n:
        return NONE
    text = _fixed(result.mean * shown.scale, shown.digits)
    return text if math.isnan(result.sd) else f"{text} ± {_fixed(result.sd * shown.scale, shown.digits)}"


def _delta(result: Comparison, shown: Metric) -> str:
    if math.isnan(result.delta) or result.verdict == statistics.SAME_RUNS:
        return NONE
    delta, low, high = (
        _fixed(value * shown.scale, shown.digits, sign=True) for value in (result.delta, result.low, result.high)
    )
    return delta if math.isnan(result.low) else f"{delta} [{low}, {high}]"


def _ratio(result: Comparison, reference: Comparison) -> str:
    """The mean over the reference's, where both are of the same seeds."""
    if not result.n or result.seeds != reference.seeds or reference.mean == 0:
        return NONE
    return f"{result.mean / reference.mean:.2f}"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _n(results: Sequence[Comparison]) -> str:
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


def _fixed(value: float, digits: int, sign: bool = False) -> str:
    """Fixed digits with a true minus; what rounds to zero has no sign."""
    if math.isnan(value):
        return NONE
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def _number(value: float) -> str:
    """Shortest text of 12 significant digits for a CSV; empty for what is not there."""
    return "" if math.isnan(value) else f"{value:.12g}"


def _logged(value: float, status: object) -> str:
    return "" if math.isnan(value) and status != "FINISHED" else repr(value)


def _csv(lines: Iterable[Sequence[object]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(lines)
    return stream.getvalue()


def _pipes(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ampersands(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"
