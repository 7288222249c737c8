"""A table as a LaTeX float with the rules of booktabs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from analysis.escape import escape_latex, one_line

if TYPE_CHECKING:
    from analysis.tables import Cell, Table

_LETTERS = {"left": "l", "center": "c", "right": "r"}
_DEFINITION = r"\providecommand{\checkmark}{\ensuremath{\surd}}"


def latex(table: Table) -> str:
    """A `table` environment; the document needs booktabs alone (with amssymb, check marks are that package's)."""
    layout = table.layout
    sentences = [one_line(text) for text in (layout.title, layout.question) if text]
    caption = " ".join(escape_latex(text if text[-1:] in ".?!" else f"{text}.") for text in sentences)
    body: list[str] = []
    for section, rows in table.blocks():
        body.append(r"    \midrule")
        if section:
            body.append(rf"    \multicolumn{{{len(table.columns)}}}{{l}}{{\textit{{{escape_latex(section)}}}}} \\")
        body += ["    " + _ampersands(_set(cell) for cell in row) for row in rows]
    text = "\n".join(
        [
            r"\begin{table}",
            r"  \centering\footnotesize\setlength{\tabcolsep}{3pt}",
            rf"  \caption{{{caption}}}",
            rf"  \label{{tab:{layout.name}}}",
            rf"  \begin{{tabular}}{{{''.join(_LETTERS[column.align] for column in table.columns)}}}",
            r"    \toprule",
            "    " + _ampersands(escape_latex(column.title) for column in table.columns),
            *body,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"  \par\smallskip",
            r"  \begin{minipage}{\linewidth}\footnotesize\raggedright",
            *(f"    {escape_latex(note)}\\par" for note in table.notes),
            r"  \end{minipage}",
            r"\end{table}",
            "",
        ]
    )
    definitions = [_DEFINITION] if r"\checkmark" in text else []
    return "\n".join([r"% Needs \usepackage{booktabs}.", *definitions, text])


def _set(cell: Cell) -> str:
    text = escape_latex(cell.text)
    if not text:
        return ""
    return rf"\textbf{{{text}}}" if cell.bold else rf"\textit{{{text}}}" if cell.italic else text


def _ampersands(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"
