"""A table for the terminal."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from analysis.escape import one_line

if TYPE_CHECKING:
    from rich.console import Group

    from analysis.tables import Table


def rich_tables(table: Table) -> Group:
    """Title and question above, notes below; of a table that is split, each metric's own between them."""
    from rich.console import Group

    title = "\n".join(one_line(text) for text in (table.layout.title, table.layout.question) if text)
    sheets = [(title, table.sheet), *((one_line(one.layout.title), one.sheet) for one in table.details)]
    notes = ["" for _ in sheets[1:]] + ["\n".join(table.notes)]
    return Group(*(sheet.rich(title, below) for (title, sheet), below in zip(sheets, notes, strict=True)))


def plain_text(table: Table, width: int) -> str:
    """The same without colours, wrapped at `width`."""
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(rich_tables(table))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"
