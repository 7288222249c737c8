"""Figures of a table: which are drawn, what their markers say, that labels do not overlap, that the bytes are stable."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from made import make_layout
from matplotlib import pyplot
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from PIL import Image

from analysis import LayoutRow, build_factorial, build_table, metric, write_report
from analysis.style import COLUMN, PAGE, style
from analysis.table_figures import BLUE, LABEL_WIDTH, drawable, forest, interactions, shapley
from analysis.tables import Layout

Frames = Callable[..., pd.DataFrame]


@contextmanager
def drawn(make: Callable[[], Figure]) -> Iterator[Figure]:
    """The figure laid out as it is saved."""
    with style():
        figure = make()
        figure.canvas.draw()
        yield figure
        pyplot.close(figure)


def values_of(rows: int, seeds: int, start: int = 0) -> dict[str, dict[int, float]]:
    rng = np.random.default_rng(start)
    shared = rng.normal(0, 0.03, seeds)
    return {
        f"row{i}": dict(enumerate((0.7 + shared + rng.normal(0.01 * (i % 4), 0.01, seeds)).tolist()))
        for i in range(rows)
    }


def layout(values: dict[str, dict[int, float]], label: str = "{}", **changes: Any) -> Layout:
    rows = tuple(
        LayoutRow(name, label.format(name), f"section {i // 5}" if i > 2 else "") for i, name in enumerate(values)
    )
    return make_layout(rows, **changes)


def factorial_layout(values: dict[str, dict[int, float]], levels: dict[str, tuple[str, ...]], **changes: Any) -> Layout:
    chosen = itertools.product(*levels.values())
    rows = tuple(
        LayoutRow(name, name, factors=dict(zip(levels, one, strict=True)))
        for name, one in zip(values, chosen, strict=True)
    )
    return make_layout(rows, **changes)


def overlaps(boxes: list) -> list[tuple[int, int]]:
    return [(i, j) for (i, a), (j, b) in itertools.combinations(enumerate(boxes), 2) if a.overlaps(b)]


@pytest.mark.parametrize(
    "label", ["{}", "UW-SO, weights sum to one, scale = first mean of {}, all together in 3 lines $x$"]
)
def test_labels_of_25_rows_fit_into_a_column(frame_of: Frames, label: str) -> None:
    values = values_of(25, 5)
    table = build_table(frame_of(values), layout(values, label))
    with drawn(lambda: forest(table)) as figure:
        (axis,) = figure.axes
        labels = [text for text in axis.get_yticklabels() if text.get_text()]
        boxes = [text.get_window_extent() for text in labels]
        assert len(labels) == 24 + 5 and not overlaps(boxes)
        assert max(len(line) for text in labels for line in text.get_text().splitlines()) <= LABEL_WIDTH + 2
        left, right = min(box.x0 for box in boxes), max(box.x1 for box in boxes)
        assert left >= 0 and right <= axis.get_window_extent().x0
        # what is left for the intervals
        assert axis.get_window_extent().width > 0.35 * COLUMN * figure.dpi
        assert figure.get_size_inches()[0] == COLUMN
        top = figure.legends[0].get_window_extent()
        assert not top.overlaps(axis.get_window_extent()) and top.x0 >= 0 and top.x1 <= COLUMN * figure.dpi


def markers(figure: Figure) -> list[tuple[float, float, bool]]:
    """Points of the first panel: x, y, whether filled."""
    (axis,) = figure.axes[:1]
    return [
        (float(line.get_xdata()[0]), float(line.get_ydata()[0]), not same_color(line.get_markerfacecolor(), "white"))
        for line in axis.lines
        if line.get_marker() == "o" and len(line.get_xdata()) == 1
    ]


def test_markers_stand_at_the_differences_and_are_filled_by_verdict(frame_of: Frames) -> None:
    base = {s: 0.7 + 0.01 * s for s in range(5)}
    far = {s: v + 0.1 + 0.001 * (s % 2) for s, v in base.items()}
    near = {s: v + 0.01 * (-1) ** s for s, v in base.items()}
    one = {0: 0.9}
    table = build_table(frame_of(values := {"row0": base, "far": far, "near": near, "one": one}), layout(values))
    with drawn(lambda: forest(table)) as figure:
        found = markers(figure)
        assert [round(x, 6) for x, _, _ in found] == [
            round(100 * line.comparisons[0].delta, 6) for line in table.lines[1:]
        ]
        assert [filled for _, _, filled in found] == [True, False, False]
        intervals = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 2 and line.get_color() == BLUE]
        ends = sorted(float(x) for line in intervals for x in line.get_xdata())
        expected = sorted(100 * end for line in table.lines[1:3] for r in line.comparisons for end in (r.low, r.high))
        # a point without interval has none drawn
        assert ends == pytest.approx(expected)
        assert figure.legends[0].get_texts()[1].get_text() == "no difference shown or n too small"


def test_rows_without_a_difference_say_why(frame_of: Frames) -> None:
    values = values_of(3, 3)
    frame = frame_of({name: values[name] for name in ("row0", "row1")} | {"row2": values["row0"]})
    frame.loc[frame["row"] == "row2", "run_id"] = [f"run-row0-{seed}" for seed in range(3)]
    table = build_table(frame, layout({**values, "row3": {}}))
    with drawn(lambda: forest(table)) as figure:
        assert [text.get_text() for text in figure.axes[0].texts] == ["same runs", "no pair"]
        assert len(markers(figure)) == 1


SWITCH = ("off", "on")


def test_effects_of_switches_are_beside_each_other(frame_of: Frames) -> None:
    values = values_of(8, 5)
    report = build_factorial(frame_of(values), factorial_layout(values, {"a": SWITCH, "b": SWITCH, "c": SWITCH}))
    assert report is not None
    with drawn(lambda: shapley(report)) as figure:
        (axis,) = figure.axes
        points = [
            float(line.get_xdata()[0])
            for line in axis.lines
            if line.get_marker() in "sD^o" and len(line.get_xdata()) == 1
        ]
        (found,) = report.factorials
        kinds = ("alone − none", "all − without it", "main effect", "Shapley value")
        expected = [100 * found.of(kind, switch)[0].delta for switch in "abc" for kind in kinds]
        assert points == pytest.approx(expected)
        assert [text.get_text() for text in figure.legends[0].get_texts()][:4] == list(kinds)
        assert not figure.legends[0].get_window_extent().overlaps(axis.get_window_extent())


@pytest.mark.parametrize(
    ("levels", "panels"),
    [
        ({"a": SWITCH, "b": SWITCH}, 1),
        ({"a": SWITCH, "b": SWITCH, "c": SWITCH, "d": SWITCH}, 6),
        ({"T": ("1", "2", "5"), "scale": ("first", "first_mean", "none")}, 1),
    ],
)
def test_interactions_are_the_means_of_pairs(frame_of: Frames, levels: dict[str, tuple[str, ...]], panels: int) -> None:
    values = values_of(math.prod(map(len, levels.values())), 4)
    report = build_factorial(frame_of(values), factorial_layout(values, levels))
    assert report is not None
    with drawn(lambda: interactions(report)) as figure:
        shown = [axis for axis in figure.axes if axis.get_visible()]
        assert len(shown) == panels
        first, second, *_ = levels
        cells = {combination: np.mean(list(values[row].values())) for row, combination in
                 zip(values, itertools.product(*levels.values()), strict=True)}  # fmt: skip
        for line, level in zip(shown[0].lines, levels[second], strict=True):
            expected = [100 * np.mean([v for c, v in cells.items() if c[:2] == (one, level)]) for one in levels[first]]
            assert list(line.get_ydata()) == pytest.approx(expected)
        for one, other in itertools.combinations(shown, 2):
            assert one.get_ylim() == other.get_ylim()
        boxes = [axis.get_tightbbox() for axis in shown]
        assert not overlaps(boxes)
        width = figure.get_size_inches()[0] * figure.dpi
        assert all(box.x0 >= 0 and box.x1 <= width + 1 for box in boxes)
        for axis in shown:
            assert not overlaps([text.get_window_extent() for text in axis.get_xticklabels()])


def test_several_metrics_are_panels_of_one_figure(frame_of: Frames) -> None:
    values = values_of(4, 4)
    frame = frame_of(values)
    frame["test/nll"] = 2.0 - frame["test/top1"]
    frame["time/step_milliseconds"] = 1.0
    metrics = tuple(metric(name) for name in ("test/top1", "test/nll", "time/step_milliseconds"))
    made = factorial_layout(values, {"a": SWITCH, "b": SWITCH}, metrics=metrics)
    table, report = build_table(frame, made), build_factorial(frame, made)
    assert report is not None
    for make in (lambda: forest(table), lambda: shapley(report), lambda: interactions(report)):
        with drawn(make) as figure:
            assert len(figure.axes) == 2 and figure.get_size_inches()[0] == PAGE
            assert not overlaps([axis.get_tightbbox() for axis in figure.axes])


@pytest.mark.parametrize("count", [4, *(pytest.param(n, marks=pytest.mark.full) for n in (3, 7))])
def test_many_metrics_leave_each_its_room(frame_of: Frames, count: int) -> None:
    values = values_of(4, 5)
    names = ("test/top1", "probe/attention_distance", "probe/attention_kl", "probe/relation_cosine", "probe/cka",
             "probe/shift_consistency", "probe/sensitivity_high")[:count]  # fmt: skip
    frame = frame_of(values)
    for place, name in enumerate(names):
        frame[name] = frame["test/top1"] * 0.3**place
    made = factorial_layout(values, {"a": SWITCH, "b": SWITCH}, metrics=tuple(map(metric, names)))
    table, report = build_table(frame, made), build_factorial(frame, made)
    assert report is not None
    for make in (lambda: forest(table), lambda: shapley(report)):
        with drawn(make) as figure:
            shown = [axis for axis in figure.axes if axis.get_visible()]
            assert len(shown) == count
            assert not overlaps([axis.get_tightbbox() for axis in shown])
            for axis in shown:
                assert not overlaps([text.get_window_extent() for text in axis.get_xticklabels() if text.get_text()])
                assert axis.get_window_extent().width > 0.2 * PAGE * figure.dpi
                labels = [text.get_text() for text in axis.get_yticklabels()]
                assert bool(any(labels)) == (axis.get_subplotspec().is_first_col())


def test_only_what_has_numbers_is_drawn(frame_of: Frames) -> None:
    values = values_of(4, 1)
    plain = build_table(frame_of(values), layout(values))
    assert set(drawable(plain, None)) == {"forest"}
    alone = build_table(frame_of({"row0": values["row0"]}), layout(values))
    assert not drawable(alone, None)
    costs = layout(values, metrics=(metric("time/step_milliseconds"),))
    assert not drawable(build_table(frame_of(values).assign(**{"time/step_milliseconds": 1.0}), costs), None)
    made = factorial_layout(values, {"T": ("1", "2"), "s": ("x", "y")})
    report = build_factorial(frame_of(values), made)
    assert set(drawable(build_table(frame_of(values), made), report)) == {"forest", "interactions"}


def test_figures_are_files_of_the_report_and_go_when_they_have_nothing_to_show(
    frame_of: Frames, tmp_path: Path
) -> None:
    values = values_of(4, 5)
    made = factorial_layout(values, {"a": SWITCH, "b": SWITCH})
    report = write_report(frame_of(values), made, tmp_path)
    names = {f"losses.{what}.{suffix}" for what in ("forest", "shapley", "interactions") for suffix in ("pdf", "png")}
    assert names <= {path.name for path in report.paths}
    assert "(losses.forest.png)" in (tmp_path / "losses.md").read_text()
    assert "(losses.interactions.png)" in (tmp_path / "losses.factorial.md").read_text()
    before = {path.name: path.read_bytes() for path in report.paths}
    for name in sorted(names):
        if name.endswith("png"):
            with Image.open(tmp_path / name) as image:
                assert image.width > 300 and image.convert("L").getextrema()[0] < 100
    again = write_report(frame_of(values), made, tmp_path)
    assert {path.name: path.read_bytes() for path in again.paths} == before
    # a combination is gone, and with it what needs all
    few = write_report(frame_of({name: values[name] for name in ("row0", "row1", "row2")}), made, tmp_path)
    left = {path.name for path in tmp_path.iterdir() if path.suffix in (".pdf", ".png")}
    assert left == {"losses.forest.pdf", "losses.forest.png"} <= {path.name for path in few.paths}
