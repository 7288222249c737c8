"""A table of texts as Markdown, LaTeX (booktabs) and for the terminal, and the texts of its numbers."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.escape import escape_latex, escape_markdown

if TYPE_CHECKING:
    import rich.table

NONE = "–"  # nothing can be said here


@dataclass(frozen=True)
class Cell:
    """One printed cell, in plain Unicode."""

    text: str
    bold: bool = False


@dataclass(frozen=True)
class Sheet:
    """Cells under column titles. `left`: how many of the columns, from the first, hold words; numbers stand flush right.

    `sections`: titles ("" for none), each with its lines.
    """

    header: tuple[str, ...]
    sections: tuple[tuple[str, tuple[tuple[Cell, ...], ...]], ...]
    left: int = 1

    def markdown(self) -> list[str]:
        """The lines of the table alone."""
        width = len(self.header)
        lines = [pipes([escape_markdown(title) for title in self.header])]
        lines.append(pipes([":--"] * self.left + ["--:"] * (width - self.left)))
        for title, rows in self.sections:
            if title:
                lines.append(pipes([f"*{escape_markdown(title)}*", *[""] * (width - 1)]))
            for row in rows:
                texts = [(escape_markdown(cell.text), cell.bold) for cell in row]
                lines.append(pipes([f"**{text}**" if bold else text for text, bold in texts]))
        return lines

    def latex(self, caption: str, label: str, notes: Iterable[str] = ()) -> str:
        """A `table` environment with the notes under it; the document needs the package booktabs and nothing else."""
        width = len(self.header)
        lines = [
            r"% Needs \usepackage{booktabs}.",
            r"\begin{table}",
            r"  \centering\footnotesize\setlength{\tabcolsep}{3pt}",
            rf"  \caption{{{escape_latex(caption)}}}",
            rf"  \label{{tab:{label}}}",
            rf"  \begin{{tabular}}{{{'l' * self.left + 'r' * (width - self.left)}}}",
            r"    \toprule",
            "    " + ampersands(escape_latex(title) for title in self.header),
        ]
        for title, rows in self.sections:
            lines.append(r"    \midrule")
            if title:
                lines.append(rf"    \multicolumn{{{width}}}{{l}}{{\textit{{{escape_latex(title)}}}}} \\")
            for row in rows:
                texts = [(escape_latex(cell.text), cell.bold) for cell in row]
                lines.append("    " + ampersands(rf"\textbf{{{text}}}" if bold else text for text, bold in texts))
        lines += [
            r"    \bottomrule",
            r"  \end{tabular}",
            r"  \par\smallskip",
            r"  \begin{minipage}{\linewidth}\footnotesize\raggedright",
            *(f"    {escape_latex(note)}\\par" for note in notes),
            r"  \end{minipage}",
            r"\end{table}",
        ]
        return "\n".join([*lines, ""])

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
        for place, name in enumerate(self.header):
            table.add_column(Text(name), justify="left" if place < self.left else "right")
        for section, rows in self.sections:
            if section:
                table.add_section()
                table.add_row(Text(section, style="italic"), *[""] * (len(self.header) - 1))
            for row in rows:
                table.add_row(*[Text(cell.text, style="bold" if cell.bold else "") for cell in row])
        return table


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


def pipes(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def ampersands(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"
