"""The `basd` command: words and options, errors as sentences. What a command does is in `basd.commands`, imported when it is called."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from basd.errors import UserError

BENCHMARKS = ("taps", "step", "cohort", "data", "analysis")
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
    report.add_argument("--all", action="store_true", help="every table and sweep that has a plan here")
    report.add_argument(
        "--figures",
        choices=("table", "training", "models"),
        help="of the table alone; also of training (the default); also of the trained models (the default of --all)",
    )
    grid.set_defaults(figures="table")
    grid.add_argument(
        "--retrain-stale", action="store_true", help="train again, once, what other code than the installed one trained"
    )
    for one in (grid, report):
        one.add_argument(
            "--allow-mixed-code", action="store_true", help="print a table whose arms are of several code versions"
        )
        one.add_argument(
            "--delta",
            type=_difference,
            metavar="D",
            help="also say how many seeds show a difference of D, in the unit of the table's first metric",
        )
    for one in (train, plan, grid, sweep, worker, status, audit, sync, report, teacher, export, bench, doctor):
        one.add_argument("overrides", nargs="*", help=OVERRIDES_HELP)
    return root


def _difference(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be a number above 0, such as 0.5")
    return value


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


def command_of(name: str) -> Callable[[argparse.Namespace, list[str]], int]:
    """The function behind a command."""
    found: Callable[[argparse.Namespace, list[str]], int] = getattr(
        importlib.import_module(f"basd.commands.{COMMANDS[name]}"), name
    )
    return found


def _run(given: argparse.Namespace, extra: list[str]) -> int:
    try:
        return command_of(given.command)(given, extra)
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


# What torchrun may start in several processes.
TOGETHER = ("train", "grid", "worker")
# command → the module of basd.commands that holds it
COMMANDS = {
    "train": "arms",
    "plan": "tables",
    "grid": "tables",
    "sweep": "sweeps",
    "worker": "tables",
    "status": "tables",
    "audit": "tables",
    "sync": "tables",
    "report": "tables",
    "teacher": "arms",
    "export": "arms",
    "bench": "machine",
    "doctor": "machine",
}
