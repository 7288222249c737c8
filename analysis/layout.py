"""What a table shows: rows in sections, marks of their configurations, metrics, and figures that others have reported."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from analysis.load import NAME
from basd.errors import UserError


@dataclass(frozen=True)
class Metric:
    """How one metric is shown. `percent`: logged as a share of 1, shown in percentage points."""

    name: str
    label: str
    percent: bool = False
    higher_is_better: bool = True
    digits: int = 4
    # whether rows are compared by tests; what an arm costs stands beside its ratio to the reference instead
    tested: bool = True

    @property
    def scale(self) -> float:
        """Factor from the logged unit to the shown one."""
        return 100.0 if self.percent else 1.0

    @property
    def heading(self) -> str:
        """Label with its unit."""
        return f"{self.label} (%)" if self.percent else self.label


_LAST = {
    "top1": ("top-1", True, True),
    "top5": ("top-5", True, True),
    "ece": ("ECE", True, False),
    "nll": ("NLL", False, False),
    "loss": ("loss", False, False),
    "ce": ("CE", False, False),
}


# what an arm costs, by whole name
_COSTS = {
    "time/step_milliseconds": Metric("time/step_milliseconds", "ms a step", False, False, 1, False),
    "time/images_per_second": Metric("time/images_per_second", "images/s", False, True, 1, False),
    "time/data_wait_share": Metric("time/data_wait_share", "data wait", True, False, 1, False),
    "system/peak_megabytes": Metric("system/peak_megabytes", "peak MB", False, False, 0, False),
    "cost/student_parameters": Metric("cost/student_parameters", "student parameters", False, False, 0, False),
    "cost/distillation_parameters": Metric("cost/distillation_parameters", "other parameters", False, False, 0, False),
}


def metric(name: str) -> Metric:
    """The usual way to show a metric of that name: accuracies and ECE in percent, losses and costs lower-is-better."""
    if name in _COSTS:
        return _COSTS[name]
    where, _, last = name.rpartition("/")
    label, percent, higher = _LAST.get(last, (last, False, True))
    return Metric(name, f"{where} {label}".strip(), percent, higher, 2 if percent else 4)


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
