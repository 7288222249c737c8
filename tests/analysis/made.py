"""Arms frames and layouts made by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis import Layout, LayoutRow


def make_frame(
    values: Mapping[str, Mapping[int, float]],
    *,
    metric: str = "test/top1",
    version: str = "abc1234",
    unfinished: Mapping[tuple[str, int], str] | None = None,
) -> pd.DataFrame:
    """Row -> seed -> value of finished arms, and (row, seed) -> status of others."""
    cells = [(row, seed, value, "FINISHED") for row, seeds in values.items() for seed, value in seeds.items()]
    cells += [(row, seed, math.nan, status) for (row, seed), status in (unfinished or {}).items()]
    return pd.DataFrame(
        [
            {
                "row": row,
                "seed": seed,
                "run_id": f"run-{row}-{seed}",
                "arm_key": f"arm-{row}-{seed}",
                "configuration_key": f"configuration-{row}",
                "version": version,
                "status": status,
                metric: value,
            }
            for row, seed, value, status in cells
        ]
    )


def make_layout(rows: Sequence[str | LayoutRow], **changes: Any) -> Layout:
    """Rows, the first of them the reference; a name stands for a row that is labelled by it."""
    made = tuple(row if isinstance(row, LayoutRow) else LayoutRow(row, row) for row in rows)
    return Layout(**{"name": "losses", "title": "Losses", "rows": made, "reference": made[0].name} | changes)
