"""Search spaces: settings with values in Hydra's sweep syntax, as distributions of Optuna.

| syntax | meaning |
|---|---|
| `choice(a, b)` or `a,b` | one of these; whole configurations of a group too, `selector=choice(uniform, forward)` |
| `range(1, 7)`, `range(0, 1, 0.25)` | whole numbers, or numbers in equal steps; the end is left out |
| `interval(0.1, 1)` | any number between; whole numbers where the setting is one |
| `tag(log, interval(1e-4, 1e-2))` | the same, sampled in the logarithm |
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
from hydra.errors import HydraException

from basd.errors import UserError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from optuna.distributions import BaseDistribution

SYNTAX = "choice(a, b), range(1, 5), interval(0.1, 1) or tag(log, interval(1e-4, 1e-2))"
# Digits of a number between the ends of an interval: what it does is not finer than that, and people read it.
DIGITS = 4


def parse_override(text: str) -> Override:
    """An override as Hydra reads it."""
    try:
        (override,) = OverridesParser.create().parse_overrides([text])
    except HydraException as error:
        raise UserError(f'"{text}" is not an override; write KEY=VALUE, or KEY={SYNTAX}.') from error
    return override


def distribution_of(text: str, *, whole: bool) -> BaseDistribution:
    """The distribution that KEY=SWEEP describes; `whole`: the setting is a whole number."""
    from optuna.distributions import CategoricalDistribution

    override = parse_override(text)
    key = override.key_or_group
    if not override.is_sweep_override():
        raise UserError(f"{text} is one value and nothing to search; write {SYNTAX}.")
    value = override.value()
    try:
        if isinstance(value, IntervalSweep):
            return _interval(key, value, whole)
        if isinstance(value, RangeSweep) and not value.shuffle:
            return _range(key, value)
        if isinstance(value, ChoiceSweep | RangeSweep):
            # as texts of overrides: one of them may be a list, or the name of a group's choice
            choices = list(override.sweep_string_iterator())
            if len(set(choices)) < len(choices):
                raise UserError(f"{text} names a value twice.")
            return CategoricalDistribution(choices)
    except (ValueError, HydraException) as error:
        raise UserError(f"{text} is no range of values: {' '.join(str(error).split())}") from error
    raise UserError(f"{text} cannot be searched; write {SYNTAX}.")


def _interval(key: str, value: IntervalSweep, whole: bool) -> BaseDistribution:
    from optuna.distributions import FloatDistribution, IntDistribution

    low, high = value.start, value.end
    assert low is not None and high is not None
    unknown = set(value.tags) - {"log"}
    if unknown:
        raise UserError(f"{key}: the tag {sorted(unknown)[0]} means nothing here; log is the only one.")
    log = "log" in value.tags
    if low >= high:
        raise UserError(f"{key}=interval({low}, {high}) holds no numbers; the first one is the least.")
    if log and low <= 0:
        raise UserError(f"{key}: the logarithm of an interval needs a least value above 0, not {low}.")
    if whole:
        if int(low) != low or int(high) != high:
            raise UserError(f"{key} is a whole number; interval({low}, {high}) needs whole ends.")
        return IntDistribution(int(low), int(high), log=log)
    return FloatDistribution(float(low), float(high), log=log)


def _range(key: str, value: RangeSweep) -> BaseDistribution:
    from optuna.distributions import FloatDistribution, IntDistribution

    start, step = Decimal(str(value.start)), Decimal(str(value.step))
    assert value.stop is not None
    # steps that stay below the end, which is left out
    steps = math.ceil((Decimal(str(value.stop)) - start) / step) - 1 if step > 0 else -1
    if steps < 0:
        raise UserError(f"{key}=range({value.start}, {value.stop}, {value.step}) holds no values.")
    last = start + steps * step
    if all(number == number.to_integral_value() for number in (start, step)):
        return IntDistribution(int(start), int(last), step=int(step))
    return FloatDistribution(float(start), float(last), step=float(step))


def text_of(value: Any, distribution: BaseDistribution) -> str:
    """A sampled value as the command line writes it. Numbers of an interval have `DIGITS` significant digits."""
    from optuna.distributions import FloatDistribution

    if not isinstance(distribution, FloatDistribution):
        return str(value)
    if distribution.step is None:
        rounded = float(f"{value:.{DIGITS}g}")
        return repr(min(max(rounded, distribution.low), distribution.high))
    low, step = Decimal(repr(distribution.low)), Decimal(repr(distribution.step))
    # exact steps: 0.3, where three times 0.1 in floats is 0.30000000000000004
    return str(float(low + round((Decimal(repr(value)) - low) / step) * step))


def ends(distribution: BaseDistribution) -> list[str]:
    """Values that stand for a distribution when a space is checked: all choices, or both ends."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return [str(choice) for choice in distribution.choices]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return list(dict.fromkeys(text_of(value, distribution) for value in (distribution.low, distribution.high)))


def value_in(distribution: BaseDistribution, value: Any) -> Any:
    """A setting's value as the distribution holds it; None where it lies outside."""
    from optuna.distributions import CategoricalDistribution

    given = plain_text(value) if isinstance(distribution, CategoricalDistribution) else value
    try:
        inside = distribution._contains(distribution.to_internal_repr(given))
    except (ValueError, TypeError):
        return None
    return given if inside else None


def plain_text(value: Any) -> str:
    """A value as the command line writes it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"[{','.join(plain_text(one) for one in value)}]" if isinstance(value, list | tuple) else str(value)


def overrides_of(params: Mapping[str, Any], space: Mapping[str, BaseDistribution]) -> list[str]:
    """Overrides that a trial's parameters stand for, in the order of the space."""
    return [f"{key}={text_of(params[key], one)}" for key, one in space.items() if key in params]


def combinations(space: Mapping[str, BaseDistribution]) -> list[dict[str, Any]]:
    """Every combination of a space without intervals, the last setting changing fastest; `UserError` where it has one."""
    values: list[Sequence[Any]] = []
    for key, distribution in space.items():
        listed = _listed(distribution)
        if listed is None:
            raise UserError(f"{key} is an interval, whose values cannot be listed; sampler=grid needs choice or range.")
        values.append(listed)
    return [dict(zip(space, combination, strict=True)) for combination in itertools.product(*values)]


def _listed(distribution: BaseDistribution) -> list[Any] | None:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution) and not distribution.log:
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        count = round((distribution.high - distribution.low) / distribution.step)
        return [distribution.low + n * distribution.step for n in range(count + 1)]
    return None
