"""Arms frames and layouts made by hand, as fixtures that are functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import pytest

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


def make_layout(rows: Sequence[str], **changes: object) -> Layout:
    fields: dict[str, object] = {
        "name": "losses",
        "title": "Losses",
        "rows": tuple(LayoutRow(row, row) for row in rows),
        "reference": rows[0],
    }
    return Layout(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def frame_of() -> Callable[..., pd.DataFrame]:
    return make_frame


@pytest.fixture
def layout_of() -> Callable[..., Layout]:
    return make_layout
