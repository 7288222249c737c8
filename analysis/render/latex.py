"""A table as a LaTeX float with the rules of booktabs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.escape import one_line

if TYPE_CHECKING:
    from analysis.tables import Table


def latex(table: Table) -> str:
    """A `table` environment, captioned with title and question; of a table that is split, one more for each metric."""
    tables = []
    for place, one in enumerate([table, *table.details]):
        layout = one.layout
        sentences = [one_line(text) for text in (layout.title, layout.question) if text]
        caption = " ".join(text if text[-1:] in ".?!" else f"{text}." for text in sentences)
        tables.append(one.sheet.latex(caption, f"{layout.name}-{place}" if place else layout.name, one.notes))
    return "\n".join(tables)
