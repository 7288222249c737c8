"""Figures of a sweep: its history, the importance of settings, value against each setting, and the curves that were cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.style import COLOURS, COLUMN, GREY, PAGE, save, style
from analysis.sweeps import SweepResult, Trial, header

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN = COLOURS[0], COLOURS[1], COLOURS[2]


def draw(result: SweepResult, directory: Path) -> list[Path]:
    """Write the figures that the trials allow, as NAME.WHAT.pdf and .png; returns the paths."""
    drawn = {
        "history": history,
        "importance": importance,
        "slices": slices,
        "epochs": epochs,
        "front": front,
    }
    written: list[Path] = []
    with style():
        for what, make in drawn.items():
            figure = make(result)
            if figure is not None:
                written += save(figure, directory / f"{result.name}.{what}")
    return written


def history(result: SweepResult) -> Figure | None:
    """Value by trial with the best so far; pruned trials at their last value, diverged ones at the foot."""
    from matplotlib import pyplot

    if not result.complete:
        return None
    count = len(result.metrics)
    figure, axes = pyplot.subplots(
        count, 1, figsize=(COLUMN, 2.2 * count), squeeze=False, sharex=True, layout="constrained"
    )
    for place, axis in enumerate(axes[:, 0]):
        _history(axis, result, place)
    axes[-1, 0].set_xlabel("trial")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(3, len(labels)))
    return figure


def _history(axis: Axes, result: SweepResult, place: int) -> None:
    from matplotlib.ticker import MaxNLocator

    one = result.metrics[place]
    complete = result.complete
    for trial in complete:
        seeds = trial.of_seeds[place]
        if len(seeds) > 1:
            axis.plot(
                [trial.number] * len(seeds), [one.scale * v for v in seeds.values()], ".", color=GREY, ms=2, zorder=2
            )
    numbers = [trial.number for trial in complete]
    axis.plot(numbers, [one.scale * t.values[place] for t in complete], "o", color=BLUE, label="complete", zorder=3)
    left = [trial for trial in result.trials if trial.state == "pruned" and trial.steps] if place == 0 else []
    if left:
        values = [one.scale * list(trial.steps.values())[-1] for trial in left]
        axis.plot([t.number for t in left], values, "x", color=GREY, label="pruned", zorder=3)
    diverged = [trial.number for trial in result.trials if trial.state in ("diverged", "failed")]
    if diverged:
        axis.plot(diverged, [0.0] * len(diverged), "|", color=ORANGE, ms=7, mew=1.5, label="diverged or failed",
                  transform=axis.get_xaxis_transform(), clip_on=False, zorder=4)  # fmt: skip
    best: list[float] = []
    for trial in complete:
        value = trial.values[place]
        best.append(value if not best or result.better(place, value, best[-1]) else best[-1])
    last = max(trial.number for trial in result.trials)
    axis.step(
        [*numbers, last], [one.scale * v for v in [*best, best[-1]]], where="post", color=GREEN, label="best so far"
    )
    if result.first is not None:
        value = one.scale * result.first.values[place]
        axis.axhline(value, color=ORANGE, ls="--", lw=0.9, label="start", zorder=1)
    axis.set_ylabel(header(one))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def importance(result: SweepResult) -> Figure | None:
    """Share of the variance that each setting accounts for."""
    from matplotlib import pyplot

    shown = [(one, shares) for one, shares in zip(result.metrics, result.importance, strict=True) if shares]
    if not shown:
        return None
    keys = list(shown[0][1])[::-1]
    figure, axis = pyplot.subplots(figsize=(COLUMN, 0.5 + 0.22 * len(keys) * len(shown)), layout="constrained")
    height = 0.8 / len(shown)
    for place, (one, shares) in enumerate(shown):
        at = [row + 0.4 - height * (place + 0.5) for row in range(len(keys))]
        axis.barh(at, [100 * shares[key] for key in keys], height, color=COLOURS[place], label=one.label)
        for y, key in zip(at, keys, strict=True):
            axis.text(100 * shares[key] + 1, y, f"{100 * shares[key]:.0f}", va="center", fontsize=7)
    axis.set_yticks(range(len(keys)), keys)
    axis.set_xlim(0, 112)
    axis.set_xticks(range(0, 101, 25))
    axis.set_xlabel(f"share of variance (%), fANOVA, n = {len(result.complete)}")
    axis.grid(False, axis="y")
    if len(shown) > 1:
        figure.legend(loc="outside upper center", ncols=len(shown))
    return figure


def slices(result: SweepResult) -> Figure | None:
    """The first metric against each setting; colour tells the order of the trials."""
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    complete = result.complete
    if len(complete) < 2:
        return None
    keys = list(result.space)
    columns = min(3, len(keys))
    rows = math.ceil(len(keys) / columns)
    width = PAGE if columns > 1 else COLUMN
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(width, 2.1 * rows), squeeze=False, sharey=True, layout="constrained"
    )
    one = result.metrics[0]
    values = [one.scale * trial.values[0] for trial in complete]
    dots = None
    for place, key in enumerate(keys):
        axis = axes[place // columns, place % columns]
        at, names = _positions(result, key, complete)
        dots = axis.scatter(at, values, c=[t.number for t in complete], cmap="viridis", s=14, vmin=0,
                            vmax=max(1, result.trials[-1].number), zorder=3)  # fmt: skip
        if names:
            axis.set_xticks(range(len(names)), names)
            axis.set_xlim(-0.5, len(names) - 0.5)
        elif key in result.logarithmic:
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=5))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel(key)
    for place in range(len(keys), rows * columns):
        axes[place // columns, place % columns].set_visible(False)
    for row in axes:
        row[0].set_ylabel(header(one))
    if dots is not None:
        figure.colorbar(dots, ax=axes, label="trial", pad=0.01)
    return figure


def _positions(result: SweepResult, key: str, trials: Sequence[Trial]) -> tuple[list[Any], list[str]]:
    """Where trials stand on a setting's axis; for choices their places and names."""
    values = [trial.params[key] for trial in trials]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return values, []
    every = [trial.params[key] for trial in result.trials if key in trial.params]
    names = [name for name in _choices(result.space[key]) if name in every] or sorted({str(value) for value in every})
    return [names.index(str(value)) for value in values], names


def _choices(text: str) -> list[str]:
    return [part.strip() for part in text.strip().removeprefix("choice(").removesuffix(")").split(",")]


def epochs(result: SweepResult) -> Figure | None:
    """The metric on the way of each trial, where a pruner looked at it; those that were left end there."""
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    shown = [trial for trial in result.trials if trial.steps]
    if not shown:
        return None
    figure, axis = pyplot.subplots(figsize=(COLUMN, 2.3), layout="constrained")
    one = result.metrics[0]
    over_seeds = result.pruner["name"] == "wilcoxon"
    best = {trial.number for trial in result.best}
    said: set[str] = set()
    for trial in sorted(shown, key=lambda t: (t.number in best, t.state == "complete")):
        name = "best" if trial.number in best else "complete" if trial.state == "complete" else "left"
        colour, width, order = {"best": (GREEN, 1.8, 4), "complete": (BLUE, 0.9, 3), "left": (GREY, 0.7, 2)}[name]
        steps = dict(trial.steps)
        if trial.values and not over_seeds:
            steps[result.epochs] = trial.of_seeds[0][result.seeds[0]]
        xs, ys = list(steps), [one.scale * value for value in steps.values()]
        label = None if name in said else name
        said.add(name)
        axis.plot([x + over_seeds for x in xs], ys, color=colour, lw=width, zorder=order, label=label)
        axis.plot(xs[-1] + over_seeds, ys[-1], "x" if name == "left" else "o", color=colour, ms=3, zorder=order)
    axis.set_xlabel("seed, in order" if over_seeds else "epoch")
    axis.set_ylabel(header(one))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def front(result: SweepResult) -> Figure | None:
    """Two metrics against each other, with the trials that none is better than in both."""
    from matplotlib import pyplot

    if len(result.metrics) != 2 or len(result.complete) < 2:
        return None
    figure, axis = pyplot.subplots(figsize=(COLUMN, 2.5), layout="constrained")
    x, y = result.metrics
    axis.plot([x.scale * t.values[0] for t in result.complete], [y.scale * t.values[1] for t in result.complete],
              "o", color=GREY, ms=3, label="trial")  # fmt: skip
    best = sorted(result.best, key=lambda trial: trial.values[0])
    axis.plot(
        [x.scale * t.values[0] for t in best], [y.scale * t.values[1] for t in best], "o-", color=GREEN, label="front"
    )
    if result.first is not None:
        axis.plot(x.scale * result.first.values[0], y.scale * result.first.values[1], "D", color=ORANGE, label="start")
    axis.set_xlabel(header(x))
    axis.set_ylabel(header(y))
    figure.legend(loc="outside upper center", ncols=3)
    return figure
