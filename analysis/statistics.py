"""Rows of an ablation compared with its reference, paired by seed.

What is reported, and from how many pairs on (fewer give NaN, never a guess):

* Δ, the mean of the paired differences: 1 pair;
* the paired-t 95 % interval and two-sided p, the deviation of the differences, the effect size and the correlation: 3 pairs;
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
    sd_differences: float = math.nan  # sample standard deviation of the paired differences; 0 where they are all equal
    correlation: float = math.nan  # Pearson's, between the row and the reference over the paired seeds

    @property
    def d_z(self) -> float:
        """Δ over the standard deviation of the paired differences; NaN where they are all equal."""
        return self.delta / self.sd_differences if self.sd_differences > 0 else math.nan

    @property
    def g_z(self) -> float:
        """d_z with Hedges' correction, without which few pairs overstate it."""
        return math.nan if math.isnan(self.d_z) else self.d_z * hedges_correction(self.pairs - 1)

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
    sd: float = math.nan  # of the differences
    correlation: float = math.nan


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
    together = correlation(values, reference)
    if max(differences) - min(differences) <= noise:
        return Paired(delta, delta, delta, flip, shown_flip, 0.0, together)
    from scipy import stats

    test = stats.ttest_rel(values, reference)
    interval = test.confidence_interval(CONFIDENCE)
    low, high, p = float(interval.low), float(interval.high), float(test.pvalue)
    return Paired(delta, low, high, p, shown_flip, standard_deviation(differences), together)


def correlation(values: Sequence[float], others: Sequence[float]) -> float:
    """Pearson's; NaN below two pairs or where one of the two does not vary."""
    ours, theirs = ([value - mean(one) for value in one] for one in (values, others))
    for one, deviations in ((values, ours), (others, theirs)):
        if max(map(abs, deviations), default=0.0) <= _ROUNDING * max(map(abs, one), default=0.0):
            return math.nan
    squares = math.fsum(a * a for a in ours) * math.fsum(b * b for b in theirs)
    return max(-1.0, min(1.0, math.fsum(a * b for a, b in zip(ours, theirs, strict=True)) / math.sqrt(squares)))


def hedges_correction(freedom: int) -> float:
    """Factor that makes a standardized mean difference unbiased: Γ(m/2) / (√(m/2) Γ((m−1)/2)), m ≥ 2 degrees of freedom.

    Hedges (1981), Distribution theory for Glass's estimator of effect size and related estimators.
    """
    return math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom - 1) / 2)) / math.sqrt(freedom / 2)


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
                    sd_differences=pair.sd,
                    correlation=pair.correlation,
                )
        results[row] = result
    adjusted = holm([result.p for result in results.values()])
    for (row, result), p_holm in zip(results.items(), adjusted, strict=True):
        said = result.verdict or verdict(result.delta, result.pairs, p_holm, higher_is_better)
        results[row] = replace(result, p_holm=p_holm, verdict=said)
    return results


def verdict(delta: float, pairs: int, p_holm: float, higher_is_better: bool | None = True) -> str:
    """What may be said of a difference: better or worse, that it differs (None: neither direction is the better one), no
    difference shown, n too small."""
    if pairs < VERDICT_FROM:
        return TOO_SMALL
    if not p_holm < ALPHA:
        return NO_DIFFERENCE
    if higher_is_better is None:
        return DIFFERS
    return BETTER if (delta > 0) == higher_is_better else WORSE


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
    values, runs = finished_values(part, metric, names)
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


def finished_values(
    frame: pd.DataFrame, metric: str, names: Sequence[str]
) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, str]]]:
    """Values and run ids of the finished arms of these rows, row -> seed; errors as of `compare`."""
    part = frame[frame["row"].isin(names)]
    finished = part[part["status"] == "FINISHED"]
    if finished.empty:
        raise UserError(
            f"No arm of these rows has finished yet ({', '.join(names)}): `basd status` shows how far they are."
        )
    if metric not in frame.columns:
        from analysis.load import COLUMNS

        raise UserError(no_such_metric(metric, {str(column) for column in frame.columns} - set(COLUMNS)))
    values: dict[str, dict[int, float]] = {name: {} for name in names}
    runs: dict[str, dict[int, str]] = {name: {} for name in names}
    for row, seed, run, value in zip(
        finished["row"], finished["seed"], finished["run_id"], finished[metric], strict=True
    ):
        if seed in values[row]:
            raise ValueError(f"row '{row}' has seed {seed} twice in the frame; analysis.load keeps one run of each")
        values[row][int(seed)], runs[row][int(seed)] = float(value), run
    return values, runs


def no_such_metric(metric: str, known: Collection[str]) -> str:
    """A sentence with the names that the runs have and that are nearest to the one they do not have."""
    names = sorted(known)
    near = difflib.get_close_matches(metric, names, n=3, cutoff=0.5)
    if near:
        return f"The runs have no metric '{metric}'; the nearest they have: {', '.join(near)}."
    listed = ", ".join([*names[:12], *["…"] * (len(names) > 12)]) or "none"
    return f"The runs have no metric '{metric}'; they have: {listed}."
