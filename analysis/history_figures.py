"""Figures over training: learning curves, the paths of losses, ramps and weights, the selector's mixtures; and cost against accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from analysis.metrics import metric as shown_metric
from analysis.style import COLOURS, COLUMN, GREY, PAGE

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Markers and dashes beside colours, so that more rows than colours can be told apart, in print too.
DASHES = ("-", "--", ":", "-.")


def learning_curves(
    histories: pd.DataFrame, metric: str, labels: Mapping[str, str] | None = None, *, smooth: int = 1
) -> Figure:
    """One metric by step: the mean over seeds of each row, and a band of one standard deviation where there are two or more.

    `histories`: columns row, seed, step, metric, value, as `analysis.histories` gives them. `smooth`: points of a running mean.
    """
    from matplotlib import pyplot

    one = shown_metric(metric)
    rows = list(dict.fromkeys(histories["row"]))
    names = [(labels or {}).get(row, row) for row in rows]
    figure, axis = pyplot.subplots(figsize=(COLUMN, 2.0 + _legend_height(names)), layout="constrained")
    for place, (row, name) in enumerate(zip(rows, names, strict=True)):
        _curve(axis, histories[histories["row"] == row], metric, place, name, one.scale, smooth)
    axis.set_xlabel("step")
    axis.set_ylabel(one.heading)
    _legend(figure, names)
    return figure


def _curve(
    axis: Axes, frame: pd.DataFrame, metric: str, place: int, label: str, scale: float = 1.0, smooth: int = 1
) -> None:
    own = frame[frame["metric"] == metric]
    if own.empty:
        return
    table = own.pivot_table(index="step", columns="seed", values="value").sort_index() * scale
    if smooth > 1:
        table = table.rolling(smooth, min_periods=1).mean()
    mean, spread = table.mean(axis=1), table.std(axis=1)
    colour = COLOURS[place % len(COLOURS)]
    axis.plot(mean.index, mean, color=colour, ls=DASHES[place // len(COLOURS) % len(DASHES)], label=label)
    if table.shape[1] > 1:
        axis.fill_between(mean.index, mean - spread, mean + spread, color=colour, alpha=0.18, lw=0)


def trajectories(histories: pd.DataFrame, row: str, label: str = "") -> Figure | None:
    """Losses, their ramps and their weights of one row by step, mean and standard deviation over seeds; None without any."""
    from matplotlib import pyplot

    frame = histories[histories["row"] == row]
    kinds = {"loss/": "loss", "ramp/": "ramp", "weight/": "weight"}
    logged = set(frame["metric"])
    # what else stands under loss/ counts something and has no weight
    parts = sorted(name.removeprefix("weight/") for name in logged if name.startswith("weight/"))
    names = {kind: [f"{kind}{part}" for part in parts if f"{kind}{part}" in logged] for kind in kinds}
    shown = [kind for kind in kinds if names[kind]]
    if not shown:
        return None
    figure, axes = pyplot.subplots(1, len(shown), figsize=(PAGE, 2.3), squeeze=False, layout="constrained")
    for axis, kind in zip(axes[0], shown, strict=True):
        for name in names[kind]:
            part = name.partition("/")[2]
            _curve(axis, frame, name, parts.index(part), part)
        axis.set_xlabel("step")
        axis.set_ylabel(kinds[kind])
        values = frame[frame["metric"].isin(names[kind])]["value"]
        if kind == "loss/" and 0 < 10 * values.min() < values.max():
            axis.set_yscale("log")
    handles = {
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=min(6, len(handles)), title=label or None
    )
    return figure


def selector_map(history: pd.DataFrame, row: str) -> Figure | None:
    """The mixture over the teacher's layers at each extraction point: over training, mean over seeds; None without any.

    `history`: columns row, seed, step, point, layer, value, as `analysis.selector_history` gives them; blocks count from 0
    there and from 1 in the figure.
    """
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    frame = history[history["row"] == row]
    if frame.empty:
        return None
    points = sorted(frame["point"].unique())
    columns = min(4, len(points))
    lines = math.ceil(len(points) / columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(PAGE, 2.0 * lines + 0.2), squeeze=False, sharey=True, layout="constrained"
    )
    shown = None
    for place, point in enumerate(points):
        axis = axes[place // columns, place % columns]
        table = frame[frame["point"] == point].pivot_table(index="layer", columns="step", values="value")
        steps, layers = table.columns, table.index
        # a column is the epoch that ended at its step
        width = steps[1] - steps[0] if len(steps) > 1 else steps[0]
        edges = (steps[0] - width, steps[-1], layers[0] + 0.5, layers[-1] + 1.5)
        shown = axis.imshow(
            table.to_numpy(), origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1, extent=edges
        )
        axis.set_title(f"after student block {point + 1}", fontsize=7)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(False)
    for place in range(len(points), lines * columns):
        axes[place // columns, place % columns].set_visible(False)
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("teacher's block", fontsize=8)
    if shown is not None:
        figure.colorbar(shown, ax=axes, label="share of the mixture")
    return figure


def cost_against(
    frame: pd.DataFrame, cost: str, metric: str, labels: Mapping[str, str] | None = None, reference: str = ""
) -> Figure | None:
    """Each row's metric against what it costs, means over seeds, with the standard deviation of the metric; None without either.

    `frame`: columns row, seed and one for each metric, as `analysis.load` gives them.
    """
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter, MaxNLocator

    if cost not in frame or metric not in frame or frame[[cost, metric]].dropna().empty:
        return None
    means = frame.groupby("row", sort=False)[[cost, metric]].mean().dropna()
    spread = frame.groupby("row", sort=False)[metric].std()
    x, y = shown_metric(cost), shown_metric(metric)
    names = [(labels or {}).get(str(row), str(row)) for row in means.index]
    figure, axis = pyplot.subplots(figsize=(COLUMN, 2.2 + _legend_height(names)), layout="constrained")
    for place, ((row, values), name) in enumerate(zip(means.iterrows(), names, strict=True)):
        colour = GREY if row == reference else COLOURS[place % len(COLOURS)]
        error = y.scale * spread[row] if not math.isnan(spread[row]) else None
        axis.errorbar(x.scale * values[cost], y.scale * values[metric], yerr=error, fmt="os^Dv<>P*X"[place % 10], color=colour,
                      ms=4, lw=0.8, label=name)  # fmt: skip
    axis.set_xlabel(x.label)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.set_ylabel(y.heading)
    _legend(figure, names)
    return figure


def _legend_height(names: Sequence[str]) -> float:
    """Inches that `_legend` takes, so that many rows leave the axes their room."""
    return 0.17 * math.ceil(len(names) / _legend_columns(names))


def _legend_columns(names: Sequence[str]) -> int:
    """Two, where each name fits into half of a column of the page."""
    return 2 if max(map(len, names), default=0) <= 24 else 1


def _legend(figure: Figure, names: Sequence[str]) -> None:
    if len(names) > 1:
        figure.legend(loc="outside lower center", ncols=_legend_columns(names))
