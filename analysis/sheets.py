"""A table of texts as Markdown, LaTeX (booktabs) and for the terminal, and the texts of its numbers."""

from __future__ import annotations

import csv
import io
import math
import textwrap
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
# Points that a character and the room between columns take in \footnotesize, about, and those of an article's line.
_CHARACTER, _BETWEEN, _LINE = 4.4, 6.0, 345.0
# Characters of a line of a title that is not broken.
_SHORT = 10
# What a document may lack.
_CHECK_MARK = r"\providecommand{\checkmark}{\ensuremath{\surd}}"
_RESIZE = r"\providecommand{\resizebox}[3]{#3}"


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
        """A `table` environment with the notes under it; the document needs booktabs alone. With amssymb, check marks are that
        package's; with graphicx, a table that is wider than the line is made as small as the line asks for."""
        titles = [[column.title] for column in self.columns]
        if self._points(titles) > _LINE:
            titles = [
                _stacked(column.title, widest) for column, widest in zip(self.columns, self._widest(), strict=True)
            ]
        wide = self._points(titles) > _LINE
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
                "    " + _ampersands(_title_in_latex(*one) for one in zip(titles, self.columns, strict=True)),
                *body,
                r"    \bottomrule",
                r"  \end{tabular}}" if wide else r"  \end{tabular}",
                *_minipage(notes),
                r"\end{table}",
                "",
            ]
        )
        definitions = [*[_CHECK_MARK] * (r"\checkmark" in text), *[_RESIZE] * wide]
        needs = r"% Needs \usepackage{booktabs}" + (r"; \usepackage{graphicx} makes it fit the line." if wide else ".")
        return "\n".join([needs, *definitions, text])

    def _widest(self) -> list[int]:
        """Characters of the longest cell of each column."""
        rows = [row for _, rows in self.sections for row in rows]
        return [max((len(row[place].text) for row in rows), default=0) for place in range(len(self.columns))]

    def _points(self, titles: Sequence[Sequence[str]]) -> float:
        """What it takes in LaTeX, about, under titles of these lines."""
        characters = sum(max(cells, *map(len, lines)) for lines, cells in zip(titles, self._widest(), strict=True))
        return _CHARACTER * characters + _BETWEEN * len(self.columns)

    def rich(self, title: str, caption: str = "") -> rich.table.Table:
        """For a terminal: `rich.console.Console().print(sheet.rich("…"))`."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            title=Text(title),
            caption=Text(caption) if caption else None,
            box=box.SIMPLE_HEAD,
            title_justify="left",
            caption_justify="left",
        )
        for column in self.columns:
            table.add_column(Text(column.title), justify=column.align, overflow="fold")
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


def _stacked(title: str, width: int) -> list[str]:
    """The lines of a title over cells of that many characters."""
    return textwrap.wrap(title, max(width, _SHORT), break_long_words=False, break_on_hyphens=False) or [""]


def _title_in_latex(lines: Sequence[str], column: Column) -> str:
    text = r"\\".join(escape_latex(line) for line in lines)
    return text if len(lines) < 2 else rf"\shortstack[{_LETTERS[column.align]}]{{{text}}}"


def _minipage(notes: Iterable[str]) -> list[str]:
    lines = [f"    {escape_latex(note)}\\par" for note in notes]
    start = r"  \begin{minipage}{\linewidth}\footnotesize\raggedright"
    return [r"  \par\smallskip", start, *lines, r"  \end{minipage}"] if lines else []


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
