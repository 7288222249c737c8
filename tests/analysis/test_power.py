"""Effect size, correlation, power and seeds needed against integrals, SciPy, published tables and simulation."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import integrate, stats

from analysis import Layout, build_table, compare, metric, write_report
from analysis.power import deviation_factors, power_of_paired_t, seeds_needed
from analysis.precision import precision_block
from analysis.statistics import compare_values, correlation, hedges_correction, paired

Frames = Callable[..., pd.DataFrame]
Layouts = Callable[..., Layout]


def power_by_integral(n: int, effect: float, alpha: float = 0.05) -> float:
    """P(|Z + √n δ| > t √(u/ν)) over the chi-square density of u: no noncentral t."""
    freedom, shift = n - 1, math.sqrt(n) * effect
    critical = stats.t.ppf(1 - alpha / 2, freedom)

    def integrand(u: float) -> float:
        edge = critical * math.sqrt(u / freedom)
        return float((stats.norm.sf(edge - shift) + stats.norm.cdf(-edge - shift)) * stats.chi2.pdf(u, freedom))

    # the density of one degree of freedom has a pole at 0
    return integrate.quad(integrand, 0, 1)[0] + integrate.quad(integrand, 1, np.inf)[0]


CASES = [(2, 0.5), (2, 8.0), (3, 1.0), (5, 0.0), (5, 1.5), (12, 0.3), (40, 0.5), (6, -2.0)]


def test_power_is_the_integral_over_the_deviation() -> None:
    for (n, effect), alpha in itertools.product(CASES, (0.05, 0.01)):
        found = power_of_paired_t(n, 0.02, 0.02 * effect, alpha)
        assert found == pytest.approx(power_by_integral(n, effect, alpha), abs=1e-6), (n, effect, alpha)


def test_power_is_the_share_of_experiments_that_find_the_difference() -> None:
    for n, effect in ((3, 1.5), (5, 1.0), (10, 0.9)):
        runs = 20_000
        draws = np.random.default_rng(n).normal(effect, 1.0, (runs, n))
        found = np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05)
        expected = power_of_paired_t(n, 1.0, effect)
        assert abs(found - expected) < 4 * math.sqrt(expected * (1 - expected) / runs), n


def test_seeds_needed_are_those_of_published_tables() -> None:
    """Two-sided, 0.05, 80 %: what G*Power 3 gives for the difference of two dependent means."""
    for effect, pairs in ((0.2, 199), (0.3, 90), (0.5, 34), (0.8, 15), (1.0, 10)):
        assert seeds_needed(0.03, 0.03 * effect) == seeds_needed(0.03, -0.03 * effect) == pairs


def test_seeds_needed_is_the_first_that_is_enough() -> None:
    for effect, power in itertools.product((0.9, 1.7, 4.0, 9.0, 30.0), (0.5, 0.8, 0.95)):
        first = seeds_needed(1.0, effect, power)
        assert power_by_integral(first, effect) >= power, (effect, power)
        assert first == 2 or power_by_integral(first - 1, effect) < power, (effect, power)


def test_seeds_needed_at_the_ends() -> None:
    assert {seeds_needed(deviation, 1.0) for deviation in (1e-150, 1e-12, 1e-9, 1e-6, 1e-3)} == {2}
    # far out the t test is the normal one
    normal = ((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) / 1e-4) ** 2
    assert seeds_needed(1.0, 1e-4) == pytest.approx(normal, rel=1e-5)
    for deviation, delta, power in ((1.0, 0.0, 0.8), (0.0, 1.0, 0.8), (math.nan, 1.0, 0.8), (1.0, 1.0, 1.0)):
        with pytest.raises(ValueError):
            seeds_needed(deviation, delta, power)


def test_hedges_correction_takes_the_bias_away() -> None:
    """√n d_z has a noncentral t distribution, whose mean SciPy knows."""
    for n in (3, 4, 5, 10, 40):
        for effect in (0.3, 1.2):
            mean = stats.nct.mean(n - 1, effect * math.sqrt(n)) / math.sqrt(n)
            assert hedges_correction(n - 1) * mean == pytest.approx(effect)
        draws = np.random.default_rng(n).normal(0.8, 1.0, (40_000, n))
        corrected = hedges_correction(n - 1) * draws.mean(1) / draws.std(1, ddof=1)
        if n > 3:  # with 3 pairs the variance is infinite
            assert abs(corrected.mean() - 0.8) < 4 * corrected.std() / math.sqrt(len(corrected))


def test_spread_effect_size_and_correlation_are_numpys() -> None:
    rng = np.random.default_rng(0)
    base, row = rng.normal(0.7, 0.02, (2, 6))
    row = row + 0.8 * (base - 0.7) + 0.01
    result = compare_values({"base": dict(enumerate(base)), "row": dict(enumerate(row))}, reference="base")["row"]
    d = row - base
    assert result.sd_differences == pytest.approx(d.std(ddof=1))
    assert result.d_z == pytest.approx(d.mean() / d.std(ddof=1))
    # the usual approximation of the correction, 1 − 3 / (4 (n − 1) − 1)
    assert result.g_z == pytest.approx(result.d_z * (1 - 3 / 19), rel=2e-3)
    assert result.correlation == pytest.approx(np.corrcoef(row, base)[0, 1])


def test_spread_is_said_from_three_pairs_on() -> None:
    for n in (1, 2, 3):
        base = {seed: 0.5 + 0.01 * seed for seed in range(n)}
        row = {seed: value + 0.1 + 0.003 * seed**2 for seed, value in base.items()}
        result = compare_values({"base": base, "row": row}, reference="base")["row"]
        said = (result.sd_differences, result.d_z, result.g_z, result.correlation)
        assert all(math.isnan(value) == (n < 3) for value in said), n


def test_equal_differences_have_no_effect_size_and_constants_no_correlation() -> None:
    base = [0.1, 0.2, 0.3]
    assert paired([value + 0.02 for value in base], base).sd == 0.0
    result = compare_values(
        {"base": dict(enumerate(base)), "row": {s: v + 0.02 for s, v in enumerate(base)}}, reference="base"
    )["row"]
    assert math.isnan(result.d_z) and math.isnan(result.g_z) and result.correlation == pytest.approx(1)
    assert math.isnan(correlation([0.3, 0.3, 0.1 + 0.2], base)) and math.isnan(correlation([1.0], [2.0]))


def test_the_deviation_lies_between_its_factors_in_95_of_100() -> None:
    for n in (3, 8):
        runs = 5000
        estimates = np.random.default_rng(n).normal(0, 2.0, (runs, n)).std(1, ddof=1)
        least, most = deviation_factors(n)
        share = np.mean((least * estimates <= 2.0) & (most * estimates >= 2.0))
        assert abs(share - 0.95) < 3 * math.sqrt(0.95 * 0.05 / runs)


THREE = {
    "basd": dict(enumerate([0.76, 0.79, 0.75])),
    "ce": dict(enumerate([0.70, 0.75, 0.72])),
    "near": dict(enumerate([0.77, 0.78, 0.76])),
}


def test_the_report_holds_the_block_and_the_csv_its_numbers(frame_of: Frames, layout_of: Layouts) -> None:
    frame, layout = frame_of(THREE), layout_of(list(THREE), wanted_delta=0.5)
    table = build_table(frame, layout)
    result = compare(frame, "test/top1", reference="basd")["ce"]
    d = 100 * np.array([-0.06, -0.04, -0.03])
    lines = {line["row"]: line for line in csv.DictReader(io.StringIO(table.to_csv()))}
    assert float(lines["ce"]["sd_differences"]) == pytest.approx(d.std(ddof=1))
    assert float(lines["ce"]["g_z"]) == pytest.approx(result.g_z)
    needed, wanted = (int(lines["ce"][name]) for name in ("seeds_needed", "seeds_needed_wanted"))
    for seeds, delta in ((needed, d.mean()), (wanted, 0.5)):
        effect = delta / d.std(ddof=1)
        assert power_by_integral(seeds, effect) >= 0.8 > power_by_integral(seeds - 1, effect)
    assert lines["ce"]["wanted_delta"] == "0.5" and lines["basd"]["seeds_needed"] == lines["basd"]["d_z"] == ""
    text = "\n".join(precision_block(table))
    assert rf"| ce | {d.std(ddof=1):.2f} |" in text and f"| {needed} | {wanted} | 3 |" in text
    assert "seeds for Δ = 0.5" in text and "between 0.52 and 6.28" in text and "| basd |" not in text


def test_the_block_is_left_out_where_it_could_say_nothing(frame_of: Frames, layout_of: Layouts, tmp_path: Path) -> None:
    two = {row: {seed: values[seed] for seed in range(2)} for row, values in THREE.items()}
    assert precision_block(build_table(frame_of(two), layout_of(list(THREE)))) == []
    report = write_report(frame_of(two), layout_of(list(THREE)), tmp_path)
    assert "power" not in report.paths[0].read_text() and "seeds_needed" in report.paths[2].read_text()


def test_several_metrics_name_theirs_and_the_wanted_difference_is_of_the_first(
    frame_of: Frames, layout_of: Layouts
) -> None:
    frame = frame_of(THREE)
    frame["test/nll"] = 2.0 - frame["test/top1"]
    layout = layout_of(list(THREE), metrics=(metric("test/top1"), metric("test/nll")), wanted_delta=100.0)
    lines = [line for line in precision_block(build_table(frame, layout)) if line.startswith("| ce |")]
    first, second = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert (first[1], second[1]) == ("test top-1", "test NLL")
    assert first[-2:] == ["2", "3"] and second[-2:] == ["–", "3"]
    # a table that is split has each metric's rows together
    frame["test/ece"] = frame["test/nll"]
    names = ("test/top1", "test/nll", "test/ece")
    page = precision_block(build_table(frame, layout_of(list(THREE), metrics=tuple(map(metric, names)))))
    order = [line.split("|")[2].strip() for line in page if line.startswith("| ")][2:]
    assert order == [label for label in ("test top-1", "test NLL", "test ECE") for _ in range(len(THREE) - 1)]
