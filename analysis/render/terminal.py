"""A table for the terminal."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from analysis.escape import one_line

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from analysis.tables import Cell, Table


def rich_table(table: Table) -> RichTable:
    """Title and question above, notes below."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    title = "\n".join(one_line(text) for text in (table.layout.title, table.layout.question) if text)
    shown = RichTable(
        title=Text(title),
        caption=Text("\n".join(table.notes)),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    for column in table.columns:
        shown.add_column(Text(column.title), justify=column.align)
    for section, rows in table.blocks():
        if section:
            shown.add_section()
            shown.add_row(Text(section, style="italic"), *[""] * (len(table.columns) - 1))
        for row in rows:
            shown.add_row(*[Text(cell.text, style=_style(cell)) for cell in row])
    return shown


def _style(cell: Cell) -> str:
    return "bold" if cell.bold else "italic dim" if cell.italic else ""


def plain_text(table: Table, width: int) -> str:
    """The same without colours, wrapped at `width`."""
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(rich_table(table))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"
