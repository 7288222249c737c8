"""What several commands need: the screen, sections of a command line, names of tables and sweeps."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from basd.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from basd.grid.display import TeacherProgress
    from basd.grid.plan import Plan


def console(quiet: bool = False) -> Console:
    from basd.grid.display import make_console

    return make_console(quiet)


def teacher_progress(screen: Console, quiet: bool) -> TeacherProgress:
    from basd.grid.display import TeacherProgress

    return TeacherProgress(screen, quiet)


def teacher_note(made: Plan) -> str:
    from basd.models.teacher import teacher_title

    name = teacher_title(made.config["teacher"])
    return f"{name}, {100 * made.teacher_top1:.1f} % test top-1" if made.teacher_top1 is not None else name


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
