"""The report of a table as a run in MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from basd.errors import without_passwords

if TYPE_CHECKING:
    from rich.console import Console

    from basd.grid.options import GridOptions
    from basd.grid.plan import Plan

# where the files lie among the run's artifacts
FOLDER = "report"


def publish_table_run(made: Plan, options: GridOptions, screen: Console, folder: Path) -> None:
    """Publish the report of a plan that lies in `folder`, where one does; a failure is told and mended by the next call."""
    from analysis.entries import read_entry
    from basd.grid.finished import first_line
    from basd.tracking.published import publish_table

    entry = read_entry(folder / f"{made.name}.json")
    # a report of another plan is not what the tags would say; writing it again publishes it
    if entry is None or entry.problem or entry.facts.get("plan") != made.hash:
        return
    try:
        publish_table(
            options.tracking_uri,
            made.setting,
            options.setting_directory(made.setting) / "mirror.lock",
            name=made.name,
            description=_description(folder / f"{made.name}.md"),
            tags={
                "basd.plan": made.hash,
                "basd.reference": made.reference,
                "basd.seeds": ", ".join(map(str, made.seeds)),
                "basd.metrics": ", ".join(made.metrics),
            },
            files=_files(made.name, folder),
        )
    except Exception as error:  # whatever the store does, the report is written
        reason = without_passwords(first_line(error)).rstrip(".")
        screen.print(f"The report is not in MLflow yet ({reason}); `basd sync {made.name}` sends it.", markup=False)


def _description(page: Path) -> str:
    """The report's Markdown without its title, which the run's name is, and its pictures, which a description cannot show."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if not line.startswith(("# ", "![")))


def _files(name: str, folder: Path) -> dict[str, bytes]:
    """The report's files by their place among the artifacts; the index's own entry stays out."""
    from analysis.render.html import standalone

    files = {}
    for path in sorted(folder.glob(f"{name}.*")):
        if path.suffix == ".html":
            files[f"{FOLDER}/{path.name}"] = standalone(path.read_text(encoding="utf-8"), folder).encode()
        elif path.suffix != ".json":
            files[f"{FOLDER}/{path.name}"] = path.read_bytes()
    return files
