"""Write a table to its files, each by a temporary file and a rename, so that a reader never sees half of one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.tables import Layout, Table, build_table
from basd.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Report:
    """The table, the files written, and what the user should be told (from the loading of the runs)."""

    table: Table
    paths: tuple[Path, ...]
    warnings: tuple[str, ...] = ()


def write_report(frame: pd.DataFrame, layout: Layout, directory: Path, *, allow_mixed_code: bool = False) -> Report:
    """Compute the table and write <name>.md, .tex, .csv and .runs.csv into `directory` (made if missing).

    The same runs give the same bytes. UserError: see `build_table`, or a directory that cannot be written.
    """
    table = build_table(frame, layout, allow_mixed_code=allow_mixed_code)
    texts = {
        ".md": table.to_markdown(),
        ".tex": table.to_latex(),
        ".csv": table.to_csv(),
        ".runs.csv": table.to_runs_csv(),
    }
    directory = Path(directory)
    temporary: list[tuple[Path, Path]] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for suffix, text in texts.items():
            temporary.append(
                (directory / f".{layout.name}{suffix}.{os.getpid()}.tmp", directory / f"{layout.name}{suffix}")
            )
            temporary[-1][0].write_text(text, encoding="utf-8", newline="\n")
        for source, target in temporary:
            os.replace(source, target)
    except OSError as error:
        for source, _ in temporary:
            source.unlink(missing_ok=True)
        raise UserError(
            f"The report cannot be written to {directory} ({error.strerror or error}): choose a directory that can."
        ) from error
    return Report(table, tuple(target for _, target in temporary), tuple(frame.attrs.get("warnings", ())))
