"""A benchmark's report for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from basd.benchmarks.timing import Report


def print_report(screen: Console, report: Report) -> None:
    """Times, then ratios with what they should reach."""
    settings = ", ".join(f"{name} {value}" for name, value in report.settings.items() if name != "overrides")
    screen.print(f"{report.what} on {report.device}: {settings}", markup=False)
    if report.measures:
        times = Table("what", "milliseconds", "least – most")
        for measure in report.measures:
            spread = f"{1e3 * measure.least:.1f} – {1e3 * measure.most:.1f}"
            times.add_row(measure.name, f"{1e3 * measure.seconds:.1f}", spread)
        screen.print(times)
    ratios = Table("ratio", "measured", "reach")
    for ratio in report.ratios:
        ratios.add_row(ratio.name, f"{ratio.value:.3f}", ratio.reach)
    screen.print(ratios)
    if report.figures:
        screen.print(
            ", ".join(f"{name} {value:.4g} {unit}" for name, (value, unit) in report.figures.items()), markup=False
        )


def write_json(report: Report, where: str) -> None:
    """To a file, or to the standard output where it is called `-`."""
    text = json.dumps(report.to_dict(), indent=1)
    if where == "-":
        print(text)
    else:
        Path(where).write_text(text + "\n")
