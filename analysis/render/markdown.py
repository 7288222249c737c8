"""A table as a page of Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from analysis.escape import escape_markdown

if TYPE_CHECKING:
    from analysis.tables import Cell, Table

_RULES = {"left": ":--", "center": ":-:", "right": "--:"}


def markdown(table: Table) -> str:
    """Title, question, table, notes."""
    layout = table.layout
    lines = [f"# {escape_markdown(layout.title)}", ""]
    if layout.question:
        lines += [escape_markdown(layout.question), ""]
    lines.append(_pipes([escape_markdown(column.title) for column in table.columns]))
    lines.append(_pipes([_RULES[column.align] for column in table.columns]))
    for section, rows in table.blocks():
        if section:
            lines.append(_pipes([f"*{escape_markdown(section)}*", *[""] * (len(table.columns) - 1)]))
        lines += [_pipes([_marked(cell) for cell in row]) for row in rows]
    return "\n".join([*lines, "", *[f"- {escape_markdown(note)}" for note in table.notes], ""])


def _marked(cell: Cell) -> str:
    text = escape_markdown(cell.text)
    if not text:
        return ""
    return f"**{text}**" if cell.bold else f"*{text}*" if cell.italic else text


def _pipes(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
