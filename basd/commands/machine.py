"""doctor and bench: what this machine is and does."""

from __future__ import annotations

import argparse

from basd.commands.common import console
from basd.errors import UserError


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

    # of basd only the command line knows the analysis, so it is handed to the benchmark
    handed = {}
    if given.what == "analysis":
        import analysis

        handed["load"] = analysis.load
    found = importlib.import_module(f"basd.benchmarks.{given.what}").run(overrides, repeats, **handed)
    if given.json != "-":
        print_report(screen, found)
    if given.json:
        write_json(found, given.json)
    return 0
