import math

import pytest
import torch
from torch import Tensor

from basd.components.weighting import WEIGHTINGS
from basd.components.weighting.fixed import FixedConfig, FixedWeights
from basd.components.weighting.uwso import UWSOConfig, UWSOWeighting

NAMES = ("rsd", "rel", "attn", "spectral")


def losses(*values: float, names: tuple[str, ...] = NAMES) -> dict[str, Tensor]:
    return {name: torch.tensor(value, requires_grad=True) for name, value in zip(names, values, strict=False)}


def ramps(*values: float) -> dict[str, float]:
    return dict(zip(NAMES, values or (1.0,) * 4, strict=False))


def uwso(**options: object) -> UWSOWeighting:
    weighting = UWSOConfig(**options).build(NAMES)  # type: ignore[arg-type]
    assert isinstance(weighting, UWSOWeighting)
    return weighting


def formula(statistics: list[float], temperature: float) -> list[float]:
    scores = [1 / (s + 1e-8) / temperature for s in statistics]
    powers = [math.exp(s - max(scores)) for s in scores]
    return [p / sum(powers) for p in powers]


def check(weights: dict[str, Tensor], expected: list[float]) -> None:
    assert [float(w) for w in weights.values()] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert not any(w.requires_grad for w in weights.values())


@pytest.mark.parametrize("temperature", [0.5, 2.0, 10.0])
@pytest.mark.parametrize("total", ["n_active", "one"])
def test_uwso_is_the_softmax_of_inverse_losses(temperature: float, total: str) -> None:
    weights = uwso(scale="none", temperature=temperature, total=total)(losses(0.5, 1.0, 2.0, 0.8), ramps())
    factor = 4 if total == "n_active" else 1
    check(weights, [factor * w for w in formula([0.5, 1.0, 2.0, 0.8], temperature)])


def test_defaults() -> None:
    config = UWSOConfig()
    assert (config.temperature, config.scale, config.total, config.order) == (
        2.0,
        "first",
        "n_active",
        "weights_then_ramp",
    )


def test_only_active_losses_share() -> None:
    weights = uwso(scale="none")(losses(0.5, 2.0), ramps())
    assert list(weights) == ["rsd", "rel"]
    check(weights, [2 * w for w in formula([0.5, 2.0], 2.0)])
    check(uwso()(losses(3.0), ramps()), [1.0])


def test_scale_first_divides_by_the_first_active_value() -> None:
    weighting = uwso()
    check(weighting(losses(4.0, 0.1), ramps()), [1.0, 1.0])
    check(weighting(losses(2.0, 0.2), ramps()), [2 * w for w in formula([0.5, 2.0], 2.0)])
    # a loss that starts later is divided by its own first value
    got = weighting(losses(1.0, 0.1, 30.0), ramps())
    check(got, [3 * w for w in formula([0.25, 1.0, 1.0], 2.0)])
    got = weighting(losses(1.0, 0.1, 15.0), ramps())
    check(got, [3 * w for w in formula([0.25, 1.0, 0.5], 2.0)])


def test_scale_first_has_a_floor() -> None:
    weighting = uwso()
    got = weighting(losses(0.0, 1.0), ramps())
    assert all(math.isfinite(float(w)) for w in got.values())
    check(weighting(losses(1e-6, 1.0), ramps()), [1.0, 1.0])


def test_first_values_are_kept_in_the_state() -> None:
    weighting = uwso()
    weighting(losses(4.0, 0.1), ramps())
    again = uwso()
    again.load_state_dict(weighting.state_dict())
    check(again(losses(2.0, 0.2), ramps()), [float(w) for w in weighting(losses(2.0, 0.2), ramps()).values()])
    check(again(losses(2.0, 0.2), ramps()), [2 * w for w in formula([0.5, 2.0], 2.0)])
    fresh = uwso()
    check(fresh(losses(2.0, 0.2), ramps()), [1.0, 1.0])


@pytest.mark.parametrize("order", ["weights_then_ramp", "ramp_then_weights"])
def test_order_across_a_stagger(order: str) -> None:
    """Three losses run at 1; the fourth comes in at ramp 0.05. The literal order switches the three off."""
    weighting = uwso(scale="none", order=order)
    before = weighting(losses(1.0, 1.0, 1.0), ramps(1.0, 1.0, 1.0))
    assert sum(float(w) for w in before.values()) == pytest.approx(3)
    factors = ramps(1.0, 1.0, 1.0, 0.05)
    weights = weighting(losses(1.0, 1.0, 1.0, 1.0), factors)
    total = sum(float(weights[name]) * factors[name] for name in NAMES)
    if order == "ramp_then_weights":
        check(weights, [4 * w for w in formula([1, 1, 1, 0.05], 2.0)])
        assert float(weights["rsd"]) < 0.001 and total == pytest.approx(0.2, abs=0.01)
    else:
        check(weights, [1.0] * 4)
        assert total == pytest.approx(3.05)


def test_weights_do_not_depend_on_ramps_by_default() -> None:
    a, b = uwso(), uwso()
    for values in ((1.0, 2.0), (0.5, 1.9)):
        left, right = a(losses(*values), ramps(0.1, 0.9)), b(losses(*values), ramps(1.0, 1.0))
        check(left, [float(w) for w in right.values()])


def test_equal() -> None:
    check(WEIGHTINGS["equal"]().build(NAMES)(losses(4.0, 0.1, 2.0), ramps()), [1.0, 1.0, 1.0])


def test_fixed() -> None:
    weighting = FixedConfig(weights=FixedWeights(rsd=0.1, rel=3.0, attn=0.0)).build(NAMES)
    check(weighting(losses(4.0, 0.1, 2.0, 1.0), ramps()), [0.1, 3.0, 0.0, 1.0])


@pytest.mark.parametrize("kind", WEIGHTINGS)
def test_interface(kind: str) -> None:
    config = WEIGHTINGS[kind]()
    assert config.name == kind
    values = losses(0.7, 0.3)
    weights = config.build(NAMES)(values, ramps(0.5, 0.5))
    assert list(weights) == list(values)
    assert all(w.ndim == 0 and w.dtype == torch.float32 and not w.requires_grad for w in weights.values())
