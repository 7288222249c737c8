"""What several commands need: the screen, sections of a command line, names of tables and sweeps."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from basd.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from basd.grid.display import TeacherProgress


def console(quiet: bool = False) -> Console:
    from basd.grid.display import make_console

    return make_console(quiet)


def teacher_progress(screen: Console, quiet: bool) -> TeacherProgress:
    from basd.grid.display import TeacherProgress

    return TeacherProgress(screen, quiet)


def run_sections(overrides: list[str]) -> tuple[str | None, Any]:
    """`setting=` and the runtime, tracking and ledger sections of a command line that names no configuration."""
    from basd.compose import compose

    setting = next((text.partition("=")[2] for text in overrides if text.startswith("setting=")), None)
    if setting is not None and not re.fullmatch(r"[\w.-]*\w", setting):
        raise UserError(f"setting={setting} is not the name of a setting; they are the folders of runs/.")
    return setting, compose([text for text in overrides if not text.startswith("setting=")]).config


def is_sweep(name: str) -> bool:
    from basd.grid.ablations import ablation_files
    from basd.grid.sweeps import sweep_files

    return name in sweep_files() and name not in ablation_files()


def starting_command(name: str) -> str:
    """The command that starts a table or a sweep of that name; `UserError` where there is neither."""
    from basd.grid.ablations import load_ablation

    if is_sweep(name):
        return f"basd sweep {name}"
    load_ablation(name)
    return f"basd grid {name}"


def say_written(screen: Console, name: str, paths: Sequence[Path]) -> None:
    """The files of a report, those of one stem together; its figures NAME.WHAT.png by what they show."""
    texts: list[str] = []
    for path in paths:
        if path.suffix in (".pdf", ".png"):
            continue
        stem = str(path.with_name(name))
        if texts and texts[-1].startswith(f"{stem}.") and path.name.startswith(f"{name}."):
            texts[-1] += f" {path.name.removeprefix(name)}"
        else:
            texts.append(str(path))
    figures = sorted({path.stem.removeprefix(f"{name}.") for path in paths if path.suffix == ".pdf"})
    beside = f"; figures {', '.join(figures)} beside them (PDF, PNG)" if figures else ""
    screen.print(f"Written: {', '.join(texts)}{beside}", markup=False)
