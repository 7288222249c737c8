"""Figures of a table: differences to the reference, effects of switches, interactions of factors."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.escape import one_line
from analysis.factorial import INTERACTION, SHAPLEY, Effect, Factorial
from analysis.factorial_report import OF_A_SWITCH, FactorialReport, value_text
from analysis.statistics import ALPHA, NO_DIFFERENCE, SAME_RUNS, TOO_SMALL, Comparison
from analysis.style import COLOURS, COLUMN, GREY, PAGE, save, style
from analysis.tables import Metric, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = ("forest", "shapley", "interactions")
BLUE = COLOURS[0]
LABEL_WIDTH = 27  # characters of a row's label in a line; more would leave a column no room for the intervals
MOST_COLUMNS = 3  # panels beside each other
LINE, GAP = 0.125, 0.055  # inches: a line of a label, and the room between rows


def drawable(table: Table, factorial: FactorialReport | None) -> dict[str, Callable[[], Figure]]:
    """The figures for which there are numbers: what stands in their file names, and the function that draws them."""
    figures: dict[str, Callable[[], Figure]] = {}
    if any(not math.isnan(result.delta) for line in table.lines for result in line.comparisons):
        if any(shown.tested for shown in table.layout.metrics):
            figures["forest"] = lambda: forest(table)
    if factorial is not None:
        if any(not math.isnan(effect.delta) for found in factorial.factorials for effect in found.of(SHAPLEY)):
            figures["shapley"] = lambda: shapley(factorial)
        if any(found.complete_seeds and found.of(INTERACTION) for found in factorial.factorials):
            figures["interactions"] = lambda: interactions(factorial)
    return figures


def draw(table: Table, factorial: FactorialReport | None, directory: Path) -> list[Path]:
    """Write the figures as NAME.WHAT.pdf and .png, remove those that an earlier report had and this one has not.

    Returns the paths. The same numbers give the same bytes.
    """
    figures = drawable(table, factorial)
    written: list[Path] = []
    with style():
        for what, make in figures.items():
            written += save(make(), directory / f"{table.layout.name}.{what}")
    for what in FIGURES:
        if what not in figures:
            for suffix in (".pdf", ".png"):
                (directory / f"{table.layout.name}.{what}{suffix}").unlink(missing_ok=True)
    return written


def forest(table: Table) -> Figure:
    """Δ of every row to the reference with its interval, a panel a tested metric; the verdict fills the marker."""
    places = [place for place, shown in enumerate(table.layout.metrics) if shown.tested]
    rows: list[tuple[str, int | None]] = []
    section = ""
    for index, line in enumerate(table.lines):
        if line.row.name == table.layout.reference:
            continue
        if line.row.section != section:
            section = line.row.section
            rows.append((section, None))
        rows.append((line.row.label, index))
    heights, total = _heights(rows)
    figure, panels = _panels(len(places), total)
    reference = next(one_line(line.row.label) for line in table.lines if line.row.name == table.layout.reference)
    for axis, place in zip(panels, places, strict=True):
        shown = table.layout.metrics[place]
        for (_, at), y in zip(rows, heights, strict=True):
            if at is not None:
                _row(axis, table.lines[at].comparisons[place], shown.scale, y)
        axis.axvline(0, color="black", lw=0.8, zorder=1)
        measured = any(not math.isnan(line.comparisons[place].low) for line in table.lines)
        _name_values(axis, f"Δ {_with_unit(shown)}", f"to {reference}", measured, len(places))
        axis.tick_params(axis="y", length=0)
        axis.grid(False, axis="y")
    for axis in panels[::MOST_COLUMNS]:
        _label_rows(axis, rows, heights, total)
    _legend(figure, panels, [line.comparisons[place] for line in table.lines for place in places])
    return figure


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of panels that share their rows, each `height` inches high: in a column of the page one, in its width three."""
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    columns = min(count, MOST_COLUMNS)
    lines = math.ceil(count / columns)
    named = 0.9 if lines == 1 else 0.4 + 0.6 * lines
    figure, axes = pyplot.subplots(
        lines,
        columns,
        figsize=(COLUMN if count == 1 else PAGE, lines * height + named),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    panels = list(axes.flat[:count])
    for axis in panels if columns > 1 else ():
        axis.xaxis.set_major_locator(MaxNLocator(4 if columns == 2 else 3))
    return figure, panels


def _row(axis: Axes, result: Comparison, scale: float, y: float) -> None:
    if result.verdict == SAME_RUNS or math.isnan(result.delta):
        said = "same runs" if result.verdict == SAME_RUNS else "no pair"
        axis.text(0, y, said, fontsize=6, color=GREY, ha="center", va="center", zorder=3,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
        return
    _estimate(axis, result, scale, y, BLUE)


def _estimate(axis: Axes, result: Comparison | Effect, scale: float, y: float, colour: str, marker: str = "o") -> None:
    """A point, filled where the verdict shows a difference, on its interval where there is one."""
    if not math.isnan(result.low):
        axis.plot(
            [scale * result.low, scale * result.high], [y, y], color=colour, lw=1, solid_capstyle="butt", zorder=2
        )
    axis.plot(scale * result.delta, y, marker, color=colour, mew=0.9, mfc=_fill(result.verdict, colour), zorder=3)


def _fill(verdict: str, colour: str) -> str:
    return "white" if verdict in (NO_DIFFERENCE, TOO_SMALL, "") else colour


def _legend(figure: Figure, axes: list[Axes], results: list[Comparison]) -> None:
    """What filled and open markers say, as far as both are there."""
    entries = []
    if any(result.significant for result in results):
        entries.append((BLUE, f"better or worse (p < {ALPHA:g}, Holm)"))
    kinds = {result.verdict for result in results} & {NO_DIFFERENCE, TOO_SMALL}
    if kinds:
        entries.append(("white", " or ".join(kind for kind in (NO_DIFFERENCE, TOO_SMALL) if kind in kinds)))
    handles = [axes[0].plot([], [], "o", color=BLUE, mew=0.9, mfc=fill, label=label)[0] for fill, label in entries]
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=1 if len(axes) == 1 else 2, handlelength=1)


def _heights(rows: list[tuple[str, int | None]]) -> tuple[list[float], float]:
    """Where the middle of each label stands, in inches from the top, so that none meets another; and the height of all."""
    heights: list[float] = []
    top = 0.0
    for label, index in rows:
        if index is None and heights:
            top += GAP
        high = LINE * (1 + _wrapped(label).count("\n")) + GAP
        heights.append(top + high / 2)
        top += high
    return heights, top


def _label_rows(axis: Axes, rows: list[tuple[str, int | None]], heights: list[float], total: float) -> None:
    """Labels of the rows, and titles of the sections in italics."""
    axis.set_yticks(heights, [_wrapped(label) for label, _ in rows])
    for text, (_, index) in zip(axis.get_yticklabels(), rows, strict=True):
        if index is None:
            text.set(style="italic", color=GREY)
    axis.set_ylim(total, 0)


def _name_values(axis: Axes, text: str, against: str, measured: bool, panels: int) -> None:
    """What a panel shows; of many, the figure's foot says once what is the same in all."""
    if panels < MOST_COLUMNS:
        axis.set_xlabel(_wrapped(f"{text} {against}".strip(), 38) + "\n95 % intervals" * measured)
        return
    axis.set_xlabel(_wrapped(text, 26))
    rest = [*[f"Δ: difference {against}"] * bool(against), *["95 % intervals"] * measured]
    if rest:
        axis.figure.supxlabel(_wrapped(", ".join(rest), 100), fontsize=8)


def _wrapped(label: str, width: int = LABEL_WIDTH) -> str:
    """At most three lines; a dollar sign is no mathematics."""
    lines = textwrap.wrap(one_line(label), width, max_lines=3, placeholder=" …", break_on_hyphens=False) or [""]
    return "\n".join(lines).replace("$", r"\$")


def _with_unit(shown: Metric) -> str:
    said = [*["points"] * shown.percent, *["lower is better"] * (shown.higher_is_better is False)]
    return f"{shown.label} ({', '.join(said)})" if said else shown.label


def shapley(report: FactorialReport) -> Figure:
    """Of every switch its effect alone, left out, on average and its Shapley value, a panel a metric."""
    shown_ones = list(zip(report.metrics, report.factorials, strict=True))
    switches = report.factorials[0].design.switches
    figure, panels = _panels(len(shown_ones), 0.05 + 0.55 * len(switches))
    markers = ("s", "D", "^", "o")
    for axis, (shown, found) in zip(panels, shown_ones, strict=True):
        for place, switch in enumerate(switches):
            for lane, kind in enumerate(OF_A_SWITCH):
                (effect,) = found.of(kind, switch)
                if not math.isnan(effect.delta):
                    y = place + 0.2 * (lane - 1.5)
                    _estimate(axis, effect, shown.scale, y, COLOURS[lane], markers[lane])
            if place:
                axis.axhline(place - 0.5, color="0.85", lw=0.5, zorder=0)
        axis.axvline(0, color="black", lw=0.8, zorder=1)
        axis.set_yticks(range(len(switches)), [_wrapped(switch) for switch in switches])
        axis.set_ylim(len(switches) - 0.5, -0.5)
        measured = any(not math.isnan(effect.low) for effect in found.effects)
        _name_values(axis, f"effect on {_with_unit(shown)}", "", measured, len(panels))
        axis.tick_params(axis="y", length=0)
        axis.grid(False, axis="y")
    handles = [
        panels[0].plot([], [], markers[lane], color=COLOURS[lane], label=kind)[0]
        for lane, kind in enumerate(OF_A_SWITCH)
    ]
    effects = [effect for found in report.factorials for kind in OF_A_SWITCH for effect in found.of(kind)]
    if any(_fill(effect.verdict, BLUE) == "white" for effect in effects):
        handles.append(
            panels[0].plot([], [], "o", color=GREY, mfc="white", mew=0.9, label="open: not shown or n too small")[0]
        )
    figure.legend(handles=handles, loc="outside upper center", ncols=2 if len(shown_ones) == 1 else 5, handlelength=1)
    return figure


def interactions(report: FactorialReport) -> Figure:
    """The mean of every pair of levels, a panel a pair of factors and a line a level of the second; parallel: none."""
    from matplotlib import pyplot

    panels = [
        (shown, found, pair)
        for shown, found in zip(report.metrics, report.factorials, strict=True)
        if found.complete_seeds
        for pair in itertools.combinations(found.design.levels, 2)
    ]
    columns = 1 if len(panels) == 1 else 2 if len(panels) in (2, 4) else 3
    rows = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(COLUMN if columns == 1 else PAGE, 2.15 * rows), squeeze=False, layout="constrained"
    )
    for axis, (shown, found, pair) in zip(axes.flat, panels, strict=False):
        _interaction(axis, shown, found, *pair)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for metric in report.metrics:
        _same_range([axis for axis, panel in zip(axes.flat, panels, strict=False) if panel[0] == metric])
    return figure


def _interaction(axis: Axes, shown: Metric, found: Factorial, first: str, second: str) -> None:
    design = found.design
    across = design.levels[first]
    for place, level in enumerate(design.levels[second]):
        means = [found.marginal({first: one, second: level}) * shown.scale for one in across]
        dash = ("-", "--", ":", "-.")[place % 4]
        name = f"{second} {level}" if second in design.switches else f"{second}={level}"
        axis.plot(range(len(across)), means, f"o{dash}", color=COLOURS[place % len(COLOURS)], label=_wrapped(name, 18))
    axis.set_xticks(range(len(across)), [_wrapped(level, 10) for level in across])
    axis.set_xlim(-0.3, len(across) - 0.7)
    said = found.of(INTERACTION, first, second)
    interval = f"\ninteraction {value_text(shown, said[0])}" if len(said) == 1 else ""
    axis.set_xlabel(f"{first}{interval}".replace("$", r"\$"), fontsize=7)
    axis.set_ylabel(f"{shown.label} (%)" if shown.percent else shown.label)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(2, len(design.levels[second])), borderaxespad=0.2,
                handlelength=1.8, columnspacing=0.9)  # fmt: skip
    axis.grid(False, axis="x")


def _same_range(axes: list[Axes]) -> None:
    """Panels of one metric show the same range, so that slopes can be compared."""
    limits = [axis.get_ylim() for axis in axes]
    for axis in axes:
        axis.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
