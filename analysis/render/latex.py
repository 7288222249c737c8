"""A table as a LaTeX float with the rules of booktabs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.escape import one_line

if TYPE_CHECKING:
    from analysis.tables import Table


def latex(table: Table) -> str:
    """A `table` environment, captioned with title and question."""
    layout = table.layout
    sentences = [one_line(text) for text in (layout.title, layout.question) if text]
    caption = " ".join(text if text[-1:] in ".?!" else f"{text}." for text in sentences)
    return table.sheet.latex(caption, layout.name, table.notes)
