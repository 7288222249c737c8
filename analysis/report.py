"""Write a table, the effects of its factors and their figures to files, each by a temporary file and a rename, so that a
reader never sees half of one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis import table_figures
from analysis.factorial_report import FactorialReport, build_factorial
from analysis.precision import precision_block
from analysis.tables import Layout, Table, build_table
from basd.errors import UserError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Report:
    """The table, the files written, and what the user should be told (of the loading of the runs, of the factors).

    `factorial`: the effects of the factors, where the table's rows have some.
    """

    table: Table
    paths: tuple[Path, ...]
    warnings: tuple[str, ...] = ()
    factorial: FactorialReport | None = None


def write_report(frame: pd.DataFrame, layout: Layout, directory: Path, *, allow_mixed_code: bool = False) -> Report:
    """Compute the table and write <name>.md, .tex, .csv and .runs.csv into `directory` (made if missing).

    Of a factorial table also <name>.factorial.md, .tex and .csv; and as PDF and PNG the figures that the numbers allow:
    <name>.forest, <name>.shapley, <name>.interactions.
    The same runs give the same bytes. UserError: see `build_table`, or a directory that cannot be written.
    """
    table = build_table(frame, layout, allow_mixed_code=allow_mixed_code)
    factorial = build_factorial(frame, layout)
    figures = {what: f"{layout.name}.{what}.png" for what in table_figures.drawable(table, factorial)}
    texts = {
        ".md": _page(table, figures),
        ".tex": table.to_latex(),
        ".csv": table.to_csv(),
        ".runs.csv": table.to_runs_csv(),
    }
    if factorial is not None:
        pictures = [picture for what, picture in figures.items() if what != "forest"]
        texts[".factorial.md"] = factorial.to_markdown(pictures)
        texts[".factorial.tex"] = factorial.to_latex()
        texts[".factorial.csv"] = factorial.to_csv()
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
    drawn = table_figures.draw(table, factorial, directory)
    paths = (*(target for _, target in temporary), *drawn)
    warnings = (*frame.attrs.get("warnings", ()), *(factorial.warnings if factorial is not None else ()))
    return Report(table, paths, warnings, factorial)


def _page(table: Table, figures: Mapping[str, str]) -> str:
    """The table's Markdown with the block on precision and power and the forest plot under it."""
    parts = [table.to_markdown(), "\n".join(precision_block(table))]
    if "forest" in figures:
        parts.append(f"![{figures['forest']}]({figures['forest']})\n")
    return "\n".join(part for part in parts if part).rstrip() + "\n"
