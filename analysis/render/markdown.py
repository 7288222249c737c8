"""A table as a page of Markdown."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.escape import escape_markdown

if TYPE_CHECKING:
    from analysis.tables import Table


def markdown(table: Table) -> str:
    """Title, question, table, notes; of a table that is split, each metric with its differences under a heading."""
    layout = table.layout
    lines = [f"# {escape_markdown(layout.title)}", ""]
    if layout.question:
        lines += [escape_markdown(layout.question), ""]
    lines += [*table.sheet.markdown(), "", *[f"- {escape_markdown(note)}" for note in table.notes], ""]
    for detail in table.details:
        (shown,) = detail.layout.metrics
        lines += [f"## {escape_markdown(shown.label)}", "", *detail.sheet.markdown(), ""]
    return "\n".join(lines)
