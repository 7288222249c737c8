"""Write a table, the effects of its factors and the figures to files, and tell the index of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis import table_figures
from analysis.entries import table_entry
from analysis.factorial_report import FactorialReport, build_factorial
from analysis.files import figures_of, same_text, write_texts
from analysis.gallery import remove_figures
from analysis.precision import precision_block
from analysis.tables import Layout, Table, build_table

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


def write_report(
    frame: pd.DataFrame,
    layout: Layout,
    directory: Path,
    *,
    allow_mixed_code: bool = False,
    draw: Callable[[pd.DataFrame, Layout, Path], list[Path]] | None = None,
) -> Report:
    """Compute the table and write <name>.md, .tex, .csv, .runs.csv, .html and .json into `directory` (made if missing).

    Of a factorial table also <name>.factorial.md, .tex and .csv; and as PDF and PNG the figures that the numbers allow:
    <name>.forest, <name>.shapley, <name>.interactions. `draw` adds figures of the runs (`Gallery.draw`), once the table is one.
    The page shows every figure <name>.WHAT.png that lies there by then: those of an earlier report are kept where they are of
    the same runs. .json is what `analysis.index` knows of the table. The same runs give the same bytes. UserError: see `build_table`, or a
    directory that cannot be written.
    """
    table = build_table(frame, layout, allow_mixed_code=allow_mixed_code)
    factorial = build_factorial(frame, layout)
    directory = Path(directory)
    # before the page, which shows them
    drawn = table_figures.draw(table, factorial, directory)
    if draw is not None:
        drawn += draw(frame, layout, directory)
    if not same_text(directory / f"{layout.name}.runs.csv", table.to_runs_csv()):
        remove_figures(layout.name, directory, drawn)
    figures = figures_of(layout.name, directory)
    own = {what: f"{layout.name}.{what}.png" for what in table_figures.drawable(table, factorial)}
    texts = {
        ".md": _page(table, own),
        ".tex": table.to_latex(),
        ".csv": table.to_csv(),
        ".runs.csv": table.to_runs_csv(),
        ".html": table.to_html(figures),
        ".json": table_entry(table, figures).to_json(),
    }
    texts = {f"{layout.name}{ending}": text for ending, text in texts.items()}
    if factorial is not None:
        pictures = [picture for what, picture in own.items() if what != "forest"]
        texts[f"{layout.name}.factorial.md"] = factorial.to_markdown(pictures)
        texts[f"{layout.name}.factorial.tex"] = factorial.to_latex()
        texts[f"{layout.name}.factorial.csv"] = factorial.to_csv()
    paths = (*write_texts(directory, texts), *drawn)
    warnings = (*frame.attrs.get("warnings", ()), *(factorial.warnings if factorial is not None else ()))
    return Report(table, paths, warnings, factorial)


def _page(table: Table, figures: Mapping[str, str]) -> str:
    """The table's Markdown with the block on precision and power and the forest plot under it."""
    parts = [table.to_markdown(), "\n".join(precision_block(table))]
    if "forest" in figures:
        parts.append(f"![{figures['forest']}]({figures['forest']})\n")
    return "\n".join(part for part in parts if part).rstrip() + "\n"
