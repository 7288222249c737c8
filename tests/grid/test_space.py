"""Search spaces: Hydra's syntax against Hydra's own sweeps, and values that come back as they were written."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from basd.errors import UserError
from basd.grid.space import DIGITS, combinations, distribution_of, ends, overrides_of, text_of, value_in


def of(text: str, whole: bool = False) -> Any:
    return distribution_of(f"x.y={text}", whole=whole)


def by_hydra(text: str) -> list[str]:
    (override,) = OverridesParser.create().parse_overrides([f"x.y={text}"])
    return list(override.sweep_string_iterator())


def test_lists_hold_the_values_that_hydra_would_run() -> None:
    for text in ("choice(a, b)", "a,b,c", "choice(1, 2.5, true)", "choice([2,5],[5])", "range(1, 7)", "range(0, 10, 3)",
                 "range(0, 1, 0.25)", "range(1, 2, 0.1)", "range(5)", "none,null"):  # fmt: skip
        one = of(text)
        listed = [combination["x.y"] for combination in combinations({"x.y": one})]
        assert [text_of(value, one) for value in listed] == by_hydra(text), text


def test_intervals_take_the_type_of_their_setting() -> None:
    assert of("interval(0.1, 2)") == FloatDistribution(0.1, 2.0)
    assert of("interval(1, 20)") == FloatDistribution(1.0, 20.0)
    assert of("interval(1, 20)", whole=True) == IntDistribution(1, 20)
    assert of("tag(log, interval(1e-4, 1e-2))") == FloatDistribution(1e-4, 1e-2, log=True)
    assert of("tag(log, interval(8, 256))", whole=True) == IntDistribution(8, 256, log=True)


REFUSED = [
    ("3", "one value and nothing to search"),
    ("interval(2, 1)", "holds no numbers"),
    ("tag(log, interval(0, 1))", "above 0"),
    ("tag(lg, interval(1, 2))", "the tag lg means nothing"),
    ("range(3, 1)", "holds no values"),
    ("choice(a, a)", "names a value twice"),
    ("choice(a", "is not an override"),
    ("glob(*)", "cannot be searched"),
]


def test_what_is_no_range_is_refused_with_a_sentence() -> None:
    for text, said in REFUSED:
        with pytest.raises(UserError, match="x.y") as error:
            of(text)
        assert said in str(error.value), text


def test_a_whole_setting_refuses_an_interval_between_fractions() -> None:
    with pytest.raises(UserError, match="whole number"):
        of("interval(0.5, 3)", whole=True)


@settings(max_examples=30)
@given(st.floats(1e-6, 1e6), st.floats(1.0, 100.0), st.floats(0.0, 1.0))
def test_sampled_numbers_are_short_and_stay_inside(low: float, ratio: float, share: float) -> None:
    one = FloatDistribution(low, low * ratio)
    value = low + share * (low * ratio - low)
    read = float(text_of(value, one))
    assert low <= read <= low * ratio
    assert math.isclose(read, value, rel_tol=10.0 ** (1 - DIGITS))


def test_ends_are_all_choices_or_both_ends() -> None:
    assert ends(of("choice(a, b, c)")) == ["a", "b", "c"]
    assert ends(of("interval(0.1, 2)")) == ["0.1", "2.0"]
    assert ends(IntDistribution(3, 3)) == ["3"]


PLACES = [
    (FloatDistribution(0.1, 2.0), 1.0, 1.0),
    (FloatDistribution(0.1, 2.0), 3.0, None),
    (IntDistribution(1, 5, step=2), 3, 3),
    (IntDistribution(1, 5, step=2), 2, None),
    (CategoricalDistribution(["true", "false"]), True, "true"),
    (CategoricalDistribution(["[2,5]", "3"]), [2, 5], "[2,5]"),
    (CategoricalDistribution(["[2,5]", "3"]), 3, "3"),
    (CategoricalDistribution(["a"]), "b", None),
    (FloatDistribution(0.1, 2.0), "x", None),
    (FloatDistribution(0.1, 2.0), None, None),
]


def test_a_setting_of_a_configuration_is_found_in_its_space_or_not() -> None:
    for one, value, expected in PLACES:
        assert value_in(one, value) == expected, (one, value)


def test_overrides_stand_in_the_order_of_the_space() -> None:
    space = {"b": of("choice(u, v)"), "a": of("interval(0, 1)")}
    assert overrides_of({"a": 0.123456, "b": "v"}, space) == ["b=v", "a=0.1235"]


def test_combinations_change_the_last_setting_fastest_and_refuse_intervals() -> None:
    space = {"a": of("choice(u, v)"), "b": of("range(1, 3)")}
    assert combinations(space) == [{"a": "u", "b": 1}, {"a": "u", "b": 2}, {"a": "v", "b": 1}, {"a": "v", "b": 2}]
    with pytest.raises(UserError, match="c is an interval"):
        combinations({**space, "c": of("interval(0, 1)")})
