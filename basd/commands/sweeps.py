"""sweep, and what the commands on tables do for sweeps."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from basd.commands.common import console, say_written, teacher_progress
from basd.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from analysis.sweeps import SweepResult
    from basd.grid.display import TeacherProgress
    from basd.grid.options import GridOptions
    from basd.grid.plan import Plan
    from basd.grid.search import Search


def sweep(given: argparse.Namespace, overrides: list[str]) -> int:
    import time
    from contextlib import nullcontext

    from basd.grid.display import duration

    screen = console(given.quiet)
    began = time.monotonic()
    screen.print(f"Planning {given.name}.", markup=False)
    # below the line above: these imports take seconds
    from basd.grid.leases import leased
    from basd.grid.options import GridOptions
    from basd.grid.plan import Preparer
    from basd.grid.sweep import run_sweep
    from basd.grid.sweeps import load_sweep

    wanted = load_sweep(given.name, overrides)
    options = GridOptions.from_config(wanted.config)
    progress = teacher_progress(screen, given.quiet)
    here = given.command == "worker"
    try:
        with leased(options, partial(screen.print, markup=False)) if here else nullcontext():
            outcome = run_sweep(wanted, options, Preparer(progress), console=screen, quiet=given.quiet, here=here)
    finally:
        progress.close()
    for number, reason in outcome.failures.items():
        screen.print(f"Trial {number} failed: {reason}", markup=False)
    if outcome.interrupted:
        screen.print(f"Run `basd sweep {given.name}` again to go on.", markup=False)
        return 130
    if not outcome.mirrored:
        screen.print(f"Not everything is in MLflow yet: {outcome.mirror_problem}", markup=False)
    if outcome.plan is not None:
        result, files = sweep_report(outcome.plan, options, screen, Path(wanted.config.runtime.reports))
        if outcome.mirrored:
            publish_sweep_run(outcome.plan, options, screen, result, files)
    left = f" and left {outcome.pruned} on their way" if outcome.pruned else ""
    trained = f"Trained {outcome.trained} arms{left}"
    if not outcome.trained and not outcome.pruned:
        trained = "Nothing to train: every trial had ended"
    screen.print(f"{trained}; {duration(time.monotonic() - began)} in all.", markup=False)
    if outcome.stuck:
        screen.print(f"{outcome.stuck}; run `basd sweep {given.name}` again to go on.", markup=False)
    return 0 if outcome.mirrored and not outcome.stuck and not outcome.states["FAIL"] else 1


def plan_sweep(given: argparse.Namespace, overrides: list[str], screen: Console) -> int:
    screen.print(f"Planning {given.name}.", markup=False)
    from basd.grid.sweep import print_sweep

    progress = teacher_progress(screen, given.quiet)
    try:
        print_sweep(screen, _search(given, overrides, progress), probing=not given.no_probe)
    finally:
        progress.close()
    return 0


def swept_plan(given: argparse.Namespace, overrides: list[str], screen: Console) -> tuple[Plan, GridOptions]:
    """The plan of a sweep's trials so far, with the options it runs under."""
    search = _search(given, overrides)
    if not search.trials():
        raise UserError(
            f"the sweep {given.name} has no trial yet under this setting; run basd sweep {given.name} first."
        )
    return search.plan(), search.options


def _search(given: argparse.Namespace, overrides: list[str], progress: TeacherProgress | None = None) -> Search:
    from basd.grid.options import GridOptions
    from basd.grid.plan import Preparer
    from basd.grid.search import Search
    from basd.grid.sweeps import load_sweep

    wanted = load_sweep(given.name, overrides)
    return Search(wanted, GridOptions.from_config(wanted.config), Preparer(progress))


def sweep_report(made: Plan, options: GridOptions, screen: Console, reports: Path) -> tuple[SweepResult, list[Path]]:
    """Write and print the report of a sweep; returns what it tells, and the files."""
    from analysis import write_index
    from analysis.sweeps import command, load_sweep, notes, to_rich, write_sweep_report

    assert made.sweep is not None
    result = load_sweep(options.ledger_url, made.sweep["study"])
    paths = write_sweep_report(result, reports / made.setting)
    screen.print(to_rich(result))
    for trial in result.best[:3]:
        screen.print(f"Best (trial {trial.number}): {command(result, trial)}", markup=False)
    for note in notes(result):
        screen.print(note, markup=False)
    say_written(screen, made.name, [*paths, *write_index(reports)])
    return result, paths


def publish_sweep_run(
    made: Plan, options: GridOptions, screen: Console, result: SweepResult | None, files: list[Path]
) -> None:
    """The sweep's own run in MLflow; a failure is told and mended by the next call. `result`: None reads the study."""
    from analysis.sweeps import load_sweep, tracked
    from basd.grid.finished import first_line
    from basd.tracking.sweep_run import publish_sweep

    assert made.sweep is not None
    result = result or load_sweep(options.ledger_url, made.sweep["study"])
    keys = {row.configuration_key for row in made.rows}
    lock = options.setting_directory(made.setting) / "mirror.lock"
    try:
        publish_sweep(
            options.tracking_uri,
            made.setting,
            lock,
            name=made.name,
            configurations=keys,
            # a page and the index's entry belong to the folder that their links lead into
            files=[path for path in files if path.suffix not in (".html", ".json")],
            **tracked(result),
        )
    except Exception as error:
        screen.print(
            f"The run of the sweep is not in MLflow yet ({first_line(error)}); `basd sync {made.name}`.", markup=False
        )
