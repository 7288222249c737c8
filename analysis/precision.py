"""The block "Precision and power" under a table: how large the differences are beside their spread, and the seeds they need."""

from __future__ import annotations

from collections.abc import Iterator

from analysis.escape import escape_markdown, one_line
from analysis.power import POWER, deviation_factors, seeds_needed
from analysis.sheets import NONE, Cell, Sheet, columns, fixed, number
from analysis.statistics import ALPHA, Comparison
from analysis.tables import Layout, LayoutRow, Metric, Table

CSV_FIELDS = ("sd_differences", "d_z", "g_z", "correlation", "seeds_needed", "wanted_delta", "seeds_needed_wanted")
_MOST_SEEDS = 9999  # more than these are no plan, only "too many"


def csv_values(layout: Layout, shown: Metric, result: Comparison) -> list[object]:
    """The values of `CSV_FIELDS` for one row and metric; differences in the unit of the CSV's other columns."""
    wanted = _wanted(layout, shown)
    return [
        number(result.sd_differences * shown.scale),
        *(number(value) for value in (result.d_z, result.g_z, result.correlation)),
        seeds_for(result, result.delta) or "",
        "" if wanted is None else number(wanted),
        "" if wanted is None else seeds_for(result, wanted / shown.scale) or "",
    ]


def seeds_for(result: Comparison, delta: float) -> int | None:
    """Seeds that show `delta`, in the metric's raw unit, where differences spread as those of this row do.

    None where the row has no spread (under 3 pairs, equal differences) or `delta` is 0.
    """
    return seeds_needed(result.sd_differences, delta) if result.sd_differences > 0 and delta else None


def precision_block(table: Table) -> list[str]:
    """Lines of Markdown; none where no row has enough pairs."""
    measured = list(_measured(table))
    if table.layout.is_split:
        measured.sort(key=lambda one: table.layout.metrics.index(one[1]))
    if not measured:
        return []
    several = sum(shown.tested for shown in table.layout.metrics) > 1
    wanted = table.layout.wanted_delta
    header = ["row", *["metric"] * several, "sd of differences", "effect size g_z", "correlation r", "seeds for this Δ"]
    rows = []
    for row, shown, result in measured:
        asked = _wanted(table.layout, shown)
        texts = [
            *[shown.label] * several,
            fixed(result.sd_differences * shown.scale, shown.digits),
            fixed(result.g_z, 2, sign=True),
            fixed(result.correlation, 2, sign=True),
            _seeds(seeds_for(result, result.delta)),
            *([] if wanted is None else [NONE if asked is None else _seeds(seeds_for(result, asked / shown.scale))]),
            str(result.pairs),
        ]
        rows.append((Cell(one_line(row.label)), *map(Cell, texts)))
    if wanted is not None:
        header.append(f"seeds for Δ = {wanted:g}")
    sheet = Sheet(columns((*header, "pairs"), left=1 + several), (("", tuple(rows)),))
    fewest = min(result.pairs for _, _, result in measured)
    least, most = deviation_factors(fewest)
    notes = (
        f"g_z: Δ over the sd of its paired differences (d_z), with Hedges' correction for few pairs; positive where the "
        f"row's value is the higher one. r: Pearson's correlation of row and reference over the seeds; the closer to "
        f"1, the more the pairing gains. Seeds for a Δ: pairs that a two-sided paired t test at {ALPHA:g}, before Holm's "
        f"adjustment, needs to find a true difference of that size with {100 * POWER:.0f} % power.",
        f"These are estimates: the true sd lies between {least:.2f} and {most:.2f} times one from {fewest} pairs (95 % "
        "interval), and the number of seeds goes with its square.",
    )
    return ["## Precision and power", "", *sheet.markdown(), "", *[f"- {escape_markdown(note)}" for note in notes], ""]


def _measured(table: Table) -> Iterator[tuple[LayoutRow, Metric, Comparison]]:
    """Compared rows whose differences have a spread, even if of zero."""
    for line in table.lines:
        for shown, result in zip(table.layout.metrics, line.comparisons, strict=True):
            if shown.tested and result.sd_differences >= 0:
                yield line.row, shown, result


def _wanted(layout: Layout, shown: Metric) -> float | None:
    """The Δ that the user asked for, which is one of the first tested metric."""
    return layout.wanted_delta if shown == next((one for one in layout.metrics if one.tested), None) else None


def _seeds(count: int | None) -> str:
    if count is None:
        return NONE
    return f">{_MOST_SEEDS:,}" if count > _MOST_SEEDS else f"{count:,}"
