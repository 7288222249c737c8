"""A table as a page of Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.escape import escape_markdown

if TYPE_CHECKING:
    from analysis.tables import Table


def markdown(table: Table) -> str:
    """Title, question, table, notes."""
    layout = table.layout
    lines = [f"# {escape_markdown(layout.title)}", ""]
    if layout.question:
        lines += [escape_markdown(layout.question), ""]
    return "\n".join([*lines, *table.sheet.markdown(), "", *[f"- {escape_markdown(note)}" for note in table.notes], ""])
