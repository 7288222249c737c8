"""Rows of an ablation compared with its reference, paired by seed.

What is reported, and from how many pairs on (fewer give NaN, never a guess):

* Δ, the mean of the paired differences: 1 pair;
* the paired-t 95 % interval and two-sided p: 3 pairs;
* the Holm-adjusted p over all compared rows that have a p;
* a verdict from the adjusted p at 0.05: 5 pairs, below that "n too small";
* the exact sign-flip p: 6 pairs (with n pairs it cannot be below 2 / 2**n).

Differences that are all equal (up to rounding) leave the t test undefined: its p would be 0 out of a variance that
happened to be 0. The interval then has width zero, and p is the exact sign-flip p instead (2 / 2**n, or 1 if all
differences are 0).

A row whose paired arms are the reference's own runs (folded configurations) is no comparison: verdict "same runs",
no p.

Seeds without a finite value are left out of mean and pairs and listed in `Comparison.nonfinite`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from basd.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

CONFIDENCE = 0.95
ALPHA = 0.05
INTERVAL_FROM = 3
VERDICT_FROM = 5
SIGN_FLIP_FROM = 6
_SIGN_FLIP_TO = 20  # 2**20 sums; far above, the t test is trusted alone
_ROUNDING = 1e-12  # relative to the values: differences below are float noise
_LARGEST = 1e100  # a metric beyond has no square; it is treated like an infinity

BETTER, WORSE, NO_DIFFERENCE = "better", "worse", "no difference shown"
DIFFERS = "differs"  # where neither direction is the better one
TOO_SMALL, SAME_RUNS, REFERENCE = "n too small", "same runs", "reference"


@dataclass(frozen=True)
class Comparison:
    """One row in one metric, in the metric's raw units. NaN stands for what cannot be said."""

    row: str
    metric: str
    seeds: tuple[int, ...]  # with a finite value; these make mean and sd
    nonfinite: tuple[int, ...]  # finished, but the value is missing, NaN or infinite
    missing: tuple[int, ...]  # no finished run
    mean: float = math.nan
    sd: float = math.nan  # sample standard deviation over the seeds
    paired_seeds: tuple[int, ...] = ()
    delta: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    p_holm: float = math.nan
    p_sign_flip: float = math.nan
    verdict: str = ""

    @property
    def n(self) -> int:
        """How many seeds make the mean."""
        return len(self.seeds)

    @property
    def pairs(self) -> int:
        """How many seeds make the difference."""
        return len(self.paired_seeds)

    @property
    def significant(self) -> bool:
        """True when the verdict says better, worse or differs."""
        return self.verdict in (BETTER, WORSE, DIFFERS)


@dataclass(frozen=True)
class Paired:
    """The paired comparison of two equally long samples."""

    delta: float
    low: float
    high: float
    p: float
    p_sign_flip: float


def mean(values: Sequence[float]) -> float:
    """Exactly rounded sum over n, so that no order of the runs changes a digit; NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan


def standard_deviation(values: Sequence[float]) -> float:
    """Sample standard deviation (n - 1); NaN below two values."""
    if len(values) < 2:
        return math.nan
    middle = mean(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1))


def paired(values: Sequence[float], reference: Sequence[float]) -> Paired:
    """Compare `values` with `reference`, pair by pair; the module's text has the thresholds and equal differences."""
    assert len(values) == len(reference)
    differences = [value - other for value, other in zip(values, reference, strict=True)]
    n, delta = len(differences), mean(differences)
    noise = _ROUNDING * max((abs(value) for value in (*values, *reference)), default=0.0)
    flip = sign_flip(differences, noise)
    shown_flip = flip if n >= SIGN_FLIP_FROM else math.nan
    if n < INTERVAL_FROM:
        return Paired(delta, math.nan, math.nan, math.nan, shown_flip)
    if max(differences) - min(differences) <= noise:
        return Paired(delta, delta, delta, flip, shown_flip)
    from scipy import stats

    test = stats.ttest_rel(values, reference)
    interval = test.confidence_interval(CONFIDENCE)
    return Paired(delta, float(interval.low), float(interval.high), float(test.pvalue), shown_flip)


def sign_flip(differences: Sequence[float], noise: float = 0.0) -> float:
    """Exact two-sided p: the share of all 2**n choices of signs whose sum is at least as far from 0 as the one seen.

    Sums that differ by no more than n times `noise` count as equal. NaN without differences or above 20 of them.
    """
    n = len(differences)
    if not 0 < n <= _SIGN_FLIP_TO:
        return math.nan
    import numpy as np

    sums = np.zeros(1)
    for difference in differences:
        sums = np.concatenate([sums + difference, sums - difference])
    return float(np.mean(np.abs(sums) >= abs(math.fsum(differences)) - n * noise - 1e-15 * np.abs(sums).max()))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given. NaN stays NaN and does not count as a test."""
    order = sorted((index for index, value in enumerate(p) if not math.isnan(value)), key=lambda index: p[index])
    adjusted, running = [math.nan] * len(p), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p[index]))
        adjusted[index] = running
    return adjusted


def usable(value: float) -> bool:
    """Whether a metric's value can enter a mean."""
    return math.isfinite(value) and abs(value) < _LARGEST


def compare_values(
    values: Mapping[str, Mapping[int, float]],
    *,
    reference: str,
    metric: str = "",
    seeds: Collection[int] | None = None,
    higher_is_better: bool | None = True,
    same_runs: Collection[str] = (),
) -> dict[str, Comparison]:
    """`compare` on plain numbers: row -> seed -> value of a finished run (NaN if it has none)."""
    expected = sorted(set(seeds) if seeds is not None else {seed for row in values.values() for seed in row})
    base = {seed: value for seed, value in values.get(reference, {}).items() if usable(value)}
    results: dict[str, Comparison] = {}
    for row, by_seed in values.items():
        finite = [seed for seed in expected if seed in by_seed and usable(by_seed[seed])]
        numbers = [by_seed[seed] for seed in finite]
        result = Comparison(
            row=row,
            metric=metric,
            seeds=tuple(finite),
            nonfinite=tuple(seed for seed in expected if seed in by_seed and not usable(by_seed[seed])),
            missing=tuple(seed for seed in expected if seed not in by_seed),
            mean=mean(numbers),
            sd=standard_deviation(numbers),
            verdict=REFERENCE if row == reference else "",
        )
        common = tuple(seed for seed in finite if seed in base)
        if row != reference and common:
            if row in same_runs:
                result = replace(result, paired_seeds=common, delta=0.0, verdict=SAME_RUNS)
            else:
                pair = paired([by_seed[seed] for seed in common], [base[seed] for seed in common])
                result = replace(
                    result,
                    paired_seeds=common,
                    delta=pair.delta,
                    low=pair.low,
                    high=pair.high,
                    p=pair.p,
                    p_sign_flip=pair.p_sign_flip,
                )
        results[row] = result
    adjusted = holm([result.p for result in results.values()])
    for (row, result), p_holm in zip(results.items(), adjusted, strict=True):
        results[row] = replace(
            result, p_holm=p_holm, verdict=result.verdict or _verdict(result, p_holm, higher_is_better)
        )
    return results


def _verdict(result: Comparison, p_holm: float, higher_is_better: bool | None) -> str:
    if result.pairs < VERDICT_FROM:
        return TOO_SMALL
    if not p_holm < ALPHA:
        return NO_DIFFERENCE
    if higher_is_better is None:
        return DIFFERS
    return BETTER if (result.delta > 0) == higher_is_better else WORSE


def compare(
    frame: pd.DataFrame,
    metric: str,
    *,
    reference: str,
    rows: Sequence[str] | None = None,
    seeds: Collection[int] | None = None,
    higher_is_better: bool | None = True,
) -> dict[str, Comparison]:
    """Compare rows of an arms frame (`analysis.load`) with the reference row in one metric, paired by seed.

    higher_is_better: None where neither direction is, for metrics that describe. Only finished arms count. `rows`: which, and in which order (default: all of the frame). `seeds`: those that were
    planned, so that missing ones are known (default: every seed that one of the rows has). Values stay in raw units.
    UserError: no finished arm, or a metric that the frame does not have (with the nearest names).
    """
    names = list(rows) if rows is not None else list(dict.fromkeys(frame["row"]))
    part = frame[frame["row"].isin(names)]
    if seeds is None:
        seeds = {int(seed) for seed in part["seed"]}
    finished = part[part["status"] == "FINISHED"]
    if finished.empty:
        raise UserError(
            f"No arm of these rows has finished yet ({', '.join(names)}): `basd status` shows how far they are."
        )
    if metric not in frame.columns:
        raise UserError(_no_such_metric(metric, [str(column) for column in frame.columns]))
    values: dict[str, dict[int, float]] = {name: {} for name in names}
    runs: dict[str, dict[int, str]] = {name: {} for name in names}
    for row, seed, run, value in zip(
        finished["row"], finished["seed"], finished["run_id"], finished[metric], strict=True
    ):
        if seed in values[row]:
            raise ValueError(f"row '{row}' has seed {seed} twice in the frame; analysis.load keeps one run of each")
        values[row][int(seed)], runs[row][int(seed)] = float(value), run
    base = runs.get(reference, {})
    same = [
        name
        for name in names
        if name != reference
        and (common := runs[name].keys() & base.keys())
        and all(runs[name][s] == base[s] for s in common)
    ]
    return compare_values(
        values, reference=reference, metric=metric, seeds=seeds, higher_is_better=higher_is_better, same_runs=same
    )


def _no_such_metric(metric: str, columns: Sequence[str]) -> str:
    from analysis.load import COLUMNS

    known = sorted(set(columns) - set(COLUMNS))
    near = difflib.get_close_matches(metric, known, n=3, cutoff=0.5)
    if near:
        return f"The runs have no metric '{metric}'; the nearest they have: {', '.join(near)}."
    listed = ", ".join([*known[:12], *["…"] * (len(known) > 12)]) or "none"
    return f"The runs have no metric '{metric}'; they have: {listed}."
