"""The `basd` command. The only place that knows both basd and analysis; everything heavy is imported when a command needs it."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basd.errors import UserError, without_passwords

if TYPE_CHECKING:
    from rich.console import Console

    from basd.grid.display import TeacherProgress
    from basd.grid.options import GridOptions
    from basd.grid.plan import Plan

BENCHMARKS = ("taps", "step", "cohort", "data")
OVERRIDES_HELP = "settings as KEY=VALUE, such as method=ce selector=uniform losses.rsd.kappa=0.02 seed=1"


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        prog="basd",
        description="Ablations of vision-transformer distillation: plan, train once, report with statistics.",
    )
    root.add_argument("--version", action="store_true", help="print the code version and leave")
    commands = root.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=text)
        one.add_argument("--quiet", action="store_true", help="log lines instead of a progress bar")
        return one

    train = command("train", "train one arm")
    train.add_argument("--again", action="store_true", help="repeat a finished arm under a new run, outside the ledger")
    train.add_argument("-m", "--multirun", action="store_true", help="Hydra's multirun: KEY=A,B runs every combination")
    plan = command("plan", "the arms of a table, what differs in each, what is done, how long the rest takes")
    plan.add_argument("--no-probe", action="store_true", help="do not measure a few steps to predict the time")
    grid = command("grid", "train what a table lacks and print it; run it again after any interruption")
    sweep = command(
        "sweep", "search over configurations: an Optuna study, trained in cohorts; run it again after any interruption"
    )
    worker = command("worker", "one more worker on a table's ledger")
    worker.add_argument(
        "-m", "--multirun", action="store_true", help="have Hydra's launcher start one for each value of worker=0,1,2"
    )
    status = command("status", "how far the tables are, and the time left")
    audit = command("audit", "whether ledger, journals and MLflow agree on every arm, and which code trained it")
    sync = command("sync", "send MLflow what it does not have yet")
    report = command("report", "write a table again from the runs")
    teacher = command("teacher", "fit or check the teacher")
    export = command("export", "write a trained student as a timm checkpoint")
    export.add_argument(
        "run", metavar="RUN", help="an arm key or its beginning, an arm's directory, or an MLflow run id"
    )
    export.add_argument("--onnx", action="store_true", help="also write ONNX, checked against the student")
    export.add_argument("--register", action="store_true", help="also make it a version in MLflow's model registry")
    export.add_argument("--output", metavar="DIR", help="where to write; exports/ARM_KEY without it")
    export.add_argument("--force", action="store_true", help="replace an earlier export")
    bench = command("bench", "what parts cost on this machine, as ratios measured in one run")
    bench.add_argument("what", choices=BENCHMARKS, help="what to measure")
    bench.add_argument(
        "--repeats", type=int, metavar="N", help="measured repeats (data: steps an epoch); 10 without it"
    )
    bench.add_argument(
        "--json", metavar="FILE", help="also write the report as JSON; - prints it in place of the table"
    )
    doctor = command("doctor", "versions, devices, data, teacher, tracking and ledger")
    grid.add_argument("name", help="an ablation: a file of experiments/ without .yaml")
    sweep.add_argument("name", help="a sweep: a file of sweeps/ without .yaml")
    for one in (plan, worker, audit, sync):
        one.add_argument("name", help="an ablation or a sweep")
    status.add_argument("name", nargs="?", help="an ablation or a sweep; all of them without it")
    report.add_argument("name", nargs="?", help="an ablation or a sweep")
    report.add_argument("--all", action="store_true", help="every table that has a plan here")
    grid.add_argument(
        "--retrain-stale", action="store_true", help="train again, once, what other code than the installed one trained"
    )
    for one in (grid, report):
        one.add_argument(
            "--allow-mixed-code", action="store_true", help="print a table whose arms are of several code versions"
        )
    for one in (train, plan, grid, sweep, worker, status, audit, sync, report, teacher, export, bench, doctor):
        one.add_argument("overrides", nargs="*", help=OVERRIDES_HELP)
    return root


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status: 0 done, 1 arms failed or are missing, 2 bad input, 130 interrupted."""
    root = parser()
    given, extra = _parse(root, arguments)
    if given.version:
        from basd.version import code_version

        print(code_version())
        return 0
    if given.command is None:
        root.print_help()
        return 0
    # without an import of torch, which takes seconds
    if int(os.environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in os.environ:
        return _with_others(given, extra)
    return _run(given, extra)


def _with_others(given: argparse.Namespace, extra: list[str]) -> int:
    """One of several processes that torchrun started: the first runs the command, the others train along."""
    from basd.training.team import together

    if given.command not in TOGETHER or getattr(given, "multirun", False):
        if os.environ["RANK"] == "0":
            what = "multirun" if getattr(given, "multirun", False) else given.command
            print(f"basd: {what} runs in one process; start it without torchrun.", file=sys.stderr)
        return 2
    try:
        return together(lambda: _run(given, extra))
    except UserError as error:
        print(f"basd: {error}", file=sys.stderr)
        return 2


def _run(given: argparse.Namespace, extra: list[str]) -> int:
    try:
        return COMMANDS[given.command](given, extra)
    except UserError as error:
        print(f"basd: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("basd: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of a pipe has left; nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"basd: {_os_sentence(error)}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        # torch is not imported for the sake of a name
        if type(error).__name__ != "PeerLostError":
            raise
        print(f"basd: {error}", file=sys.stderr)
        return 1


def _parse(root: argparse.ArgumentParser, arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Overrides may stand before, between and after the options."""
    given, unknown = root.parse_known_args(arguments)
    bad = [word for word in unknown if word.startswith("-")]
    if bad:
        root.error(f"unrecognized arguments: {' '.join(bad)}")
    overrides = [*(getattr(given, "overrides", None) or []), *unknown]
    name = getattr(given, "name", None)
    if name is not None and "=" in name:
        if given.command in ("status", "report"):
            given.name, overrides = None, [name, *overrides]
        else:
            what = "a sweep" if given.command == "sweep" else "an ablation"
            root.error(f"{given.command} needs the name of {what} before {name}")
    return given, overrides


def _os_sentence(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}; check the path, its permissions and the free space."


def console(quiet: bool = False) -> Console:
    from basd.grid.display import make_console

    return make_console(quiet)


# -- preparing ---------------------------------------------------------------------------------------------------------


def teacher_progress(screen: Console, quiet: bool) -> TeacherProgress:
    from basd.grid.display import TeacherProgress

    return TeacherProgress(screen, quiet)


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


# -- commands ----------------------------------------------------------------------------------------------------------


def train(given: argparse.Namespace, overrides: list[str]) -> int:
    if given.multirun:
        from basd.multirun import multirun

        return multirun(overrides, again=given.again)
    from basd.grid.single import train_one

    screen = console(given.quiet)
    progress = teacher_progress(screen, given.quiet)
    try:
        status, _ = train_one(overrides, screen=screen, again=given.again, quiet=given.quiet, teacher_progress=progress)
        return status
    finally:
        progress.close()


def plan(given: argparse.Namespace, overrides: list[str]) -> int:
    from basd.grid.display import plan_summary, print_plan, print_prediction, steps_left
    from basd.grid.ledger import Ledger

    screen = console(given.quiet)
    if _is_sweep(given.name):
        return _plan_sweep(given, overrides, screen)
    made, options = planned(given, overrides, screen)
    ledger = Ledger(options.ledger_url, made.setting, retries=options.retries, grace=options.grace)
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
    screen.print(f"{plan_summary(made, states, left)} Teacher: {_teacher_note(made)}.", markup=False)
    if probe is not None:
        print_prediction(screen, made, left, probe, options)
    return 0


def _plan_sweep(given: argparse.Namespace, overrides: list[str], screen: Console) -> int:
    screen.print(f"Planning {given.name}.", markup=False)
    from basd.grid.options import GridOptions
    from basd.grid.plan import Preparer
    from basd.grid.search import Search
    from basd.grid.sweep import print_sweep
    from basd.grid.sweeps import load_sweep

    wanted = load_sweep(given.name, overrides)
    progress = teacher_progress(screen, given.quiet)
    try:
        search = Search(wanted, GridOptions.from_config(wanted.config), Preparer(progress))
        print_sweep(screen, search, probing=not given.no_probe)
    finally:
        progress.close()
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
        _report(made, options, screen, given.allow_mixed_code, Path(made.runtime["reports"]))
    parts = {"setting up and teacher": prepared, **outcome.seconds}
    spent = ", ".join(f"{name} {duration(value)}" for name, value in parts.items() if value >= 0.5)
    trained = f"Trained {outcome.trained} arms" if outcome.trained else "Nothing to train: every arm was complete"
    screen.print(f"{trained}; {duration(prepared + outcome.wall_seconds)} in all ({spent}).", markup=False)
    if outcome.missing:
        screen.print(
            f"{len(outcome.missing)} arms are missing; run `basd grid {made.name}` again to go on.", markup=False
        )
    return 0 if outcome.ok and outcome.mirrored else 1


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
        files = _sweep_report(outcome.plan, options, screen, Path(wanted.config.runtime.reports))
        if outcome.mirrored:
            _publish_sweep(outcome.plan, options, screen, files)
    left = f" and left {outcome.pruned} on their way" if outcome.pruned else ""
    trained = f"Trained {outcome.trained} arms{left}"
    if not outcome.trained and not outcome.pruned:
        trained = "Nothing to train: every trial had ended"
    screen.print(f"{trained}; {duration(time.monotonic() - began)} in all.", markup=False)
    if outcome.stuck:
        screen.print(f"{outcome.stuck}; run `basd sweep {given.name}` again to go on.", markup=False)
    return 0 if outcome.mirrored and not outcome.stuck and not outcome.states["FAIL"] else 1


def _is_sweep(name: str) -> bool:
    from basd.grid.ablations import ablation_files
    from basd.grid.sweeps import sweep_files

    return name in sweep_files() and name not in ablation_files()


def _swept(given: argparse.Namespace, overrides: list[str], screen: Console) -> tuple[Plan, GridOptions]:
    """The plan of a sweep's trials so far, with the options it runs under."""
    from basd.grid.options import GridOptions
    from basd.grid.plan import Preparer
    from basd.grid.search import Search
    from basd.grid.sweeps import load_sweep

    wanted = load_sweep(given.name, overrides)
    options = GridOptions.from_config(wanted.config)
    search = Search(wanted, options, Preparer())
    if not search.trials():
        raise UserError(
            f"the sweep {given.name} has no trial yet under this setting; run basd sweep {given.name} first."
        )
    return search.plan(), options


def _known(name: str) -> str:
    """The command that starts a table or a sweep of that name; `UserError` where there is neither."""
    from basd.grid.ablations import load_ablation

    if _is_sweep(name):
        return f"basd sweep {name}"
    load_ablation(name)
    return f"basd grid {name}"


def _sweep_report(made: Plan, options: GridOptions, screen: Console, reports: Path) -> list[Path]:
    """Write and print the report of a sweep; returns the files."""
    from analysis.sweeps import command, load_sweep, notes, to_rich, write_sweep_report

    assert made.sweep is not None
    result = load_sweep(options.ledger_url, made.sweep["study"])
    paths = write_sweep_report(result, reports / made.setting)
    screen.print(to_rich(result))
    for trial in result.best[:3]:
        screen.print(f"Best (trial {trial.number}): {command(result, trial)}", markup=False)
    for note in notes(result):
        screen.print(note, markup=False)
    figures = sorted({path.stem.removeprefix(f"{made.name}.") for path in paths if path.suffix == ".pdf"})
    written = [str(path) for path in paths if path.suffix not in (".pdf", ".png")]
    screen.print(f"Written: {', '.join(written)}; figures {', '.join(figures)} beside them (PDF, PNG)", markup=False)
    return paths


def _publish_sweep(made: Plan, options: GridOptions, screen: Console, files: list[Path]) -> None:
    """The sweep's own run in MLflow; a failure is told and mended by the next call."""
    from analysis.sweeps import load_sweep, tracked
    from basd.grid.finished import first_line
    from basd.tracking.sweep_run import publish_sweep

    assert made.sweep is not None
    result = load_sweep(options.ledger_url, made.sweep["study"])
    keys = {row.configuration_key for row in made.rows}
    lock = options.setting_directory(made.setting) / "mirror.lock"
    try:
        publish_sweep(
            options.tracking_uri,
            made.setting,
            lock,
            name=made.name,
            configurations=keys,
            files=files,
            **tracked(result),
        )
    except Exception as error:
        screen.print(
            f"The run of the sweep is not in MLflow yet ({first_line(error)}); `basd sync {made.name}`.", markup=False
        )


def _report(made: Plan, options: GridOptions, screen: Console, allow_mixed_code: bool, reports: Path) -> None:
    import analysis

    uri = options.tracking_uri
    frame = analysis.load(made.name, tracking_uri=uri, setting=made.setting, rows=made.cells)
    layout = analysis.Layout(
        name=made.name,
        title=made.name,
        rows=tuple(analysis.LayoutRow(row.name, row.label, row.section) for row in made.rows),
        reference=made.reference,
        metrics=tuple(analysis.metric(name) for name in made.metrics),
        question=made.question,
        seeds=made.seeds,
        notes=(f"Setting: {made.setting}; teacher {_teacher_note(made)}.", f"Plan {made.hash}."),
    )
    report = analysis.write_report(frame, layout, reports / made.setting, allow_mixed_code=allow_mixed_code)
    for warning in report.warnings:
        screen.print(f"Note: {warning}", markup=False)
    screen.print(report.table.to_rich())
    where = f"mlflow ui --backend-store-uri {without_passwords(uri)}" if uri != "sqlite:///mlflow.db" else "mlflow ui"
    where = without_passwords(uri) if uri.startswith(("http:", "https:")) else where
    screen.print(f"Runs: {where} (experiment {made.setting})", markup=False)
    screen.print(f"Written: {', '.join(str(path) for path in report.paths)}", markup=False)


def _teacher_note(made: Plan) -> str:
    from basd.models.teacher import teacher_title

    name = teacher_title(made.config["teacher"])
    return f"{name}, {100 * made.teacher_top1:.1f} % test top-1" if made.teacher_top1 is not None else name


def report(given: argparse.Namespace, overrides: list[str]) -> int:
    from basd.grid.options import GridOptions
    from basd.grid.plan import Plan
    from basd.grid.status import newest_plans

    if (given.name is None) == (not given.all):
        raise UserError("name one table, or write --all for every table that has a plan here.")
    setting, config = _run_sections(overrides)
    screen = console(given.quiet)
    paths = newest_plans(Path(config.runtime.directory), given.name, setting)
    if not paths:
        raise UserError(
            f"nothing was planned here{f' for {given.name}' if given.name else ''}; run basd grid NAME first."
        )
    if given.name is not None and len(paths) > 1:
        choices = ", ".join(path.parent.parent.name for path in paths)
        raise UserError(f"several settings hold {given.name}; choose one with setting=… ({choices}).")
    said = {text.partition("=")[0] for text in overrides}
    failed = 0
    for path in paths:
        made = Plan.load(path)
        # the plan knows where its runs are; the command line may say otherwise
        options = GridOptions.from_config(config if "tracking.uri" in said else made.config)
        reports = Path(config.runtime.reports if "runtime.reports" in said else made.runtime["reports"])
        try:
            if made.sweep is not None:
                _sweep_report(made, options, screen, reports)
            else:
                _report(made, options, screen, given.allow_mixed_code, reports)
        except UserError as error:
            if given.name is not None:
                raise
            failed += 1
            print(f"basd: {made.name} in {made.setting}: {error}", file=sys.stderr)
    return 1 if failed else 0


def _run_sections(overrides: list[str]) -> tuple[str | None, Any]:
    """`setting=` and the runtime, tracking and ledger sections of a command line that names no configuration."""
    from basd.compose import compose

    setting = next((text.partition("=")[2] for text in overrides if text.startswith("setting=")), None)
    if setting is not None and not re.fullmatch(r"[\w.-]*\w", setting):
        raise UserError(f"setting={setting} is not the name of a setting; they are the folders of runs/.")
    return setting, compose([text for text in overrides if not text.startswith("setting=")]).config


def status(given: argparse.Namespace, overrides: list[str]) -> int:
    from basd.grid.options import GridOptions
    from basd.grid.status import print_status
    from basd.grid.status import status as read_status

    setting, config = _run_sections(overrides)
    tables = read_status(GridOptions.from_config(config), given.name, setting)
    if given.name is not None and not tables:
        _known(given.name)
    print_status(tables, console(given.quiet))
    return 0


def audit(given: argparse.Namespace, overrides: list[str]) -> int:
    from basd.grid.audit import audit_plan, options_of, print_audit
    from basd.grid.plan import Plan
    from basd.grid.status import newest_plans

    setting, config = _run_sections(overrides)
    screen = console(given.quiet)
    directory = Path(config.runtime.directory)
    paths = newest_plans(directory, given.name, setting)
    if not paths:
        held = ", ".join(path.parent.parent.name for path in newest_plans(directory, given.name, None))
        if held:
            raise UserError(f"{setting} holds no plan of {given.name}; choose another with setting=… ({held}).")
        raise UserError(f"nothing was planned here for {given.name}; run {_known(given.name)} first.")
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
    if _is_sweep(given.name):
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
    swept = _is_sweep(given.name)
    made, options = (_swept if swept else planned)(given, overrides, screen)
    outcome = run_sync(made, options)
    if swept and outcome.mirrored:
        reports = Path(made.runtime["reports"]) / made.setting
        _publish_sweep(made, options, screen, sorted(reports.glob(f"{made.name}.*")))
    screen.print(
        "MLflow has everything." if outcome.mirrored else f"MLflow still lacks something: {outcome.mirror_problem}",
        markup=False,
    )
    return 0 if outcome.mirrored else 1


def teacher(given: argparse.Namespace, overrides: list[str]) -> int:
    from basd.compose import compose
    from basd.grid.plan import prepare
    from basd.models.teacher import teacher_title

    screen = console(given.quiet)
    config = compose(overrides).config
    progress = teacher_progress(screen, given.quiet)
    try:
        prepared = prepare(config, progress).teacher
    finally:
        progress.close()
    shape = f"{len(prepared.model.blocks)} blocks, width {prepared.model.embed_dim}"
    screen.print(
        f"{teacher_title(config.teacher)}: {shape}, {prepared.accuracy}, weights {prepared.fingerprint}", markup=False
    )
    if config.teacher.weights_file is not None:
        from basd.models.checkpoints import read_checkpoint

        file = read_checkpoint(config.teacher.weights_file).file
        screen.print(f"From {file.path}: {file.description}", markup=False)
    elif prepared.path is not None:
        screen.print(f"{'Fitted and cached' if prepared.fitted_now else 'Cached'}: {prepared.path}", markup=False)
    if config.demands.logits and config.teacher.name != "digits_vit":
        from basd.data import load
        from basd.training.teachers import head_facts

        facts = head_facts(prepared, config.teacher, config.data, load(config.data))
        screen.print(f"Logits: {facts.description}" + (f", {facts.path}" if facts.path else ""), markup=False)
    return 0


def export(given: argparse.Namespace, overrides: list[str]) -> int:
    import tempfile

    words = [given.run, *overrides]
    named = [word for word in words if "=" not in word or (Path(word) / "arm.json").is_file()]
    if not named:
        raise UserError("export needs a RUN beside the settings: an arm key, an arm's directory or an MLflow run id.")
    if len(named) > 1:
        raise UserError(f"export writes one run at a time, not {' and '.join(named)}; call it once for each.")
    overrides = [word for word in words if word not in named]
    setting, config = _run_sections(overrides)
    uri, screen = config.tracking.uri, console(given.quiet)
    with tempfile.TemporaryDirectory() as scratch:
        from basd.grid.finished import asked, find_finished, tracked_run
        from basd.tracking.mlflow_store import shown as hidden

        arm = find_finished(named[0], Path(config.runtime.directory), uri, setting, Path(scratch))
        screen.print(f"{arm.name} seed={arm.seed} of {arm.setting} (arm {arm.label}), from {arm.place}", markup=False)
        run = tracked_run(arm, uri) if given.register else None
        if given.register and run is None:
            raise UserError(
                f"--register needs the arm's finished run in MLflow ({hidden(uri)}); send it there with basd sync NAME."
            )
        # below what can be refused at once: these imports take seconds
        from basd.export import ONNX_TOLERANCE, export

        target = Path(given.output) if given.output else Path("exports") / arm.label
        made = export(arm, target, onnx=given.onnx, force=given.force)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in arm.metrics.items())
    screen.print(
        f"Written: {made.directory} ({shown}); timm loads it, and its logits are the student's bit for bit.",
        markup=False,
    )
    screen.print(f'Load: timm.create_model("local-dir:{made.directory}", pretrained=True)', markup=False)
    if made.onnx_difference is not None:
        within = f"largest difference {made.onnx_difference:.1e} of the largest logit, allowed {ONNX_TOLERANCE:.0e}"
        screen.print(f"ONNX: opset {made.onnx_opset}, any batch size; {within}.", markup=False)
    if run is not None:
        from basd.tracking.mlflow_store import open_client
        from basd.tracking.registry import register, tags_of

        name, run_id = arm.setting, str(run.info.run_id)
        version, new = asked(
            uri, lambda: register(open_client(uri), name, run_id, made.directory, made.digest, tags_of(run))
        )
        how = "Registered as" if new else "Registered before as"
        screen.print(f"{how} version {version} of {name} in MLflow (models:/{name}/{version}).", markup=False)
    return 0


def doctor(given: argparse.Namespace, overrides: list[str]) -> int:
    from basd.doctor import examine

    return examine(overrides, console(given.quiet))


def bench(given: argparse.Namespace, overrides: list[str]) -> int:
    import importlib

    repeats = 10 if given.repeats is None else given.repeats
    if repeats < 1:
        raise UserError(f"--repeats {repeats} measures nothing; write 1 or more.")
    screen = console(given.quiet)
    if given.json != "-":
        screen.print(f"Measuring {given.what}; nothing else should run meanwhile.", markup=False)
    from basd.benchmarks.display import print_report, write_json

    found = importlib.import_module(f"basd.benchmarks.{given.what}").run(overrides, repeats)
    if given.json != "-":
        print_report(screen, found)
    if given.json:
        write_json(found, given.json)
    return 0


# What torchrun may start in several processes.
TOGETHER = ("train", "grid", "worker")
COMMANDS = {
    "train": train,
    "plan": plan,
    "grid": grid,
    "sweep": sweep,
    "worker": worker,
    "status": status,
    "audit": audit,
    "sync": sync,
    "report": report,
    "teacher": teacher,
    "export": export,
    "bench": bench,
    "doctor": doctor,
}
