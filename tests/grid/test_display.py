"""Where commands print: a terminal's width, COLUMNS, or room for a wide table in a file."""

from __future__ import annotations

import contextlib
import io

import pytest
from rich.table import Table

from basd.grid.display import make_console


@pytest.mark.parametrize(("columns", "widest"), [(None, 150), ("60", 60)])
def test_a_wide_table_is_whole_in_a_file_unless_columns_says_otherwise(
    columns: str | None, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    said = io.StringIO()
    table = Table(*(f"column {place} of a table" for place in range(7)))
    table.add_row(*("x" * 18 for _ in range(7)))
    with contextlib.redirect_stdout(said):
        make_console().print(table)
    longest = max(map(len, said.getvalue().splitlines()))
    assert longest == widest if columns else longest >= widest
    assert said.getvalue().count("x" * 18) == (0 if columns else 7)
