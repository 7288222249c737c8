"""The effects of a factorial table as Markdown, LaTeX, CSV and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis import statistics
from analysis.escape import escape_markdown, one_line
from analysis.factorial import (
    ALL,
    ALONE,
    INTERACTION,
    MAIN,
    SHAPLEY,
    WITHOUT,
    Design,
    Effect,
    Factorial,
    design_of,
    factorial,
)
from analysis.sheets import NONE, Cell, Sheet, columns, csv_text, fixed, number, p_text
from analysis.tables import Layout, Metric

if TYPE_CHECKING:
    import pandas as pd
    import rich.table

OF_A_SWITCH = (ALONE, WITHOUT, MAIN, SHAPLEY)  # in the order in which they are shown
_IN_CSV = {
    ALONE: "alone",
    WITHOUT: "leave_one_out",
    MAIN: "main",
    SHAPLEY: "shapley",
    ALL: "all",
    INTERACTION: "interaction",
}
_NAMED = 3  # combinations that a sentence names before it counts


@dataclass(frozen=True)
class FactorialReport:
    """A factorial in each tested metric of a table; `build_factorial` makes it."""

    layout: Layout
    metrics: tuple[Metric, ...]
    factorials: tuple[Factorial, ...]

    @property
    def name(self) -> str:
        """File name without suffix."""
        return f"{self.layout.name}.factorial"

    def to_markdown(self, pictures: Sequence[str] = ()) -> str:
        """A page of Markdown: title, question, and for each metric the effects and what to know of them."""
        lines = [f"# {escape_markdown(self.layout.title)}: effects of the factors", ""]
        if self.layout.question:
            lines += [escape_markdown(self.layout.question), ""]
        for shown, found in zip(self.metrics, self.factorials, strict=True):
            if len(self.metrics) > 1:
                lines += [f"## {escape_markdown(shown.label)}", ""]
            lines += [*sheet(shown, found).markdown(), ""]
            lines += [f"- {escape_markdown(note)}" for note in self._notes(shown, found)] + [""]
        lines += [f"![{name}]({name})" for name in pictures]
        return "\n".join(lines).rstrip() + "\n"

    def to_latex(self) -> str:
        """A `table` environment for each metric."""
        tables = []
        for place, (shown, found) in enumerate(zip(self.metrics, self.factorials, strict=True)):
            caption = f"{one_line(self.layout.title)}: effects of the factors on {shown.label}."
            label = self.name if len(self.metrics) == 1 else f"{self.name}-{place + 1}"
            tables.append(sheet(shown, found).latex(caption, label, self._notes(shown, found)))
        return "\n".join(tables)

    def to_csv(self) -> str:
        """One line per metric and effect, in full precision; `unit` says whether values are percentage points."""
        fields = ("delta", "low", "high", "p", "p_holm", "p_sign_flip", "verdict", "seeds")
        lines: list[list[object]] = [["metric", "unit", "kind", "effect", "levels", "n", *fields]]
        for shown, found in zip(self.metrics, self.factorials, strict=True):
            for effect in found.effects:
                scaled = [number(value * shown.scale) for value in (effect.delta, effect.low, effect.high)]
                chances = [number(value) for value in (effect.p, effect.p_holm, effect.p_sign_flip)]
                levels = " ".join(f"{factor}={level}" for factor, level in effect.levels)
                start = [
                    shown.name,
                    "points" if shown.percent else "",
                    _IN_CSV[effect.kind],
                    effect.name,
                    levels,
                    effect.n,
                ]
                lines.append([*start, *scaled, *chances, effect.verdict, " ".join(map(str, effect.seeds))])
        return csv_text(lines)

    def to_rich(self) -> list[rich.table.Table]:
        """For a terminal: of each metric one short table without interactions; none of a metric without any effect."""
        return [
            short_sheet(shown, found).rich(f"Effects of the factors on {_titled(shown)}", self._caption(found))
            for shown, found in zip(self.metrics, self.factorials, strict=True)
            if _says_something(found)
        ]

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence for each metric in which no factor has an effect to show."""
        return tuple(
            f"No effects of the factors on {shown.label}. {gap_sentence(found)}"
            for shown, found in zip(self.metrics, self.factorials, strict=True)
            if not _says_something(found)
        )

    def _caption(self, found: Factorial) -> str:
        lacking = f"{gap_sentence(found)}\n" if found.gaps else ""
        return f"{lacking}Intervals: paired-t 95 % over n seeds. Interactions, p and verdicts: {self.name}.md."

    def _notes(self, shown: Metric, found: Factorial) -> list[str]:
        return [
            *([gap_sentence(found)] if found.gaps else []),
            *_definitions(found),
            *_test_notes(shown, found),
            *(one_line(note) for note in self.layout.notes),
            f"Means of the combinations, runs and code version: {self.layout.name}.md, {self.layout.name}.runs.csv.",
        ]


def build_factorial(frame: pd.DataFrame, layout: Layout, *, order: int = 2) -> FactorialReport | None:
    """The effects of a table whose rows have factors, with interactions of up to `order` factors; None for other tables.

    Like the table it takes the layout's seeds only. Errors as of `build_table`, which also refuses mixed code versions.
    """
    design = design_of({row.name: row.factors for row in layout.rows}, layout.reference)
    metrics = tuple(shown for shown in layout.metrics if shown.tested)
    if design is None or not metrics:
        return None
    part = frame[frame["row"].isin([row.name for row in layout.rows])]
    seeds = tuple(sorted(set(layout.seeds) or {int(seed) for seed in part["seed"]}))
    part = part[part["seed"].isin(seeds)]
    found = tuple(
        factorial(part, shown.name, design, seeds=seeds, higher_is_better=shown.higher_is_better, order=order)
        for shown in metrics
    )
    return FactorialReport(layout, metrics, found)


def sheet(shown: Metric, found: Factorial) -> Sheet:
    """Every effect on its line, those of one factor together, then the interactions."""
    sections = []
    for factor in found.design.levels:
        if factor in found.design.switches:
            effects = [effect for kind in OF_A_SWITCH for effect in found.of(kind, factor)]
            sections.append((factor, tuple(_line(shown, effect, effect.kind) for effect in effects)))
        else:
            lines = tuple(
                _line(shown, effect, f"main effect, {_change(effect, found.design)}")
                for effect in found.of(MAIN, factor)
            )
            sections.append((factor, lines))
    together = tuple(_line(shown, effect, effect.name) for effect in found.of(ALL))
    sections.append(("all switches", together))
    many = sorted({len(effect.levels) for effect in found.of(INTERACTION)})
    for number_of in many:
        effects = [effect for effect in found.of(INTERACTION) if len(effect.levels) == number_of]
        title = "interactions" if len(many) == 1 else f"interactions of {number_of}"
        sections.append((title, tuple(_line(shown, effect, effect.name) for effect in effects)))
    header = ("effect", f"{_titled(shown)} [95 % interval]", "p (Holm)", "verdict", "n")
    return Sheet(columns(header), tuple((title, lines) for title, lines in sections if lines))


def short_sheet(shown: Metric, found: Factorial) -> Sheet:
    """A line for each factor: its effects beside each other."""
    kinds = [kind for kind in OF_A_SWITCH if found.of(kind)]
    lines = []
    for factor in found.design.levels:
        if factor in found.design.switches:
            lines.append(_short_line(shown, factor, [found.of(kind, factor)[0] for kind in kinds]))
        else:
            for effect in found.of(MAIN, factor):
                lines.append(_short_line(shown, effect.name, [effect if kind == MAIN else None for kind in kinds]))
    return Sheet(columns(("factor", *kinds, "n")), (("", tuple(lines)),))


def _short_line(shown: Metric, name: str, effects: Sequence[Effect | None]) -> tuple[Cell, ...]:
    counts = [str(effect.n) for effect in effects if effect is not None]
    cells = [Cell(NONE) if effect is None else _value(shown, effect) for effect in effects]
    return (Cell(name), *cells, Cell(counts[0] if len(set(counts)) == 1 else ", ".join(counts)))


def _line(shown: Metric, effect: Effect, name: str) -> tuple[Cell, ...]:
    p = NONE if math.isnan(effect.p_holm) else p_text(effect.p_holm)
    return (Cell(name), _value(shown, effect), Cell(p), Cell(effect.verdict or NONE), Cell(str(effect.n)))


def _value(shown: Metric, effect: Effect) -> Cell:
    return Cell(value_text(shown, effect), bold=effect.significant)


def value_text(shown: Metric, effect: Effect) -> str:
    """An effect with its interval, in the unit shown."""
    delta, low, high = (
        fixed(value * shown.scale, shown.digits, sign=True) for value in (effect.delta, effect.low, effect.high)
    )
    return delta if math.isnan(effect.low) else f"{delta} [{low}, {high}]"


def _titled(shown: Metric) -> str:
    return f"{shown.label} (points)" if shown.percent else shown.label


def _change(effect: Effect, design: Design) -> str:
    ((factor, level),) = effect.levels
    return f"{level} − {design.base[factor]}"


def _says_something(found: Factorial) -> bool:
    return any(effect.n for kind in OF_A_SWITCH for effect in found.of(kind))


def gap_sentence(found: Factorial) -> str:
    """Which combinations lack a value, and what follows."""
    gaps, total = found.gaps, len(found.design.combinations)
    named = [f"{found.design.label(c)} (seed {', '.join(map(str, seeds))})" for c, seeds in gaps.items()]
    listed = "; ".join([*named[:_NAMED], *[f"{len(named) - _NAMED} more"] * (len(named) > _NAMED)])
    complete = found.complete_seeds
    left = (
        f"effects that need all combinations are of seed {', '.join(map(str, complete))}"
        if complete
        else "no seed has all of them, and effects that need all are not shown"
    )
    return f"Without a finite value: {len(gaps)} of the {total} combinations, {listed}; {left}."


def _definitions(found: Factorial) -> list[str]:
    design, notes = found.design, []
    switches = design.switches
    beside = len(switches) < len(design.levels)
    if len(switches) > 1:
        mean = ", mean over the levels of the other factors" if beside else ""
        notes.append(
            f"{ALONE}: the switch on and the others off, less none on{mean}; {WITHOUT}: all on, less all but this one{mean}; "
            f"{SHAPLEY}: what the switch adds to a set of others, mean over all orders of switching on{mean}; the values of "
            f"all switches sum to {ALL}."
        )
    bases = [f"{design.base[factor]} for {factor}" for factor in design.levels if factor not in switches]
    against = f"off for a switch{''.join(f', {base}' for base in bases)}" if switches else ", ".join(bases)
    notes.append(
        f"{MAIN}: mean over all combinations of the other factors, less that of the base ({against}); a × b: the effect of a "
        "beside b, less that beside b's base, mean over the other factors."
    )
    return [note[0].upper() + note[1:] for note in notes]


def _test_notes(shown: Metric, found: Factorial) -> list[str]:
    most = max((effect.n for effect in found.effects), default=0)
    if most >= statistics.INTERVAL_FROM:
        notes = [
            "Every effect is computed for each seed; shown are the mean over n seeds, its paired-t 95 % interval, not adjusted "
            "for the number of effects, and the two-sided p of that t test, Holm-adjusted within a kind of effect."
        ]
    else:
        notes = [
            "Every effect is computed for each seed; shown is the mean over n seeds, "
            f"under {statistics.INTERVAL_FROM} seeds without interval and p."
        ]
    if any(effect.verdict == statistics.TOO_SMALL for effect in found.effects):
        notes.append(f"n too small: no verdict under {statistics.VERDICT_FROM} seeds.")
    if any(effect.significant for effect in found.effects):
        notes.append(f"Bold: adjusted p below {statistics.ALPHA:g}.")
    if any(effect.verdict == statistics.DIFFERS for effect in found.effects):
        notes.append("Differs: significant, in a metric of which neither direction is better.")
    if any(effect.low == effect.high for effect in found.effects):
        notes.append("Interval of zero width: the effect is equal in all seeds; p is then the exact sign-flip p.")
    if shown.higher_is_better is False:
        notes.append(f"Lower is better: {shown.label}.")
    return notes
