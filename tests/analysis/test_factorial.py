"""Effects of factors against least squares, all orders of switching on, marginal means, and simulation."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made import make_layout
from scipy import stats

from analysis import Layout, LayoutRow, build_factorial, metric, write_report
from analysis.factorial import ALL, ALONE, INTERACTION, MAIN, SHAPLEY, WITHOUT, Design, Factorial, analyse, design_of
from analysis.statistics import holm
from basd.grid.ablations import load_ablation

Frames = Callable[..., pd.DataFrame]
Values = dict[str, dict[int, float]]
SWITCH = ("off", "on")


def rows_of(levels: Mapping[str, Sequence[str]]) -> dict[str, dict[str, str]]:
    """Row -> factor -> level of every combination, named by its levels."""
    return {"-".join(chosen): dict(zip(levels, chosen, strict=True)) for chosen in itertools.product(*levels.values())}


def switches(count: int) -> dict[str, dict[str, str]]:
    return rows_of(dict.fromkeys("abcdefg"[:count], SWITCH))


def design(rows: Mapping[str, Mapping[str, str]], reference: str = "") -> Design:
    found = design_of(rows, reference)
    assert found is not None
    return found


def random_values(rows: Mapping[str, object], seeds: int = 4, start: int = 0) -> Values:
    rng = np.random.default_rng(start)
    return {row: dict(enumerate(rng.normal(0.7, 0.05, seeds).tolist())) for row in rows}


def estimates(found: Factorial, kind: str) -> dict[str, float]:
    return {effect.name: effect.delta for effect in found.of(kind)}


def least_squares(rows: Mapping[str, Mapping[str, str]], values: Values, bases: Mapping[str, str]) -> dict[str, float]:
    """Coefficients of the saturated model by name: a column for each level but the base, its dummy less 1 / levels."""
    levels = {f: list(dict.fromkeys(own[f] for own in rows.values())) for f in next(iter(rows.values()))}
    singles = {
        factor: {level: [(own[factor] == level) - 1 / len(all_) for own in rows.values()] for level in all_}
        for factor, all_ in levels.items()
    }
    names, matrix = [""], [np.ones(len(rows))]
    for many in range(1, len(levels) + 1):
        for chosen in itertools.combinations(levels, many):
            for picked in itertools.product(*([lv for lv in levels[f] if lv != bases[f]] for f in chosen)):
                names.append(" × ".join(f if set(levels[f]) == set(SWITCH) else f"{f}: {lv} − {bases[f]}"
                                        for f, lv in zip(chosen, picked, strict=True)))  # fmt: skip
                matrix.append(np.prod([singles[f][lv] for f, lv in zip(chosen, picked, strict=True)], axis=0))
    assert len(names) == len(rows)
    means = [np.mean(list(values[row].values())) for row in rows]
    solution = np.linalg.lstsq(np.array(matrix).T, np.array(means), rcond=None)[0]
    return dict(zip(names, solution, strict=True))


def game_of(rows: Mapping[str, Mapping[str, str]], values: Values, seed: int) -> dict[frozenset[str], float]:
    """Set of switches that are on -> value of one seed."""
    return {frozenset(f for f, lv in own.items() if lv == "on"): values[row][seed] for row, own in rows.items()}


def shapley_by_orders(game: Mapping[frozenset[str], float], players: Sequence[str]) -> dict[str, float]:
    """Mean over all orders of what a player adds when it comes."""
    found = dict.fromkeys(players, 0.0)
    orders = list(itertools.permutations(players))
    for order in orders:
        for place, player in enumerate(order):
            found[player] += game[frozenset(order[: place + 1])] - game[frozenset(order[:place])]
    return {player: total / len(orders) for player, total in found.items()}


def test_effects_of_switches_are_least_squares_with_effect_coding() -> None:
    for count in (2, 3, 4):
        rows = switches(count)
        values = random_values(rows)
        found = analyse(values, design(rows), order=count)
        expected = least_squares(rows, values, dict.fromkeys("abcd", "off"))
        mine = estimates(found, MAIN) | estimates(found, INTERACTION)
        assert len(mine) == 2**count - 1
        assert mine == pytest.approx({name: expected[name] for name in mine}, abs=1e-12)


def test_effects_of_more_levels_are_least_squares_with_simple_contrasts() -> None:
    rows = rows_of({"T": ("1", "2", "5", "10"), "scale": ("first", "none", "mean"), "views": SWITCH})
    values = random_values(rows)
    found = analyse(values, design(rows, reference="2-none-on"), order=3)
    expected = least_squares(rows, values, {"T": "2", "scale": "none", "views": "off"})
    mine = estimates(found, MAIN) | estimates(found, INTERACTION)
    assert len(mine) == 4 * 3 * 2 - 1 and "T: 10 − 2 × scale: first − none" in mine
    assert mine == pytest.approx({name: expected[name] for name in mine}, abs=1e-12)
    # one switch alone has no Shapley value beside its main effect
    assert not found.of(SHAPLEY) and not found.of(ALONE)


def test_an_interaction_is_what_one_switch_changes_in_the_other() -> None:
    rows = switches(2)
    values: Values = {"off-off": {0: 0.5}, "on-off": {0: 0.6}, "off-on": {0: 0.55}, "on-on": {0: 0.75}}
    found = analyse(values, design(rows))
    assert estimates(found, INTERACTION) == pytest.approx({"a × b": (0.75 - 0.55) - (0.6 - 0.5)})
    assert estimates(found, MAIN)["a"] == pytest.approx(((0.75 - 0.55) + (0.6 - 0.5)) / 2)
    assert found.marginal({"a": "on"}) == pytest.approx((0.6 + 0.75) / 2)


def test_shapley_values_are_the_mean_over_all_orders() -> None:
    for count in (2, 3, 5):
        rows = switches(count)
        values = random_values(rows, seeds=3, start=count)
        found = analyse(values, design(rows), order=1)
        players = "abcde"[:count]
        by_seed = [shapley_by_orders(game_of(rows, values, seed), players) for seed in range(3)]
        for effect in found.of(SHAPLEY):
            own = [one[effect.name] for one in by_seed]
            assert effect.delta == pytest.approx(np.mean(own), abs=1e-12)
            test = stats.ttest_1samp(own, 0)
            interval = test.confidence_interval()
            assert (effect.low, effect.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
            assert effect.p == pytest.approx(test.pvalue)
        everything, nothing = "-".join(["on"] * count), "-".join(["off"] * count)
        for place, player in enumerate(players):
            alone = "-".join(["off"] * place + ["on"] + ["off"] * (count - place - 1))
            without = "-".join(["on"] * place + ["off"] + ["on"] * (count - place - 1))
            for kind, one, other in ((ALONE, alone, nothing), (WITHOUT, everything, without)):
                (effect,) = found.of(kind, player)
                test = stats.ttest_rel(list(values[one].values()), list(values[other].values()))
                assert effect.delta == pytest.approx(np.mean([values[one][s] - values[other][s] for s in range(3)]))
                assert effect.p == pytest.approx(test.pvalue)


GAMES = st.lists(st.integers(-50, 50), min_size=16, max_size=16)


@settings(max_examples=20, deadline=None)
@given(GAMES, GAMES)
def test_shapley_values_keep_their_axioms(one: list[int], other: list[int]) -> None:
    """Efficiency, symmetry, dummy and linearity, on games of 4 switches."""
    rows = switches(4)

    def values_of(numbers: Sequence[float]) -> dict[str, float]:
        game = {row: {0: number / 100} for row, number in zip(rows, numbers, strict=True)}
        found = analyse(game, design(rows), order=1)
        shared = estimates(found, SHAPLEY)
        (total,) = found.of(ALL)
        assert sum(shared.values()) == pytest.approx(total.delta, abs=1e-12)
        assert total.delta == pytest.approx((numbers[-1] - numbers[0]) / 100, abs=1e-12)
        return shared

    first, second, both = values_of(one), values_of(other), values_of([a + b for a, b in zip(one, other, strict=True)])
    assert both == pytest.approx({name: first[name] + second[name] for name in first}, abs=1e-12)
    places = list(itertools.product((0, 1), repeat=4))
    # a and b are alike; what c does is nothing but a constant
    symmetric = values_of([one[(a + b) * 4 + c * 2 + d] for a, b, c, d in places])
    assert symmetric["a"] == pytest.approx(symmetric["b"], abs=1e-12)
    dummy = values_of([one[a * 8 + b * 4 + d] + 7 * c for a, b, c, d in places])
    assert dummy["c"] == pytest.approx(0.07, abs=1e-12)


def test_switches_beside_other_factors_are_taken_in_the_mean_over_these() -> None:
    rows = rows_of({"a": SWITCH, "T": ("1", "2"), "b": SWITCH})
    values = random_values(rows)
    averaged = {
        f"{a}-{b}": {s: (values[f"{a}-1-{b}"][s] + values[f"{a}-2-{b}"][s]) / 2 for s in range(4)}
        for a in SWITCH
        for b in SWITCH
    }
    mixed, plain = analyse(values, design(rows)), analyse(averaged, design(switches(2)))
    for kind in (ALONE, WITHOUT, SHAPLEY, ALL, MAIN):
        for effect in plain.of(kind):
            (same,) = [one for one in mixed.of(kind) if one.name == effect.name]
            assert (same.delta, same.low, same.p) == pytest.approx((effect.delta, effect.low, effect.p), abs=1e-12)


def contrasts(rows: Mapping[str, Mapping[str, str]]) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Kinds and names of effects, and each effect's weights of the rows: its value where one row is 1 and the others 0."""
    units = [analyse({other: {0: float(other == row)} for other in rows}, design(rows), order=3) for row in rows]
    weights = np.array([[effect.delta for effect in one.effects] for one in units]).T
    return [(effect.kind, effect.name) for effect in units[0].effects], weights


def test_intervals_of_all_effects_cover_the_truth_in_95_of_100() -> None:
    """4,000 experiments with 3 switches, seed effects common to all combinations and noise that differs between them."""
    for n in (3, 5, 10):
        rows, runs = switches(3), 4000
        rng = np.random.default_rng(n)
        truth = dict(zip(rows, rng.normal(0.7, 0.03, len(rows)).tolist(), strict=True))
        noise = np.linspace(0.004, 0.03, len(rows))
        draws = (
            np.array(list(truth.values())) + rng.normal(0, 0.05, (runs, n, 1)) + noise * rng.normal(size=(runs, n, 8))
        )
        kinds, weights = contrasts(rows)
        by_seed = draws @ weights.T
        means, errors = by_seed.mean(1), by_seed.std(1, ddof=1) / math.sqrt(n)
        reach = stats.t.ppf(0.975, n - 1) * errors
        # the truth by independent means
        exact: Values = {row: {0: value} for row, value in truth.items()}
        shares = shapley_by_orders(game_of(rows, exact, 0), "abc")
        fitted = least_squares(rows, exact, dict.fromkeys("abc", "off"))
        game, everything = game_of(rows, exact, 0), frozenset("abc")
        true = {(SHAPLEY, name): share for name, share in shares.items()} | {
            (kind, name): fitted[name] for kind, name in kinds if kind in (MAIN, INTERACTION)
        }
        true |= {(ALONE, name): game[frozenset(name)] - game[frozenset()] for name in "abc"}
        true |= {(WITHOUT, name): game[everything] - game[everything - {name}] for name in "abc"}
        true[ALL, ALL] = game[everything] - game[frozenset()]
        for place, effect in enumerate(kinds):
            share = np.mean(abs(means[:, place] - true[effect]) <= reach[:, place])
            assert abs(share - 0.95) < 3.5 * math.sqrt(0.95 * 0.05 / runs), (n, effect)
        # and these are the intervals that are reported
        for run in range(3):
            values = {row: dict(enumerate(draws[run, :, place].tolist())) for place, row in enumerate(rows)}
            found = analyse(values, design(rows), order=3)
            ends = np.array([(effect.low, effect.high) for effect in found.effects])
            assert ends == pytest.approx(np.stack([means[run] - reach[run], means[run] + reach[run]], 1), abs=1e-12)


def test_what_is_said_depends_on_the_number_of_seeds() -> None:
    for n in range(1, 8):
        rows = switches(2)
        values: Values = {
            row: {s: 0.5 + 0.01 * s + 0.2 * row.count("on") + 1e-4 * ((s * (place + 3)) % 5) for s in range(n)}
            for place, row in enumerate(rows)
        }
        found = analyse(values, design(rows))
        for effect in found.effects:
            assert effect.n == n and not math.isnan(effect.delta), n
            assert math.isnan(effect.low) == math.isnan(effect.p) == math.isnan(effect.p_holm) == (n < 3)
            assert math.isnan(effect.p_sign_flip) == (n < 6)
            if effect.kind != INTERACTION:
                assert effect.verdict == ("better" if n >= 5 else "n too small"), n
                assert effect.significant == (n >= 5)


def test_p_is_adjusted_within_a_kind_of_effect() -> None:
    rows = switches(4)
    found = analyse(random_values(rows, seeds=6), design(rows), order=3)
    families = [found.of(kind) for kind in (ALONE, WITHOUT, SHAPLEY, ALL, MAIN)]
    families += [[e for e in found.of(INTERACTION) if len(e.levels) == many] for many in (2, 3)]
    assert [len(family) for family in families] == [4, 4, 4, 1, 4, 6, 4]
    for family in families:
        assert [effect.p_holm for effect in family] == holm([effect.p for effect in family])


def test_verdicts_know_the_direction_of_the_metric() -> None:
    rows = switches(2)
    gain = {"off-off": 0.0, "on-off": 0.1, "off-on": -0.1, "on-on": 0.1}
    values: Values = {
        row: {s: 0.5 + gain[row] + 1e-4 * ((s * (place + 2)) % 7) for s in range(6)} for place, row in enumerate(rows)
    }
    up, down = (analyse(values, design(rows), higher_is_better=higher) for higher in (True, False))
    assert [up.of(ALONE, name)[0].verdict for name in "ab"] == ["better", "worse"]
    assert [down.of(ALONE, name)[0].verdict for name in "ab"] == ["worse", "better"]
    neutral = analyse(values, design(rows), higher_is_better=None)
    assert [(e.verdict, e.significant) for e in (*neutral.of(ALONE), *neutral.of(INTERACTION))] == [
        ("differs", True)
    ] * 3
    assert up.of(INTERACTION)[0].verdict == "better together" and down.of(INTERACTION)[0].verdict == "worse together"


def test_equal_effects_are_no_certainty() -> None:
    """0.1 + 0.02 − 0.1 is not exactly 0.02: a t test on rounding noise would claim p = 1e-60."""
    rows = switches(3)
    values: Values = {row: {s: 0.1 * (s + 1) + 0.02 * row.count("on") for s in range(5)} for row in rows}
    found = analyse(values, design(rows))
    for effect in found.effects:
        assert effect.low == effect.high
        assert effect.p == pytest.approx(1.0 if effect.kind == INTERACTION else 2 / 32)


def test_a_missing_combination_takes_away_what_needs_it_and_nothing_else() -> None:
    rows = switches(3)
    values = random_values(rows, seeds=5)
    whole = analyse(values, design(rows))
    del values["on-on-off"]
    values["off-on-on"][2] = math.nan
    found = analyse(values, design(rows), seeds=range(5))
    for effect, before in zip(found.effects, whole.effects, strict=True):
        # the set of a and b is needed by these alone
        if effect.kind in (SHAPLEY, MAIN, INTERACTION) or (effect.kind, effect.name) == (WITHOUT, "c"):
            assert effect.n == 0 and math.isnan(effect.delta) and not effect.verdict
        elif (effect.kind, effect.name) == (WITHOUT, "a"):
            assert effect.seeds == (0, 1, 3, 4)
        else:
            assert (effect.n, effect.delta, effect.low) == (5, before.delta, before.low)
    assert found.gaps == {("on", "on", "off"): (0, 1, 2, 3, 4), ("off", "on", "on"): (2,)}
    assert not found.complete_seeds and math.isnan(found.marginal({"a": "on"}))


def test_the_design_is_read_from_the_rows() -> None:
    assert design_of({"a": {"T": "1"}, "b": {"T": "2"}, "c": {}}) is None and design_of({"a": {}}) is None
    rows = {"x": {"T": "10", "s": "off"}, "y": {"T": "2", "s": "off"}, "z": {"T": "10", "s": "on"}, "beside": {}}
    found = design(rows, reference="x")
    assert found.levels == {"T": ("2", "10"), "s": ("off", "on")} and found.base == {"T": "10", "s": "off"}
    assert len(found.combinations) == 4 and found.label(("2", "on")) == "s+T=2" and found.label(("2", "off")) == "T=2"
    # only one level of a switch among the rows: the other one is missing, not unknown
    assert design({"x": {"a": "on", "b": "on"}}).levels == {"a": SWITCH, "b": SWITCH}
    with pytest.raises(ValueError, match="x and y are the same combination"):
        design_of({"x": {"a": "on", "b": "on"}, "y": {"a": "on", "b": "on"}})
    with pytest.raises(ValueError, match="every combination must name"):
        design_of({"x": {"a": "on", "b": "on"}, "y": {"a": "on"}})


def test_the_tables_that_come_along_are_read_as_they_are_meant() -> None:
    losses, weighting = (load_ablation(name) for name in ("losses", "weighting"))
    four = design({row.name: row.factors for row in losses.rows}, losses.reference)
    assert four.switches == ["rsd", "rel", "attn", "spectral"] and len(four.rows) == len(four.combinations) == 16
    levels = design({row.name: row.factors for row in weighting.rows}, weighting.reference)
    assert levels.levels == {"T": ("1", "2", "5", "10"), "scale": ("first", "first_mean", "none")}
    assert levels.base == {"T": "2", "scale": "first"} and not levels.switches and len(levels.rows) == 12


# -- report ------------------------------------------------------------------------------------------------------------


def layout_of_rows(rows: Mapping[str, Mapping[str, str]], **changes: Any) -> Layout:
    made = [LayoutRow(row, row, factors=factors) for row, factors in rows.items()]
    return make_layout(made, **{"question": "Which?"} | changes)


def test_the_pages_say_the_same_as_the_effects(frame_of: Frames) -> None:
    rows = switches(3)
    values = random_values(rows, seeds=5, start=2)
    for by_seed in (values[row] for row in rows if row.endswith("on")):
        by_seed.update({seed: value + 0.5 for seed, value in by_seed.items()})
    report = build_factorial(frame_of(values), layout_of_rows(rows, notes=("Plan 1234.",)))
    assert report is not None
    (found,) = report.factorials
    lines = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert len(lines) == len(found.effects) == 4 * 3 + 1 + 3
    for line, effect in zip(lines, found.effects, strict=True):
        assert (line["effect"], line["unit"]) == (effect.name, "points")
        assert float(line["delta"]) == pytest.approx(100 * effect.delta)
        assert float(line["high"]) == pytest.approx(100 * effect.high)
        assert float(line["p_holm"]) == pytest.approx(effect.p_holm) and line["seeds"] == "0 1 2 3 4"
    kinds = ["alone", "leave_one_out", "shapley", "all", "main", "interaction"]
    assert list(dict.fromkeys(line["kind"] for line in lines)) == kinds
    (share,) = found.of(SHAPLEY, "c")
    delta, low, high = (f"{100 * value:+.2f}".replace("-", "−") for value in (share.delta, share.low, share.high))
    assert share.verdict == "better"
    text = report.to_markdown(["losses.shapley.png"])
    assert rf"| Shapley value | **{delta} \[{low}, {high}\]** |" in text and "| *c* |" in text
    assert "- Plan 1234." in text and "Without a finite value" not in text
    assert "](losses.shapley.png)" in text
    assert f"**{delta} {{[}}{low}".replace("**", r"\textbf{") in report.to_latex().replace("$-$", "−")
    (table,) = report.to_rich()
    assert table.row_count == 3 and [column.header.plain for column in table.columns][1:5] == [
        ALONE,
        WITHOUT,
        MAIN,
        SHAPLEY,
    ]  # type: ignore[union-attr]


def test_latex_of_effects_has_the_structure_of_a_booktabs_table(frame_of: Frames) -> None:
    rows = rows_of({"a_b": SWITCH, "c": SWITCH, "T": ("1", "2")})
    report = build_factorial(frame_of(random_values(rows)), layout_of_rows(rows, title="50 % of A_b"))
    assert report is not None
    text = report.to_latex()
    assert text.isascii() and text.count(r"\begin{") == text.count(r"\end{") == 3 and r"a\_b" in text
    body = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert all(line.replace(r"\&", "").count("&") == 4 for line in body)


def test_missing_combinations_are_one_sentence_and_no_number(frame_of: Frames, tmp_path: Path) -> None:
    rows = switches(2)
    values = random_values(rows, seeds=3)
    del values["on-on"]
    values["off-on"].pop(1)
    report = build_factorial(frame_of(values), layout_of_rows(rows, seeds=(0, 1, 2)))
    assert report is not None
    sentence = (
        "Without a finite value: 2 of the 4 combinations, b (seed 1); a+b (seed 0, 1, 2); no seed has all of them, and "
        "effects that need all are not shown."
    )
    assert sentence in report.to_markdown() and "| main effect | – | – | – | 0 |" in report.to_markdown()
    assert sentence in str(report.to_rich()[0].caption)
    subset = {name: own for name, own in rows.items() if name != "on-on"}
    few = build_factorial(frame_of(values), layout_of_rows(subset))
    assert few is not None and "a+b (seed 0, 1, 2)" in few.to_markdown() and not few.warnings


def test_where_no_effect_has_its_combinations_the_user_is_told(frame_of: Frames, tmp_path: Path) -> None:
    rows = switches(3)
    few = {name: rows[name] for name in ("off-off-off", "on-on-on")} | {"beside": {}}
    values = random_values(few, seeds=2)
    for finished in (values, {"beside": values["beside"]}):
        report = write_report(frame_of(finished), layout_of_rows(few), tmp_path)
        assert report.factorial is not None and report.factorial.to_rich() == []
        (said,) = report.warnings
        assert said.startswith("No effects of the factors on test top-1. Without a finite value: ")
        assert (
            f"{len(rows) - (2 if finished is values else 0)} of the 8 combinations" in said and " more; no seed" in said
        )


def test_a_table_without_factors_has_no_such_report(frame_of: Frames, layout_of: Callable[..., Layout]) -> None:
    assert build_factorial(frame_of({"a": {0: 0.5}, "b": {0: 0.6}}), layout_of(["a", "b"])) is None


def test_several_metrics_stand_below_each_other(frame_of: Frames) -> None:
    rows = switches(2)
    frame = frame_of(random_values(rows))
    frame["test/nll"] = 2.0 - frame["test/top1"]
    frame["time/step_milliseconds"] = 1.0
    metrics = tuple(metric(name) for name in ("test/top1", "test/nll", "time/step_milliseconds"))
    report = build_factorial(frame, layout_of_rows(rows, metrics=metrics))
    assert report is not None and len(report.factorials) == len(report.to_rich()) == 2
    text = report.to_markdown()
    assert "## test top-1" in text and "## test NLL" in text and "Lower is better: test NLL." in text
    assert report.to_latex().count(r"\begin{table}") == 2 and "step" not in text


@pytest.mark.full
def test_reports_of_factorials_are_byte_identical_whatever_the_order_of_the_runs(
    frame_of: Frames, tmp_path: Path
) -> None:
    rows = switches(2)
    frame, layout = frame_of(random_values(rows, seeds=5)), layout_of_rows(rows)
    first = write_report(frame, layout, tmp_path / "a")
    second = write_report(frame.sample(frac=1, random_state=1), layout, tmp_path / "b")
    names = [path.name for path in first.paths]
    assert [name for name in names if "factorial" in name] == [f"losses.factorial.{s}" for s in ("md", "tex", "csv")]
    assert {f"losses.{what}.{s}" for what in ("shapley", "interactions") for s in ("pdf", "png")} <= set(names)
    for one, two in zip(first.paths, second.paths, strict=True):
        assert one.read_bytes() == two.read_bytes()
