"""How arms went: every value that they logged, the weights of their losses, and the mixtures of their selectors, as tidy frames."""

from __future__ import annotations

import csv
import fnmatch
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

from analysis.load import DEFAULT_TRACKING_URI, Rows, open_store, select
from analysis.statistics import no_such_metric
from basd.errors import UserError
from basd.tracking.runs import Run, RunReader, read_artifact, reading, restored

if TYPE_CHECKING:
    import pandas as pd

SELECTOR_FILE = "selector_history.csv"
_SELECTOR_COLUMNS = ("step", "point", "layer", "share")
_WEIGHT = "weight/"
_AT_ONCE = 8


def histories(
    ablation: str,
    metrics: str | Sequence[str],
    *,
    tracking_uri: str = DEFAULT_TRACKING_URI,
    setting: str | None = None,
    rows: Rows | None = None,
    missing: bool = False,
) -> pd.DataFrame:
    """The values that the arms of `ablation` logged on the way: row, seed, step, metric, value (raw units), one a line.

    `metrics`: names or patterns such as "train/loss", "weight/*", "selector/*". The arms, `setting` and `rows` are those of
    `analysis.load`; lines come by row, seed, metric and step. Of a value that was not finite MLflow holds the last one of
    a metric, which stands at its step; two values of one step are the later one. UserError: as `load`, or a name or
    pattern that fits no metric of these arms (with the nearest names), which with `missing` gives no lines instead.
    """
    import pandas as pd

    with closing(open_store(ablation, tracking_uri)) as reader:
        selection = select(reader, ablation, tracking_uri, setting, rows)
        runs = {arm.run.run_id: arm.run for arm in selection.arms}
        names = _matching([metrics] if isinstance(metrics, str) else metrics, runs.values(), missing)
        with reading(tracking_uri):
            series = _series(reader, list(runs.values()), names)
    lines = [
        (arm.row, arm.seed, step, name, value)
        for arm in selection.arms
        for name in names
        for step, value in sorted(series.get((arm.run.run_id, name), {}).items())
    ]
    return selection.describe(pd.DataFrame(lines, columns=["row", "seed", "step", "metric", "value"]))


def weight_history(
    ablation: str,
    *,
    tracking_uri: str = DEFAULT_TRACKING_URI,
    setting: str | None = None,
    rows: Rows | None = None,
) -> pd.DataFrame:
    """The weight of each loss over training: row, seed, step, part, value. Arguments and errors are those of `histories`."""
    frame = histories(ablation, f"{_WEIGHT}*", tracking_uri=tracking_uri, setting=setting, rows=rows)
    attrs = dict(frame.attrs)
    frame = frame.rename(columns={"metric": "part"})[["row", "seed", "step", "part", "value"]]
    frame["part"] = frame["part"].str.removeprefix(_WEIGHT)
    frame.attrs.update(attrs)
    return frame


def selector_history(
    ablation: str,
    *,
    tracking_uri: str = DEFAULT_TRACKING_URI,
    setting: str | None = None,
    rows: Rows | None = None,
    missing: bool = False,
) -> pd.DataFrame:
    """What each extraction point took from each teacher layer: row, seed, step, point, layer, value.

    `value` is the layer's share at the end of an epoch (of one point and step they sum to 1); points are student blocks, layers
    teacher blocks, from 0. An arm has a selector history once it is complete; those that select and are not complete
    are told in `frame.attrs["warnings"]`. Arguments are those of `analysis.load`. UserError: as `load`, no arm with a selector
    history (with `missing` an empty frame instead), or a file that is none.
    """
    import pandas as pd

    with closing(open_store(ablation, tracking_uri)) as reader:
        selection = select(reader, ablation, tracking_uri, setting, rows)
    runs = {arm.run.run_id: arm.run for arm in selection.arms}
    with reading(tracking_uri), ThreadPoolExecutor(_AT_ONCE) as pool:
        files = pool.map(lambda run: read_artifact(tracking_uri, run, SELECTOR_FILE), runs.values())
        mixtures = {run.run_id: _mixture(run, data) for run, data in zip(runs.values(), files, strict=True) if data}
    lines = [(arm.row, arm.seed, *line) for arm in selection.arms for line in mixtures.get(arm.run.run_id, ())]
    for arm in selection.arms:
        # it logged a selector's entropy, so it has a selector
        if arm.run.run_id not in mixtures and "selector/entropy" in arm.run.latest:
            selection.warnings.append(f"Row '{arm.row}', seed {arm.seed}: no selector history yet ({arm.run.status}).")
    if not lines and not missing:
        why = "none of its rows uses a selector, or no arm that does is complete (`basd status` shows how far they are)"
        raise UserError(f"No arm of '{ablation}' has a selector history: {why}.")
    return selection.describe(pd.DataFrame(lines, columns=["row", "seed", "step", "point", "layer", "value"]))


def _matching(patterns: Iterable[str], runs: Iterable[Run], missing: bool) -> list[str]:
    """The metrics that some pattern fits, by name."""
    known = sorted({name for run in runs for name in (*run.latest, *run.marks)})
    found: set[str] = set()
    for pattern in patterns:
        fitting = set(fnmatch.filter(known, pattern))
        if not fitting and not missing:
            raise UserError(no_such_metric(pattern, known))
        found |= fitting
    return sorted(found)


def _series(reader: RunReader, runs: list[Run], names: list[str]) -> dict[tuple[str, str], dict[int, float]]:
    """(run id, metric) -> step -> value."""
    latest: dict[tuple[str, str, int], tuple[int, float]] = {}
    for point in reader.points(runs, names):
        key = (point.run_id, point.metric, point.step)
        if key not in latest or latest[key][0] <= point.milliseconds:
            latest[key] = (point.milliseconds, restored(point.value))
    series: dict[tuple[str, str], dict[int, float]] = {}
    for (run_id, name, step), (_, value) in latest.items():
        series.setdefault((run_id, name), {})[step] = value
    for run in runs:
        for name, (value, step) in run.marks.items():
            series.setdefault((run.run_id, name), {}).setdefault(step, value)
    return series


def _mixture(run: Run, data: bytes) -> list[tuple[int, int, int, float]]:
    """(step, point, layer, share) of a selector's history as an arm exports it."""
    lines = csv.reader(io.StringIO(data.decode("utf-8", "replace")))
    try:
        if tuple(next(lines)) != _SELECTOR_COLUMNS:
            raise ValueError
        return [(int(step), int(point), int(layer), float(share)) for step, point, layer, share in lines]
    except (ValueError, StopIteration, csv.Error) as error:
        raise UserError(
            f"{SELECTOR_FILE} of MLflow's run {run.run_id} cannot be read as a selector's history; restore it from the "
            "arm's directory."
        ) from error
