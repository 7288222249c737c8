"""The notes below a table: what its numbers are, what is missing, and where they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from analysis import statistics
from analysis.escape import one_line
from analysis.layout import Layout, LayoutRow
from analysis.load import count
from analysis.statistics import Comparison
from basd.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

# Rows with a comparison per metric.
Results = Sequence[tuple[LayoutRow, tuple[Comparison, ...]]]
_DIRTY = "-dirty"


def table_notes(
    layout: Layout, lines: Results, seeds: Sequence[int], part: pd.DataFrame, *, allow_mixed_code: bool
) -> tuple[str, ...]:
    """Every note, in the order in which they are printed; `part`: the arms of the layout's rows and seeds.

    UserError: arms of several code versions without `allow_mixed_code`.
    """
    notes = [
        *_test_notes(layout, lines, seeds),
        *_gap_notes(layout, lines, part),
        *_layout_notes(layout),
        _version_note(layout, part, allow_mixed_code),
        *_origin_notes(layout),
        *(one_line(note) for note in layout.notes),
        f"Run ids of every cell: {layout.name}.runs.csv.",
    ]
    return tuple(note for note in notes if note)


def _origin_notes(layout: Layout) -> list[str]:
    """Setting, teacher and plan, as far as the layout tells them."""
    teacher = f"; teacher {layout.teacher}" if layout.teacher else ""
    notes = [f"Setting: {layout.setting}{teacher}."] if layout.setting else []
    return [*notes, f"Plan {layout.plan}."] if layout.plan else notes


def _layout_notes(layout: Layout) -> list[str]:
    """What marks and figures of others mean."""
    notes = []
    if layout.marks:
        notes.append(
            f"{', '.join(one_line(title) for title in layout.marks)}: as in each row's resolved configuration; "
            "✓ on, – off or without effect there."
        )
    sources = list(dict.fromkeys(figures.source for figures in layout.reported))
    if sources:
        notes.append(
            "In italics: figures that others have reported, of other settings (data, teacher, student or recipe); "
            "they were not measured here and enter no mean and no test."
        )
    return [*notes, *(f"[{number}] {one_line(source)}" for number, source in enumerate(sources, 1))]


def _test_notes(layout: Layout, lines: Results, seeds: Sequence[int]) -> list[str]:
    reference = next(one_line(row.label) for row in layout.rows if row.name == layout.reference)
    results = [
        result
        for _, comparisons in lines
        for shown, result in zip(layout.metrics, comparisons, strict=True)
        if shown.tested
    ]
    tested = max(sum(not math.isnan(comparisons[i].p) for _, comparisons in lines) for i in range(len(layout.metrics)))
    most = max((result.pairs for result in results), default=0)
    notes = [f"Mean ± standard deviation over n seeds; seeds {', '.join(map(str, seeds))}."]
    if len(results) < len(lines) * len(layout.metrics):
        notes.append(f"÷ reference: the mean over that of {reference}.")
    if not results:
        pass
    elif not any(comparisons[0].n for row, comparisons in lines if row.name == layout.reference):
        notes.append(f"The reference, {reference}, has no finished run yet, so there are no differences.")
    elif most >= statistics.INTERVAL_FROM:
        notes.append(
            f"Δ: mean difference to {reference}, paired by seed, with a paired-t 95 % interval, not adjusted for the "
            f"number of rows; p: two-sided paired t test, Holm-adjusted over the {tested} compared rows of a metric."
        )
    else:
        notes.append(
            f"Δ: mean difference to {reference}, paired by seed; "
            f"under {statistics.INTERVAL_FROM} pairs no interval and no p."
        )
    if layout.is_split:
        notes.append("Differences, p and verdicts: in a table of each metric.")
    if any(result.verdict == statistics.TOO_SMALL for result in results):
        notes.append(f"n too small: no verdict under {statistics.VERDICT_FROM} pairs.")
    if any(result.significant for result in results):
        notes.append(f"Bold: adjusted p below {statistics.ALPHA:g}.")
    if any(result.verdict == statistics.SAME_RUNS for result in results):
        notes.append(
            "Same runs: the row is the reference's own configuration and shares its runs; nothing is compared."
        )
    if any(result.low == result.high for result in results):
        notes.append("Interval of zero width: all differences are equal; p is then the exact sign-flip p.")
    if any(not math.isnan(result.p_sign_flip) for result in results):
        notes.append(f"Exact sign-flip p (unadjusted): {layout.name}.csv.")
    if any(result.verdict == statistics.DIFFERS for result in results):
        notes.append("Differs: significant, in a metric of which neither direction is better.")
    lower = [shown.label for shown in layout.metrics if shown.higher_is_better is False]
    return [*notes, f"Lower is better: {', '.join(lower)}."] if lower else notes


def _gap_notes(layout: Layout, lines: Results, part: pd.DataFrame) -> list[str]:
    """Seeds that are not in a row's mean, and why."""
    status = {
        (row, int(seed)): str(state) for row, seed, state in zip(part["row"], part["seed"], part["status"], strict=True)
    }
    missing, nonfinite = [], []
    for row, comparisons in lines:
        label = one_line(row.label)
        gone = [f"{seed} ({status.get((row.name, seed), 'no run').lower()})" for seed in comparisons[0].missing]
        if gone:
            missing.append(f"{label}, seed {', '.join(gone)}")
        for shown, result in zip(layout.metrics, comparisons, strict=True):
            if result.nonfinite:
                nonfinite.append(f"{label}, seed {', '.join(map(str, result.nonfinite))} ({shown.label})")
    notes = [f"Not finished, so not in the row's mean: {'; '.join(missing)}."] if missing else []
    if nonfinite:
        notes.append(f"Without a finite value, so not in the row's mean: {'; '.join(nonfinite)}.")
    if notes and any(shown.tested for shown in layout.metrics):
        notes.append("Differences are of the seeds that a row and the reference both have.")
    return notes


def _version_note(layout: Layout, part: pd.DataFrame, allow_mixed_code: bool) -> str:
    finished = part[part["status"] == "FINISHED"]
    arms: dict[str, set[str]] = {}
    for version, run in zip(finished["version"], finished["run_id"], strict=True):
        arms.setdefault(str(version), set()).add(str(run))
    listed = ", ".join(f"{version} ({count(len(arms[version]), 'arm')})" for version in sorted(arms))
    if len(arms) > 1 and not allow_mixed_code:
        raise UserError(
            f"The arms of table '{layout.name}' were trained by {len(arms)} versions of the code: {listed}; print "
            f"the table with --allow-mixed-code, or train it with one version by `basd grid {layout.name} --retrain-stale`."
        )
    dirty = (
        " The commit does not pin down code that is -dirty."
        if any(version.endswith(_DIRTY) for version in arms)
        else ""
    )
    return f"{'Arms of several code versions' if len(arms) > 1 else 'Code version'}: {listed}.{dirty}"
