"""What a table shows: rows in sections, marks of their configurations, metrics, and figures that others have reported."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from analysis.load import NAME
from analysis.metrics import Metric, metric
from basd.errors import UserError

# Metrics that a line has room for with their differences, p and verdicts.
MOST_TESTED = 2


@dataclass(frozen=True)
class LayoutRow:
    """A row of the table: its name in the runs, what is printed for it, and the section it stands in ("" for none).

    `marks`: what it shows in each of the layout's mark columns. `factors`: its level of each factor, where the table is a
    factorial and the row one of the combinations.
    """

    name: str
    label: str
    section: str = ""
    marks: tuple[str, ...] = ()
    factors: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reported:
    """Figures that others have reported: shown apart, with their source; in no mean, no test and no difference.

    `values`: by metric, as the source writes them and in the unit that is shown (accuracies in percent).
    """

    label: str
    source: str
    values: Mapping[str, str]
    section: str = ""


@dataclass(frozen=True)
class Layout:
    """What a table shows. `name` is its file name; `notes` are printed below the table as they are."""

    name: str
    title: str
    rows: tuple[LayoutRow, ...]
    reference: str
    metrics: tuple[Metric, ...] = (metric("test/top1"),)
    question: str = ""
    seeds: tuple[int, ...] = ()  # those planned; empty: every seed that the runs have
    notes: tuple[str, ...] = ()
    marks: tuple[str, ...] = ()  # titles of the columns that tell the rows' configurations
    reported: tuple[Reported, ...] = ()
    # where the runs come from; "" where nobody says
    setting: str = ""
    teacher: str = ""
    plan: str = ""
    # a Δ of the first tested metric, in the unit shown: the report says how many seeds would show it
    wanted_delta: float | None = None

    @property
    def is_split(self) -> bool:
        """Whether each metric's differences stand in a table of their own, since one line has no room for them all."""
        return sum(shown.tested for shown in self.metrics) > MOST_TESTED

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        if not NAME.fullmatch(self.name):
            raise UserError(f"A table cannot be named '{self.name}': use letters, digits, '_', '-' and '.'.")
        if len(set(names)) < len(names):
            raise UserError(f"Table '{self.name}' names a row twice: give every row its own name.")
        if self.reference not in names:
            raise UserError(
                f"The reference '{self.reference}' of table '{self.name}' is not one of its rows: {', '.join(names)}."
            )
        if not self.metrics:
            raise UserError(f"Table '{self.name}' has no metric: name at least one, such as test/top1.")
        for row in self.rows:
            if len(row.marks) != len(self.marks):
                raise UserError(
                    f"Row '{row.name}' of table '{self.name}' has {len(row.marks)} marks for {len(self.marks)} columns "
                    "of marks: give it one for each."
                )
        shown = [one.name for one in self.metrics]
        for figures in self.reported:
            for name in figures.values:
                if name not in shown:
                    near = difflib.get_close_matches(name, shown, n=3, cutoff=0.5) or shown
                    raise UserError(
                        f"'{figures.label}' reports '{name}', which table '{self.name}' does not show; "
                        f"it shows {', '.join(near)}."
                    )
