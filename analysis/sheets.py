"""A table of texts as Markdown, LaTeX (booktabs) and for the terminal, and the texts of its numbers."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from analysis.escape import escape_latex, escape_markdown

if TYPE_CHECKING:
    import rich.table

NONE = "–"  # nothing can be said here

Alignment = Literal["left", "center", "right"]
_RULES: dict[Alignment, str] = {"left": ":--", "center": ":-:", "right": "--:"}
_LETTERS: dict[Alignment, str] = {"left": "l", "center": "c", "right": "r"}
_MANY_COLUMNS = 10  # more are wider than a page's line
_CHECK_MARK = r"\providecommand{\checkmark}{\ensuremath{\surd}}"


@dataclass(frozen=True)
class Column:
    """Title and alignment of a column: words left, marks in the middle, numbers right."""

    title: str
    align: Alignment = "right"


@dataclass(frozen=True)
class Cell:
    """One printed cell, in plain Unicode. Italic: not measured here."""

    text: str
    bold: bool = False
    italic: bool = False


@dataclass(frozen=True)
class Sheet:
    """Cells under columns. `sections`: titles ("" for none), each with its lines."""

    columns: tuple[Column, ...]
    sections: tuple[tuple[str, tuple[tuple[Cell, ...], ...]], ...]

    def markdown(self) -> list[str]:
        """The lines of the table alone."""
        lines = [_pipes([escape_markdown(column.title) for column in self.columns])]
        lines.append(_pipes([_RULES[column.align] for column in self.columns]))
        for title, rows in self.sections:
            if title:
                lines.append(_pipes([f"*{escape_markdown(title)}*", *[""] * (len(self.columns) - 1)]))
            lines += [_pipes([_in_markdown(cell) for cell in row]) for row in rows]
        return lines

    def latex(self, caption: str, label: str, notes: Iterable[str] = ()) -> str:
        """A `table` environment with the notes under it; the document needs booktabs alone (with amssymb, check marks are that
        package's), and graphicx where there are many columns: those are made as small as the line asks for."""
        wide = len(self.columns) > _MANY_COLUMNS
        body: list[str] = []
        for title, rows in self.sections:
            body.append(r"    \midrule")
            if title:
                body.append(rf"    \multicolumn{{{len(self.columns)}}}{{l}}{{\textit{{{escape_latex(title)}}}}} \\")
            body += ["    " + _ampersands(_in_latex(cell) for cell in row) for row in rows]
        text = "\n".join(
            [
                r"\begin{table}",
                r"  \centering\footnotesize\setlength{\tabcolsep}{3pt}",
                rf"  \caption{{{escape_latex(caption)}}}",
                rf"  \label{{tab:{label}}}",
                *([r"  \resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"] if wide else []),
                rf"  \begin{{tabular}}{{{''.join(_LETTERS[column.align] for column in self.columns)}}}",
                r"    \toprule",
                "    " + _ampersands(escape_latex(column.title) for column in self.columns),
                *body,
                r"    \bottomrule",
                r"  \end{tabular}}" if wide else r"  \end{tabular}",
                r"  \par\smallskip",
                r"  \begin{minipage}{\linewidth}\footnotesize\raggedright",
                *(f"    {escape_latex(note)}\\par" for note in notes),
                r"  \end{minipage}",
                r"\end{table}",
                "",
            ]
        )
        definitions = [_CHECK_MARK] if r"\checkmark" in text else []
        needs = r"% Needs \usepackage{booktabs,graphicx}." if wide else r"% Needs \usepackage{booktabs}."
        return "\n".join([needs, *definitions, text])

    def rich(self, title: str, caption: str = "") -> rich.table.Table:
        """For a terminal: `rich.console.Console().print(sheet.rich("…"))`."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=Text(title),
            caption=Text(caption),
            box=box.SIMPLE_HEAD,
            title_justify="left",
            caption_justify="left",
        )
        for column in self.columns:
            table.add_column(Text(column.title), justify=column.align)
        for section, rows in self.sections:
            if section:
                table.add_section()
                table.add_row(Text(section, style="italic"), *[""] * (len(self.columns) - 1))
            for row in rows:
                table.add_row(*[Text(cell.text, style=_style(cell)) for cell in row])
        return table


def columns(titles: Sequence[str], left: int = 1) -> tuple[Column, ...]:
    """Columns of which the first `left` hold words and the others numbers."""
    return tuple(Column(title, "left" if place < left else "right") for place, title in enumerate(titles))


def fixed(value: float, digits: int, sign: bool = False) -> str:
    """Fixed digits with a true minus; what rounds to zero has no sign."""
    if math.isnan(value):
        return NONE
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def p_text(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def number(value: float) -> str:
    """Shortest text of 12 significant digits for a CSV; empty for what is not there."""
    return "" if math.isnan(value) else f"{value:.12g}"


def csv_text(lines: Iterable[Sequence[object]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(lines)
    return stream.getvalue()


def _in_markdown(cell: Cell) -> str:
    text = escape_markdown(cell.text)
    if not text:
        return ""
    return f"**{text}**" if cell.bold else f"*{text}*" if cell.italic else text


def _in_latex(cell: Cell) -> str:
    text = escape_latex(cell.text)
    if not text:
        return ""
    return rf"\textbf{{{text}}}" if cell.bold else rf"\textit{{{text}}}" if cell.italic else text


def _style(cell: Cell) -> str:
    return "bold" if cell.bold else "italic dim" if cell.italic else ""


def _pipes(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ampersands(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"
