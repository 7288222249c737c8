"""A table for the terminal."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from analysis.escape import one_line

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from analysis.tables import Table


def rich_table(table: Table) -> RichTable:
    """Title and question above, notes below."""
    title = "\n".join(one_line(text) for text in (table.layout.title, table.layout.question) if text)
    return table.sheet.rich(title, "\n".join(table.notes))


def plain_text(table: Table, width: int) -> str:
    """The same without colours, wrapped at `width`."""
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(rich_table(table))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"
