"""What the index knows of a report: NAME.json beside its files, so that the index is made without any run.

{"kind": "table", "name": …, "setting": …, "question": …, "facts": {"n": "5", …}, "files": […], "figures": […]}
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis import statistics
from analysis.escape import one_line
from analysis.files import write_texts
from analysis.load import NAME, count

if TYPE_CHECKING:
    from analysis.tables import Line, Table

TABLE, SWEEP = "table", "sweep"


@dataclass(frozen=True)
class Entry:
    """One report as the index shows it. `facts`: what to say of it, in this order; `problem`: why it is not up to date."""

    kind: str
    name: str
    setting: str
    question: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    problem: str = ""

    def to_json(self) -> str:
        """The text of NAME.json."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def table_entry(table: Table, figures: Sequence[str]) -> Entry:
    """Reference, best row, n and verdicts of a table's first metric, and where its numbers come from."""
    layout, shown, base = table.layout, table.layout.metrics[0], table.reference
    facts = {shown.heading: f"{_told(table, base)} (the reference)"}
    # means over other seeds than the reference's would be another contest
    rivals = [
        line for line in table.lines if line.comparisons[0].n and line.comparisons[0].seeds == base.comparisons[0].seeds
    ]
    if rivals:
        sign = -1 if shown.higher_is_better is False else 1
        best = max(rivals, key=lambda line: sign * line.comparisons[0].mean)
        which = "the reference" if best is base else _told(table, best)
        facts["lowest mean" if shown.higher_is_better is False else "highest mean"] = which
    sizes = sorted({line.comparisons[0].n for line in table.lines})
    facts["n"] = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    if shown.tested:
        facts["verdicts"] = verdicts(table)
    facts |= {"code": ", ".join(table.versions)} | ({"plan": layout.plan} if layout.plan else {})
    files = tuple(f"{layout.name}{ending}" for ending in (".html", ".md", ".tex", ".csv", ".runs.csv"))
    return Entry(TABLE, layout.name, layout.setting, one_line(layout.question), facts, files, tuple(figures))


def _told(table: Table, line: Line) -> str:
    """A row with its mean, as in the table."""
    label, value = table.cells(line)[0].text, table.cells(line)[1 + len(table.layout.marks)].text
    return f"{label} {value}"


def verdicts(table: Table) -> str:
    """How many rows got each verdict in the first metric, such as "2 worse, 1 no difference shown"."""
    order = (statistics.BETTER, statistics.WORSE, statistics.NO_DIFFERENCE, statistics.TOO_SMALL, statistics.SAME_RUNS)
    given = Counter(line.comparisons[0].verdict for line in table.lines if line.comparisons[0].pairs)
    return ", ".join(f"{given[verdict]} {verdict}" for verdict in order if given[verdict]) or "none"


def read_entries(reports: Path) -> list[Entry]:
    """Every report that lies in a folder, by setting, tables before sweeps; files that are none are passed over."""
    entries = []
    for path in sorted(reports.glob("*/*.json")):
        entry = read_entry(path)
        if entry is not None:
            files = tuple(file for file in entry.files if (path.parent / file).is_file())
            figures = tuple(figure for figure in entry.figures if (path.parent / figure).is_file())
            # the folder says where a report lies, whoever has moved it
            entries.append(replace(entry, setting=path.parent.name, files=files, figures=figures))
    return sorted(entries, key=lambda entry: (entry.setting, entry.kind != TABLE, entry.name))


def read_entry(path: Path) -> Entry | None:
    """The entry in a file; None where it holds something else."""
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        entry = Entry(**{**values, "files": tuple(values["files"]), "figures": tuple(values["figures"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None
    words = [entry.kind, entry.name, entry.question, entry.problem, *entry.files, *entry.figures]
    names = [entry.name, *entry.files, *entry.figures]
    if not isinstance(entry.facts, dict) or not all(isinstance(word, str) for word in [*words, *entry.facts.values()]):
        return None
    return entry if entry.kind in (TABLE, SWEEP) and all(NAME.fullmatch(name) for name in names) else None


def record_problem(reports: Path, kind: str, name: str, setting: str, question: str, problem: str) -> None:
    """Keep why a report could not be written, beside what an earlier one has left."""
    path = reports / setting / f"{name}.json"
    entry = read_entry(path) or Entry(kind, name, setting, question)
    write_texts(path.parent, {path.name: replace(entry, problem=one_line(problem)).to_json()})


def counted(entries: Sequence[Entry]) -> str:
    """As in "3 tables, 1 sweep"."""
    kinds = Counter(entry.kind for entry in entries)
    return ", ".join(count(kinds[kind], kind) for kind in (TABLE, SWEEP) if kinds[kind])
