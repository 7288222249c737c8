"""plan, grid, worker, report, status, audit, sync: tables, and what sweeps share with them."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basd.commands.common import (
    console,
    is_sweep,
    run_sections,
    say_written,
    starting_command,
    teacher_progress,
)
from basd.commands.published import publish_table_run
from basd.commands.sweeps import plan_sweep, publish_sweep_run, sweep, sweep_report, swept_plan
from basd.errors import UserError, without_passwords

if TYPE_CHECKING:
    from rich.console import Console

    from basd.grid.options import GridOptions
    from basd.grid.plan import Plan


def planned(given: argparse.Namespace, overrides: list[str], screen: Console, **hooks: Any) -> tuple[Plan, GridOptions]:
    """The plan of the named table under these overrides, with the options it runs under; `hooks` as of `make_plan`."""
    screen.print(f"Planning {given.name}.", markup=False)
    # below the line above: these imports take seconds
    from basd.grid.options import GridOptions
    from basd.grid.plan import make_plan

    progress = teacher_progress(screen, given.quiet)
    try:
        plan = make_plan(given.name, overrides, progress, **hooks)
    finally:
        progress.close()
    for notice in plan.notices:
        screen.print(f"Note: {notice}.", markup=False)
    return plan, GridOptions.from_config(plan.config)


def plan(given: argparse.Namespace, overrides: list[str]) -> int:
    from basd.grid.display import plan_summary, print_plan, print_prediction, steps_left
    from basd.grid.ledger import Ledger

    screen = console(given.quiet)
    if is_sweep(given.name):
        return plan_sweep(given, overrides, screen)
    made, options = planned(given, overrides, screen)
    ledger = Ledger.of(options, made.setting)
    states = ledger.arms(list(made.arms)) if ledger.exists else {}
    left = steps_left(made, states, options)
    probe = None
    waiting = [arm for key, arm in made.arms.items() if left[key]]
    if waiting and not given.no_probe:
        from basd.grid.probe import measure

        count = len({arm.configuration_key for arm in waiting})
        screen.print(f"Measuring a few steps of {count} configurations (--no-probe leaves this out).", markup=False)
        probe = measure(waiting)
    print_plan(screen, made, states, probe)
    screen.print(f"{plan_summary(made, states, left)} Teacher: {made.teacher}.", markup=False)
    if probe is not None:
        print_prediction(screen, made, left, probe, options)
    return 0


def grid(given: argparse.Namespace, overrides: list[str]) -> int:
    import time

    from basd.grid.display import duration
    from basd.grid.run import run_grid
    from basd.grid.versions import said_of_stale

    screen = console(given.quiet)
    began = time.monotonic()
    made, options = planned(given, overrides, screen)
    prepared = time.monotonic() - began
    outcome = run_grid(made, options, console=screen, quiet=given.quiet, retrain_stale=given.retrain_stale)
    for key, failure in outcome.failed.items():
        arm = made.arms[key]
        screen.print(f"Failed: {arm.name} seed={arm.seed}: {failure.reason} (log: {failure.log})", markup=False)
    if outcome.stale:
        screen.print(f"Note: {said_of_stale(made, outcome.stale, len(outcome.complete))}", markup=False)
    if outcome.interrupted:
        return 130
    if not outcome.mirrored:
        screen.print(f"Not everything is in MLflow yet: {outcome.mirror_problem}", markup=False)
    if outcome.complete and outcome.mirrored:
        table_report(made, options, screen, given, Path(made.runtime["reports"]))
    parts = {"setting up and teacher": prepared, **outcome.seconds}
    spent = ", ".join(f"{name} {duration(value)}" for name, value in parts.items() if value >= 0.5)
    trained = f"Trained {outcome.trained} arms" if outcome.trained else "Nothing to train: every arm was complete"
    screen.print(f"{trained}; {duration(prepared + outcome.wall_seconds)} in all ({spent}).", markup=False)
    if outcome.missing:
        screen.print(
            f"{len(outcome.missing)} arms are missing; run `basd grid {made.name}` again to go on.", markup=False
        )
    return 0 if outcome.ok and outcome.mirrored else 1


def table_report(made: Plan, options: GridOptions, screen: Console, given: argparse.Namespace, reports: Path) -> None:
    import analysis

    uri = options.tracking_uri
    frame = analysis.load(made.name, tracking_uri=uri, setting=made.setting, rows=made.cells)
    layout = analysis.layout_of(made, given.delta)
    gallery = analysis.Gallery(
        given.figures, made.figures, made.cells, uri, made.setting, Path(made.runtime["directory"])
    )
    if given.figures != "table":
        screen.print(f"Drawing {made.name}.", markup=False)
    report = analysis.write_report(
        frame, layout, reports / made.setting, allow_mixed_code=given.allow_mixed_code, draw=gallery.draw
    )
    for warning in (*report.warnings, *gallery.problems):
        screen.print(f"Note: {warning}", markup=False)
    screen.print(report.table.to_rich())
    for effects in report.factorial.to_rich() if report.factorial is not None else ():
        screen.print(effects)
    where = f"mlflow ui --backend-store-uri {without_passwords(uri)}" if uri != "sqlite:///mlflow.db" else "mlflow ui"
    where = without_passwords(uri) if uri.startswith(("http:", "https:")) else where
    screen.print(f"Runs: {where} (experiment {made.setting})", markup=False)
    say_written(screen, made.name, [*report.paths, *analysis.write_index(reports)])
    publish_table_run(made, options, screen, reports / made.setting)


def report(given: argparse.Namespace, overrides: list[str]) -> int:
    from analysis.planned import plan_path
    from basd.grid.options import GridOptions
    from basd.grid.plan import Plan
    from basd.grid.status import newest_plans

    if (given.name is None) == (not given.all):
        raise UserError("name one table, or write --all for every table that has a plan here.")
    setting, config = run_sections(overrides)
    screen = console(given.quiet)
    directory = Path(config.runtime.directory)
    if given.name is not None:
        if not newest_plans(directory, given.name, None):
            raise UserError(f"nothing was planned here for {given.name}; run {starting_command(given.name)} first.")
        paths = [plan_path(given.name, runs=directory, setting=setting)]
    else:
        paths = newest_plans(directory, None, setting)
    if not paths:
        raise UserError("nothing was planned here; run basd grid NAME first.")
    said = {text.partition("=")[0] for text in overrides}
    given.figures = given.figures or ("models" if given.all else "training")
    failed = 0
    for path in paths:
        setting, name = path.parent.parent.name, path.stem.rpartition("-")[0]
        kind, question, reports = "table", "", Path(config.runtime.reports)
        try:
            made = Plan.load(path)
            kind, question = "table" if made.sweep is None else "sweep", made.question
            # the plan knows where its runs are; the command line may say otherwise
            options = GridOptions.from_config(config if "tracking.uri" in said else made.config)
            reports = Path(config.runtime.reports if "runtime.reports" in said else made.runtime["reports"])
            if made.sweep is not None:
                sweep_report(made, options, screen, reports)
            else:
                table_report(made, options, screen, given, reports)
        except UserError as error:
            if given.name is not None:
                raise
            failed += 1
            print(f"basd: {name} in {setting}: {error}", file=sys.stderr)
            report_problem(reports, kind, name, setting, question, str(error))
    return 1 if failed else 0


def report_problem(reports: Path, kind: str, name: str, setting: str, question: str, problem: str) -> None:
    """Tell the index which report could not be written, and why; where it cannot be told, stderr has said it."""
    from contextlib import suppress

    import analysis
    from analysis.entries import record_problem

    with suppress(UserError):
        record_problem(reports, kind, name, setting, question, problem)
        analysis.write_index(reports)


def status(given: argparse.Namespace, overrides: list[str]) -> int:
    from basd.grid.options import GridOptions
    from basd.grid.status import print_status
    from basd.grid.status import status as read_status

    setting, config = run_sections(overrides)
    tables = read_status(GridOptions.from_config(config), given.name, setting)
    if given.name is not None and not tables:
        starting_command(given.name)
    print_status(tables, console(given.quiet))
    return 0


def audit(given: argparse.Namespace, overrides: list[str]) -> int:
    from basd.grid.audit import audit_plan, options_of, print_audit
    from basd.grid.plan import Plan
    from basd.grid.status import newest_plans

    setting, config = run_sections(overrides)
    screen = console(given.quiet)
    directory = Path(config.runtime.directory)
    paths = newest_plans(directory, given.name, setting)
    if not paths:
        held = ", ".join(path.parent.parent.name for path in newest_plans(directory, given.name, None))
        if held:
            raise UserError(f"{setting} holds no plan of {given.name}; choose another with setting=… ({held}).")
        raise UserError(f"nothing was planned here for {given.name}; run {starting_command(given.name)} first.")
    said = {text.partition("=")[0] for text in overrides}
    in_order = True
    for path in paths:
        try:
            made = Plan.load(path)
            found = audit_plan(made, options_of(made, path, config, said))
        except UserError as error:
            if len(paths) == 1:
                raise
            in_order = False
            print(f"basd: {path}: {error}", file=sys.stderr)
            continue
        print_audit(found, screen)
        in_order = in_order and found.in_order
    return 0 if in_order else 1


def worker(given: argparse.Namespace, overrides: list[str]) -> int:
    if given.multirun:
        from basd.multirun import start_workers

        return start_workers(given.name, overrides)
    if is_sweep(given.name):
        return sweep(given, overrides)
    from contextlib import ExitStack

    from basd.grid.leases import leased
    from basd.grid.options import WORKERS, GridOptions
    from basd.grid.worker import log_name, work_on

    screen = console(given.quiet)
    with ExitStack() as stack:

        def lease(config: Any) -> None:
            """Planning may fit a teacher: it has its GPU by then."""
            said = partial(screen.print, markup=False)
            stack.enter_context(leased(GridOptions.from_config(config), said))

        made, options = planned(given, overrides, screen, before_device=lease)
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
        path = made.save()
        log_path = str(options.setting_directory(made.setting) / "logs" / log_name())
        together = int(os.environ.get(WORKERS) or 1)
        trained = work_on(path, options, workers=together, log_path=log_path, mirror=True)
    screen.print(f"This worker trained {trained} arms.", markup=False)
    return 0


def sync(given: argparse.Namespace, overrides: list[str]) -> int:
    from basd.grid.run import sync as run_sync

    screen = console(given.quiet)
    swept = is_sweep(given.name)
    made, options = (swept_plan if swept else planned)(given, overrides, screen)
    outcome = run_sync(made, options)
    reports = Path(made.runtime["reports"]) / made.setting
    if swept and outcome.mirrored:
        publish_sweep_run(made, options, screen, None, sorted(reports.glob(f"{made.name}.*")))
    elif outcome.mirrored:
        publish_table_run(made, options, screen, reports)
    screen.print(
        "MLflow has everything." if outcome.mirrored else f"MLflow still lacks something: {outcome.mirror_problem}",
        markup=False,
    )
    return 0 if outcome.mirrored else 1
