"""Factorials: what each factor of a table does, alone, in company, and together with others, paired by seed.

Every effect is a contrast: a weighted sum of the combinations' values with weights that sum to 0, computed for each seed
that has all combinations of nonzero weight. Over these per-seed values go the same paired-t interval, p and thresholds as
for the rows of a table (`analysis.statistics`), so that seed effects common to the combinations cancel. With ȳ a mean
over all combinations of the factors that are not named, and a switch a factor with the levels on and off:

* main effect of a level: ȳ(level) − ȳ(base); base is off of a switch, else the reference row's level;
* interaction of two levels: what the second changes in the effect of the first,
  [ȳ(a, b) − ȳ(a₀, b)] − [ȳ(a, b₀) − ȳ(a₀, b₀)]; of m, the m-fold difference of that kind. These are the coefficients of
  least squares with factors coded ±½ (2 levels) or by simple contrasts (more); Box, Hunter & Hunter (2005), Statistics for
  Experimenters, chapter 5, define interactions of m as this over 2^(m−1);
* alone − none: a switch on, all others off, less none on; all − without it: all on, less all but this one;
* Shapley value of switch i: Σ_S |S|! (k − 1 − |S|)! / k! [y(S ∪ i) − y(S)] over all sets S of the other k − 1 switches
  (Shapley 1953, A value for n-person games); the values of all switches sum to all − none.

The last two kinds are for two switches and more, and average over the levels of factors that are none. p is Holm-adjusted within a kind of effect.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from analysis import statistics
from analysis.statistics import BETTER, DIFFERS, WORSE

if TYPE_CHECKING:
    import pandas as pd

ON, OFF = "on", "off"
ALONE, WITHOUT, MAIN, SHAPLEY = "alone − none", "all − without it", "main effect", "Shapley value"
ALL, INTERACTION = "all − none", "interaction"
BETTER_TOGETHER, WORSE_TOGETHER = "better together", "worse together"

Combination = tuple[str, ...]
Contrast = dict[Combination, float]


@dataclass(frozen=True)
class Design:
    """Which row is which combination. Levels in their order; `base`: the level that others are compared with."""

    levels: Mapping[str, tuple[str, ...]]
    base: Mapping[str, str]
    rows: Mapping[Combination, str]

    @property
    def switches(self) -> list[str]:
        """Factors with the levels on and off."""
        return [factor for factor, levels in self.levels.items() if set(levels) == {ON, OFF}]

    @property
    def combinations(self) -> list[Combination]:
        """All of them, whether there is a row or not."""
        return list(itertools.product(*self.levels.values()))

    def word(self, factor: str, level: str) -> str:
        """How the effect of a level is called: a switch by its name, others by level and base."""
        return factor if factor in self.switches else f"{factor}: {level} − {self.base[factor]}"

    def label(self, combination: Combination) -> str:
        """A combination in words."""
        switches = self.switches
        pairs = list(zip(self.levels, combination, strict=True))
        on = [factor for factor, level in pairs if factor in switches and level == ON]
        others = [f"{factor}={level}" for factor, level in pairs if factor not in switches]
        return "+".join([*on, *others]) or "none"


@dataclass(frozen=True)
class Effect:
    """One effect in one metric, in the metric's raw units. NaN stands for what cannot be said."""

    kind: str
    levels: tuple[tuple[str, str], ...]  # the factors it is about, each with the level that is compared with its base
    name: str
    seeds: tuple[int, ...] = ()  # those that have every combination that the effect needs
    delta: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    p_holm: float = math.nan
    p_sign_flip: float = math.nan
    verdict: str = ""

    @property
    def factors(self) -> tuple[str, ...]:
        return tuple(factor for factor, _ in self.levels)

    @property
    def n(self) -> int:
        """How many seeds make the effect."""
        return len(self.seeds)

    @property
    def significant(self) -> bool:
        """True when the verdict says that there is something."""
        return self.verdict in (BETTER, WORSE, DIFFERS, BETTER_TOGETHER, WORSE_TOGETHER)


@dataclass(frozen=True)
class Factorial:
    """The effects of a factorial in one metric."""

    metric: str
    design: Design
    seeds: tuple[int, ...]
    values: Mapping[Combination, Mapping[int, float]]  # of finished arms with a finite value
    effects: tuple[Effect, ...]

    @property
    def complete_seeds(self) -> tuple[int, ...]:
        """Seeds that have every combination."""
        return tuple(s for s in self.seeds if all(s in self.values.get(c, {}) for c in self.design.combinations))

    @property
    def gaps(self) -> dict[Combination, tuple[int, ...]]:
        """Combinations that lack a value, with the seeds that lack it."""
        lacking = {c: tuple(s for s in self.seeds if s not in self.values.get(c, {})) for c in self.design.combinations}
        return {combination: seeds for combination, seeds in lacking.items() if seeds}

    def of(self, kind: str, *factors: str) -> list[Effect]:
        """The effects of a kind, all or those of exactly these factors."""
        return [e for e in self.effects if e.kind == kind and (not factors or set(e.factors) == set(factors))]

    def marginal(self, levels: Mapping[str, str]) -> float:
        """Mean over the complete seeds and all combinations with these levels; NaN without a complete seed."""
        fitting = [
            combination
            for combination in self.design.combinations
            if all(dict(zip(self.design.levels, combination, strict=True))[f] == lv for f, lv in levels.items())
        ]
        return statistics.mean([self.values[c][seed] for c in fitting for seed in self.complete_seeds])


def design_of(factors: Mapping[str, Mapping[str, str]], reference: str = "") -> Design | None:
    """The design of a table from its rows' levels, row -> factor -> level; rows without factors stand beside it.

    Levels that are all numbers are put in their order, others stay in that of the rows. None with fewer than two factors.
    ValueError: rows that name different factors, or two rows of one combination.
    """
    combined = {row: dict(levels) for row, levels in factors.items() if levels}
    names = list(next(iter(combined.values()), {}))
    if len(names) < 2:
        return None
    levels, base = {}, {}
    for factor in names:
        if any(set(own) != set(names) for own in combined.values()):
            raise ValueError(f"every combination must name a level of each of {', '.join(names)}")
        levels[factor] = _ordered(dict.fromkeys(own[factor] for own in combined.values()))
        base[factor] = combined.get(reference, {}).get(factor, levels[factor][0])
        if set(levels[factor]) == {ON, OFF}:
            base[factor] = OFF
    rows: dict[Combination, str] = {}
    for row, own in combined.items():
        combination = tuple(own[factor] for factor in names)
        if combination in rows:
            raise ValueError(f"the rows {rows[combination]} and {row} are the same combination of factors")
        rows[combination] = row
    return Design(levels, base, rows)


def _ordered(levels: Collection[str]) -> tuple[str, ...]:
    # a switch has both levels, also where rows=[…] has left only one
    if set(levels) <= {ON, OFF}:
        return (OFF, ON)
    try:
        return tuple(sorted(levels, key=float))
    except ValueError:
        return tuple(levels)


def analyse(
    values: Mapping[str, Mapping[int, float]],
    design: Design,
    *,
    metric: str = "",
    seeds: Collection[int] | None = None,
    higher_is_better: bool | None = True,
    order: int = 2,
) -> Factorial:
    """All effects of a factorial from row -> seed -> value, with interactions of up to `order` factors.

    `seeds`: those that were planned (default: every seed that one of the combinations has). A value that is missing or not
    finite takes its seed out of the effects that need it, and out of no other.
    """
    usable = {
        combination: {seed: v for seed, v in values.get(row, {}).items() if statistics.usable(v)}
        for combination, row in design.rows.items()
    }
    expected = sorted(set(seeds) if seeds is not None else {seed for by_seed in usable.values() for seed in by_seed})
    effects: list[Effect] = []
    for family in _families(design, order):
        found = [_measured(effect, contrast, usable, expected) for effect, contrast in family]
        adjusted = statistics.holm([effect.p for effect in found])
        for effect, p_holm in zip(found, adjusted, strict=True):
            effects.append(replace(effect, p_holm=p_holm, verdict=_verdict(effect, p_holm, higher_is_better)))
    return Factorial(metric, design, tuple(expected), usable, tuple(effects))


def factorial(
    frame: pd.DataFrame,
    metric: str,
    design: Design,
    *,
    seeds: Collection[int] | None = None,
    higher_is_better: bool | None = True,
    order: int = 2,
) -> Factorial:
    """`analyse` on an arms frame (`analysis.load`); only finished arms count. Errors as of `analysis.compare`."""
    # all rows of the frame: where only those beside the design have finished, its combinations are gaps
    values, _ = statistics.finished_values(frame, metric, list(dict.fromkeys(frame["row"])))
    return analyse(values, design, metric=metric, seeds=seeds, higher_is_better=higher_is_better, order=order)


def _measured(
    effect: Effect, contrast: Contrast, values: Mapping[Combination, Mapping[int, float]], seeds: Sequence[int]
) -> Effect:
    complete = tuple(seed for seed in seeds if all(seed in values.get(c, {}) for c in contrast))
    if not complete:
        return effect
    # the two sides of the contrast are a pair of samples, whose magnitude tells rounding from differences
    above, below = (
        [math.fsum(sign * w * values[c][seed] for c, w in contrast.items() if sign * w > 0) for seed in complete]
        for sign in (1, -1)
    )
    pair = statistics.paired(above, below)
    return replace(
        effect,
        seeds=complete,
        delta=pair.delta,
        low=pair.low,
        high=pair.high,
        p=pair.p,
        p_sign_flip=pair.p_sign_flip,
    )


def _verdict(effect: Effect, p_holm: float, higher_is_better: bool | None) -> str:
    if not effect.n:
        return ""
    said = statistics.verdict(effect.delta, effect.n, p_holm, higher_is_better)
    if effect.kind != INTERACTION:
        return said
    return {BETTER: BETTER_TOGETHER, WORSE: WORSE_TOGETHER}.get(said, said)


def _families(design: Design, order: int) -> Iterator[list[tuple[Effect, Contrast]]]:
    """Effects with their contrasts; those that are adjusted together, together."""
    switches = design.switches
    # of a single switch all of these are its main effect
    if len(switches) > 1:
        for kind, weight in (
            (ALONE, lambda size: float(size == 0)),
            (WITHOUT, lambda size: float(size == len(switches) - 1)),
            (SHAPLEY, lambda size: shapley_weight(size, len(switches))),
        ):
            yield [
                (
                    Effect(kind, ((switch, ON),), switch),
                    _joining(design, switch, [weight(s) for s in range(len(switches))]),
                )
                for switch in switches
            ]
        yield [(Effect(ALL, tuple((switch, ON) for switch in switches), ALL), _all_or_none(design))]
    for many in range(1, min(order, len(design.levels)) + 1):
        family = []
        for chosen in itertools.combinations(design.levels, many):
            others = [[level for level in design.levels[f] if level != design.base[f]] for f in chosen]
            for levels in itertools.product(*others):
                pairs = tuple(zip(chosen, levels, strict=True))
                name = " × ".join(design.word(*pair) for pair in pairs)
                kind = MAIN if many == 1 else INTERACTION
                family.append((Effect(kind, pairs, name), _difference(design, dict(pairs))))
        yield family


def shapley_weight(size: int, players: int) -> float:
    """The share of the orders of `players` in which a given player comes after a given set of `size` others."""
    return math.factorial(size) * math.factorial(players - 1 - size) / math.factorial(players)


def _difference(design: Design, chosen: Mapping[str, str]) -> Contrast:
    """Level minus base in each chosen factor, mean over the levels of the others."""
    contrast: Contrast = {}
    for combination in design.combinations:
        weight = 1.0
        for factor, level in zip(design.levels, combination, strict=True):
            if factor not in chosen:
                weight /= len(design.levels[factor])
            elif level == design.base[factor]:
                weight = -weight
            elif level != chosen[factor]:
                weight = 0.0
        if weight:
            contrast[combination] = weight
    return contrast


def _joining(design: Design, switch: str, weights: Sequence[float]) -> Contrast:
    """What `switch` changes when it joins sets of others, each set weighted by its size; mean over factors beside."""
    contrast: Contrast = {}
    for combination in design.combinations:
        state = dict(zip(design.levels, combination, strict=True))
        size = sum(state[other] == ON for other in design.switches if other != switch)
        if weights[size]:
            contrast[combination] = (1 if state[switch] == ON else -1) * weights[size] / _beside(design)
    return contrast


def _all_or_none(design: Design) -> Contrast:
    contrast: Contrast = {}
    for combination in design.combinations:
        state = dict(zip(design.levels, combination, strict=True))
        on = {state[switch] for switch in design.switches}
        if len(on) == 1:
            contrast[combination] = (1 if on == {ON} else -1) / _beside(design)
    return contrast


def _beside(design: Design) -> int:
    """How many combinations of the factors that are not switches there are."""
    return math.prod(len(levels) for factor, levels in design.levels.items() if factor not in design.switches)
