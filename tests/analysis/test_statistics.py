"""The statistics against SciPy, brute force, the closed-testing definition of Holm, and simulation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis import statistics
from analysis.statistics import compare, compare_values, holm, mean, paired, sign_flip, standard_deviation
from basd.errors import UserError

Frames = Callable[..., pd.DataFrame]
NUMBERS = st.floats(-100, 100, allow_nan=False).map(lambda value: round(value, 3))
PAIRS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=3, max_size=9)


@settings(max_examples=30, deadline=None)
@given(PAIRS)
def test_paired_t_is_the_textbook_formula(pairs: list[tuple[float, float]]) -> None:
    a, b = (list(column) for column in zip(*pairs, strict=True))
    d = np.array(a) - np.array(b)
    result = paired(a, b)
    assert result.delta == pytest.approx(d.mean(), abs=1e-9)
    if np.ptp(d) < 1e-9:
        assert result.low == result.high == result.delta
        return
    error = d.std(ddof=1) / math.sqrt(len(d))
    reach = stats.t.ppf(0.975, len(d) - 1) * error
    assert (result.low, result.high) == pytest.approx((d.mean() - reach, d.mean() + reach), abs=1e-9)
    assert result.p == pytest.approx(2 * stats.t.sf(abs(d.mean()) / error, len(d) - 1), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(PAIRS)
def test_swapping_the_samples_mirrors_the_result(pairs: list[tuple[float, float]]) -> None:
    a, b = (list(column) for column in zip(*pairs, strict=True))
    there, back = paired(a, b), paired(b, a)
    assert (there.delta, there.low, there.high) == pytest.approx((-back.delta, -back.high, -back.low), abs=1e-9)
    assert there.p == pytest.approx(back.p, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=8))
def test_sign_flip_counts_every_choice_of_signs(differences: list[int]) -> None:
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    expected = sum(value >= abs(sum(differences)) for value in sums) / len(sums)
    assert sign_flip([d / 450 for d in differences], noise=1e-12) == expected


def test_sign_flip_agrees_with_scipys_permutation_test() -> None:
    a, b = np.random.default_rng(3).normal(size=(2, 8)) + [[0.4], [0.0]]
    theirs = stats.permutation_test((a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf)
    assert paired(list(a), list(b)).p_sign_flip == pytest.approx(theirs.pvalue)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1e-6, 0.004, 0.01, 0.02, 0.03, 0.2, 0.9, 1.0]), min_size=1, max_size=5))
def test_holm_is_the_closed_test_of_bonferroni(p: list[float]) -> None:
    """An adjusted p is the largest Bonferroni p of all sets of hypotheses that contain it."""
    for i, adjusted in enumerate(holm(p)):
        sets = [s for k in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), k) if i in s]
        assert adjusted == pytest.approx(max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets))


def test_holm_passes_over_what_was_not_tested() -> None:
    adjusted = holm([0.04, math.nan, 0.01])
    assert adjusted[0] == 0.04 and math.isnan(adjusted[1]) and adjusted[2] == 0.02


def test_the_interval_covers_the_truth_in_95_of_100() -> None:
    """10,000 experiments: seed effects common to both rows, own noise, a true difference of 0.02."""
    for n in (3, 5, 10):
        rng, runs = np.random.default_rng(n), 10_000
        rows = 0.7 + rng.normal(0, 0.05, (runs, 1, n)) + rng.normal(0, 0.01, (runs, 2, n)) + [[0.02], [0.0]]
        d = rows[:, 0] - rows[:, 1]
        reach = stats.t.ppf(0.975, n - 1) * d.std(1, ddof=1) / math.sqrt(n)
        share = np.mean(abs(d.mean(1) - 0.02) <= reach)
        assert abs(share - 0.95) < 3 * math.sqrt(0.95 * 0.05 / runs)
        for run in range(20):  # and these are the intervals that are reported
            result = paired(rows[run, 0].tolist(), rows[run, 1].tolist())
            ends = (d[run].mean() - reach[run], d[run].mean() + reach[run])
            assert (result.low, result.high) == pytest.approx(ends, abs=1e-12)


def test_holm_keeps_false_verdicts_of_a_table_at_5_percent() -> None:
    """300 tables of 6 rows without any difference: at most 1 in 20 has any verdict (the rows share the reference)."""
    rng, tables, false = np.random.default_rng(1), 300, 0
    for _ in range(tables):
        draws = rng.normal(0.7, 0.02, (7, 5))
        values = {f"row{i}": dict(enumerate(row.tolist())) for i, row in enumerate(draws)}
        false += any(result.significant for result in compare_values(values, reference="row0").values())
    assert false / tables < 0.05 + 3 * math.sqrt(0.05 * 0.95 / tables)


def test_what_is_said_depends_on_the_number_of_pairs() -> None:
    for n in range(1, 8):
        base = {seed: 0.5 + 0.01 * seed for seed in range(n)}
        far = {seed: value + 0.2 + 0.001 * (seed % 2) for seed, value in base.items()}
        result = compare_values({"base": base, "far": far}, reference="base")["far"]
        assert result.pairs == result.n == n and not math.isnan(result.delta)
        assert math.isnan(result.low) == math.isnan(result.p) == math.isnan(result.p_holm) == (n < 3)
        assert math.isnan(result.p_sign_flip) == (n < 6)
        assert result.verdict == ("better" if n >= 5 else "n too small"), n


def test_verdict_knows_the_direction_of_the_metric() -> None:
    base = dict(enumerate([0.50, 0.51, 0.52, 0.50, 0.53]))
    up = {seed: value + 0.2 + 0.001 * seed for seed, value in base.items()}
    near = {seed: value + (0.01 if seed % 2 else -0.01) for seed, value in base.items()}
    values = {"base": base, "up": up, "near": near}
    assert [r.verdict for r in compare_values(values, reference="base").values()] == [
        "reference",
        "better",
        "no difference shown",
    ]
    assert compare_values(values, reference="base", higher_is_better=False)["up"].verdict == "worse"
    neutral = compare_values(values, reference="base", higher_is_better=None)["up"]
    assert neutral.verdict == "differs" and neutral.significant


def test_equal_differences_give_the_sign_flip_p_and_a_point() -> None:
    """0.1 + 0.02 - 0.1 is not exactly 0.02, so a t test on rounding noise would claim p = 1e-60."""
    for shift, n, p in ((0.02, 5, 2 / 32), (0.02, 7, 2 / 128), (0.0, 5, 1.0)):
        base = [0.1 * (seed + 1) for seed in range(n)]
        result = paired([value + shift for value in base], base)
        assert result.low == result.high == result.delta == pytest.approx(shift)
        assert result.p == pytest.approx(p)


def test_missing_and_nonfinite_seeds_are_left_out_and_named() -> None:
    values = {
        "base": {0: 0.5, 1: 0.6, 2: 0.7, 4: math.inf},
        "row": {0: 0.6, 1: math.nan, 2: 0.9, 4: 0.8},
    }
    row = compare_values(values, reference="base", seeds=(0, 1, 2, 3, 4))["row"]
    assert (row.seeds, row.nonfinite, row.missing, row.paired_seeds) == ((0, 2, 4), (1,), (3,), (0, 2))
    assert row.mean == pytest.approx((0.6 + 0.9 + 0.8) / 3)
    assert row.delta == pytest.approx((0.1 + 0.2) / 2) and math.isnan(row.low)


def test_rows_that_are_the_references_own_runs_are_not_tested(frame_of: Frames) -> None:
    frame = frame_of({"base": dict(enumerate([0.5, 0.6, 0.7])), "folded": dict(enumerate([0.5, 0.6, 0.7]))})
    frame["run_id"] = [f"run-{seed}" for seed in frame["seed"]]
    folded = compare(frame, "test/top1", reference="base")["folded"]
    assert folded.verdict == statistics.SAME_RUNS and folded.delta == 0 and math.isnan(folded.p)


def test_only_finished_arms_count(frame_of: Frames) -> None:
    frame = frame_of({"base": {0: 0.5, 1: 0.6}, "row": {0: 0.7}}, unfinished={("row", 1): "RUNNING"})
    row = compare(frame, "test/top1", reference="base")["row"]
    assert row.seeds == (0,) and row.missing == (1,)
    with pytest.raises(UserError, match="No arm of these rows has finished"):
        compare(frame.assign(status="RUNNING"), "test/top1", reference="base")


def test_an_unknown_metric_names_the_nearest(frame_of: Frames) -> None:
    frame = frame_of({"base": {0: 0.5}})
    with pytest.raises(UserError, match="nearest they have: test/top1"):
        compare(frame, "test/top5", reference="base")
    with pytest.raises(UserError, match="they have: test/top1"):
        compare(frame, "zzz", reference="base")


def test_a_seed_that_stands_twice_in_the_frame_is_refused(frame_of: Frames) -> None:
    frame = frame_of({"base": {0: 0.5}})
    with pytest.raises(ValueError, match="twice"):
        compare(frame.loc[[0, 0]], "test/top1", reference="base")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=8), st.randoms())
def test_mean_and_deviation_are_numpys_and_ignore_order(values: list[float], random: object) -> None:
    assert mean(values) == pytest.approx(np.mean(values), abs=1e-6)
    assert standard_deviation(values) == pytest.approx(np.std(values, ddof=1), abs=1e-6)
    shuffled = list(values)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert (mean(shuffled), standard_deviation(shuffled)) == (mean(values), standard_deviation(values))
