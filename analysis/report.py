"""Write a table to its files and tell the index of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.entries import table_entry
from analysis.files import figures_of, write_texts
from analysis.tables import Layout, Table, build_table

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Report:
    """The table, the files written, and what the user should be told (from the loading of the runs)."""

    table: Table
    paths: tuple[Path, ...]
    warnings: tuple[str, ...] = ()


def write_report(frame: pd.DataFrame, layout: Layout, directory: Path, *, allow_mixed_code: bool = False) -> Report:
    """Compute the table and write <name>.md, .tex, .csv, .runs.csv, .html and .json into `directory` (made if missing).

    The page shows the figures <name>.WHAT.png that lie there by then; .json is what `analysis.index` knows of the table.
    The same runs give the same bytes. UserError: see `build_table`, or a directory that cannot be written.
    """
    table = build_table(frame, layout, allow_mixed_code=allow_mixed_code)
    directory = Path(directory)
    figures = figures_of(layout.name, directory)
    texts = {
        ".md": table.to_markdown(),
        ".tex": table.to_latex(),
        ".csv": table.to_csv(),
        ".runs.csv": table.to_runs_csv(),
        ".html": table.to_html(figures),
        ".json": table_entry(table, figures).to_json(),
    }
    paths = write_texts(directory, {f"{layout.name}{ending}": text for ending, text in texts.items()})
    return Report(table, tuple(paths), tuple(frame.attrs.get("warnings", ())))
