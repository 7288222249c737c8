"""What holds for every weighting, the scale, and the weightings that are a formula of one step's losses."""

import dataclasses
import math

import pytest
import torch
from each import each
from torch import Tensor
from weighting_fakes import NAMES, build, check, formula, generators, losses, numbers, ramps, sizes, weigh

from basd.components.losses import LOSSES
from basd.components.weighting import WEIGHTINGS
from basd.components.weighting.fixed import FixedConfig, FixedWeights
from basd.components.weighting.uwso import UWSOConfig

# the scale is in the statistics only; the weights multiply the losses as they are
STATISTICS_ONLY = ("uwso", "uwo")
TOTAL_IS_COUNT = {"uwso": {}, "equal": {}, "dwa": {}, "rlw": {}, "uwo": {"total": "n_active"}}


# -- all --------------------------------------------------------------------------------------------------------------


@each("kind", WEIGHTINGS)
def test_interface(kind: str) -> None:
    config = WEIGHTINGS[kind]()
    assert config.name == kind
    assert config.scale == ("first" if kind == "uwso" else "none")
    values = losses(0.7, 0.3)
    weights = weigh(config.build(NAMES, sizes()), values, factors=ramps(0.5, 0.5))
    assert list(weights) == list(values)
    assert all(w.ndim == 0 and w.dtype == torch.float32 and not w.requires_grad for w in weights.values())
    assert all(w > 0 for w in weights.values())


@each("kind", WEIGHTINGS)
@each("scale", ["first", "first_mean", "none"])
@each("tiny", [0.0, 1e-30, 1e-12])
def test_a_vanishing_loss_has_a_finite_weight(kind: str, scale: str, tiny: float) -> None:
    weighting = build(kind, scale=scale)
    for step, values in enumerate([(tiny, 1.0), (1.0, tiny), (tiny, tiny), (tiny, 1e4)] * 3):
        found = losses(*values)
        weights = weigh(weighting, found, step)
        total = sum(weights[name] * found[name] for name in found) + weighting.term(found, ramps())
        total.backward()
        assert all(math.isfinite(w) for w in numbers(weights))
        assert all(value.grad is not None and torch.isfinite(value.grad) for value in found.values())
        assert all(p.grad is None or torch.isfinite(p.grad) for p in weighting.parameters())


@each("kind", WEIGHTINGS)
@each("scale", ["first", "first_mean", "none"])
def test_state_survives_a_checkpoint(kind: str, scale: str) -> None:
    """Saved and loaded again after every step, also within an epoch: the same bits."""
    table = torch.rand(14, 4, generator=torch.Generator().manual_seed(0)) + 0.1

    def train(restart: bool) -> list[float]:
        weighting = build(kind, scale=scale)
        found: list[float] = []
        for step, row in enumerate(table.tolist()):
            values = losses(*row[: 1 + min(step // 3, 3)])
            found += numbers(weigh(weighting, values, step))
            term = weighting.term(values, ramps())
            found.append(float(term.detach()) if isinstance(term, Tensor) else term)
            if isinstance(term, Tensor):
                term.backward()
                with torch.no_grad():
                    for parameter in weighting.parameters():
                        if parameter.grad is not None:
                            parameter -= 0.1 * parameter.grad
                            parameter.grad = None
            if restart:
                again = build(kind, scale=scale)
                again.load_state_dict(weighting.state_dict())
                weighting = again
        return found

    assert train(restart=True) == train(restart=False)


@each("kind", WEIGHTINGS)
def test_only_active_losses_share(kind: str) -> None:
    """Two of four losses are weighted as if there were no others."""
    among_four, alone = build(kind), build(kind, only=("rel", "spectral"))
    for step in range(12):
        values = losses(0.5 + step, 2.0, names=("rel", "spectral"))
        given, expected = weigh(among_four, values, step), weigh(alone, values, step)
        assert list(given) == ["rel", "spectral"]
        if kind != "rlw":
            check(given, numbers(expected))
        if kind in TOTAL_IS_COUNT:
            assert sum(numbers(weigh(build(kind, **TOTAL_IS_COUNT[kind]), values, step))) == pytest.approx(2)


@each("kind", ["uwso", "dwa", "rlw", "gls", "equal", "fixed"])
@each("options", [{}, {"scale": "first"}, {"scale": "first_mean"}])
def test_one_loss_alone_is_equal_weighting_to_the_bit(kind: str, options: dict[str, str]) -> None:
    """So these weightings count as `equal` in arms with one loss: uwso without a scale, the others with theirs."""
    only = ("rel",)
    weighting = build(kind, only, **options)
    reference = build("equal", only, **({} if kind == "uwso" else options))
    for step, value in enumerate((0.3, 0.7, 0.123, 5.5, 1e-9, 0.0)):
        values = losses(value, names=only)
        assert numbers(weigh(weighting, values, step)) == numbers(weigh(reference, values, step))


# -- the scale --------------------------------------------------------------------------------------------------------

# per step: values of the losses that are active; one comes in at the third step, one at the fourth, and one pauses
HISTORY = [(4.0, 0.1), (2.0, 0.2), (1.0, 0.1, 30.0), (1.0, 0.4, 15.0, 0.5), (0.5, 0.3, 6.0), (0.7, 0.2, 4.0, 0.3)]


@each("kind", WEIGHTINGS)
@each("scale", ["first", "first_mean"])
def test_scale(kind: str, scale: str) -> None:
    """The weights are those that the scaled losses get, divided by the scale; for uwso and uwo they are not divided."""
    scaled, plain = build(kind, scale=scale), build(kind, scale="none")
    first: dict[str, float] = {}
    for step, values in enumerate(HISTORY):
        for name, value in zip(NAMES, values, strict=False):
            first.setdefault(name, value)
        mean = sum(first.values()) / len(first)
        units = [first[name] if scale == "first" else mean for name in NAMES[: len(values)]]
        given = weigh(scaled, losses(*values), step)
        inner = weigh(plain, losses(*(v / unit for v, unit in zip(values, units, strict=True))), step)
        expected = numbers(inner)
        if kind not in STATISTICS_ONLY:
            expected = [w / unit for w, unit in zip(expected, units, strict=True)]
        check(given, expected)


def test_scale_has_a_floor() -> None:
    for kind in ("uwso", "equal"):
        weighting = build(kind, scale="first")
        check(weigh(weighting, losses(0.0, 1.0)), [2.0, 0.0] if kind == "uwso" else [1e6, 1.0])
        check(weigh(weighting, losses(1e-6, 1.0)), [1.0, 1.0] if kind == "uwso" else [1e6, 1.0])


@each("kind", WEIGHTINGS)
def test_with_one_loss_the_mean_of_the_first_values_is_the_first_value(kind: str) -> None:
    first, mean = (build(kind, ("rel",), scale=scale) for scale in ("first", "first_mean"))
    for step, value in enumerate((0.3, 0.7, 0.123, 5.5)):
        values = losses(value, names=("rel",))
        assert numbers(weigh(first, values, step)) == numbers(weigh(mean, values, step))


# -- uwso -------------------------------------------------------------------------------------------------------------


@each("temperature", [0.5, 2.0, 10.0])
@each("total", ["n_active", "one"])
def test_uwso_is_the_softmax_of_inverse_losses(temperature: float, total: str) -> None:
    weights = weigh(build("uwso", scale="none", temperature=temperature, total=total), losses(0.5, 1.0, 2.0, 0.8))
    factor = 4 if total == "n_active" else 1
    check(weights, [factor * w for w in formula([0.5, 1.0, 2.0, 0.8], temperature)])


def test_uwso_starts_equal() -> None:
    config = UWSOConfig()
    assert (config.temperature, config.scale) == (2.0, "first")
    assert (config.total, config.order) == ("n_active", "weights_then_ramp")
    weighting = build("uwso")
    check(weigh(weighting, losses(4.0, 0.1)), [1.0, 1.0])
    check(weigh(weighting, losses(2.0, 0.2)), [2 * w for w in formula([0.5, 2.0], 2.0)])
    # a loss that starts later is divided by its own first value
    check(weigh(weighting, losses(1.0, 0.1, 30.0)), [3 * w for w in formula([0.25, 1.0, 1.0], 2.0)])
    check(weigh(weighting, losses(1.0, 0.1, 15.0)), [3 * w for w in formula([0.25, 1.0, 0.5], 2.0)])


@each("order", ["weights_then_ramp", "ramp_then_weights"])
def test_order_across_a_stagger(order: str) -> None:
    """Three losses run at 1 when the fourth starts at ramp 0.05. The literal order nearly switches the three off."""
    weighting = build("uwso", scale="none", order=order)
    before = weigh(weighting, losses(1.0, 1.0, 1.0))
    assert sum(numbers(before)) == pytest.approx(3)
    factors = ramps(1.0, 1.0, 1.0, 0.05)
    weights = weigh(weighting, losses(1.0, 1.0, 1.0, 1.0), factors=factors)
    total = sum(float(weights[name]) * factors[name] for name in NAMES)
    if order == "ramp_then_weights":
        check(weights, [4 * w for w in formula([1, 1, 1, 0.05], 2.0)])
        assert float(weights["rsd"]) < 0.001 and total == pytest.approx(0.2, abs=0.01)
    else:
        check(weights, [1.0] * 4)
        assert total == pytest.approx(3.05)


def test_ramped_statistics_are_in_units_of_first_values_without_ramp() -> None:
    """The literal order weighs ramped losses in units of the first values, which are not ramped; it ends with the ramps."""
    weighting = build("uwso", order="ramp_then_weights")
    check(weigh(weighting, losses(4.0, 0.1), factors=ramps(0.5, 0.1)), [2 * w for w in formula([0.5, 0.1], 2.0)])
    weights = weigh(weighting, losses(4.0, 0.05), factors=ramps(1.0, 0.4))
    check(weights, [2 * w for w in formula([1.0, 0.2], 2.0)])
    once = build("uwso")
    check(weigh(once, losses(4.0, 0.1)), [1.0, 1.0])
    after = weigh(weighting, losses(2.0, 0.02))
    assert numbers(after) == numbers(weigh(once, losses(2.0, 0.02)))
    # where every ramp is 1 the order has no effect
    first, second = (build("uwso", order=order) for order in ("weights_then_ramp", "ramp_then_weights"))
    for step, history in enumerate(HISTORY):
        assert numbers(weigh(first, losses(*history), step)) == numbers(weigh(second, losses(*history), step))


@each("kind", WEIGHTINGS)
def test_weights_do_not_depend_on_ramps(kind: str) -> None:
    a, b = build(kind), build(kind)
    for step, values in enumerate(((1.0, 2.0), (0.5, 1.9))):
        left = weigh(a, losses(*values), step, ramps(0.1, 0.9))
        assert numbers(left) == numbers(weigh(b, losses(*values), step, ramps(1.0, 1.0)))


# -- controls ---------------------------------------------------------------------------------------------------------


def test_equal_and_fixed() -> None:
    check(weigh(build("equal"), losses(4.0, 0.1, 2.0)), [1.0, 1.0, 1.0])
    weighting = FixedConfig(weights=FixedWeights(rsd=0.1, rel=3.0, attn=0.0)).build(NAMES, sizes())
    check(weigh(weighting, losses(4.0, 0.1, 2.0, 1.0)), [0.1, 3.0, 0.0, 1.0])
    check(weigh(weighting, losses(2.0, 4.0, names=("spectral", "rsd"))), [1.0, 0.1])
    # a weight for every loss, 1 where none is set
    assert {f.name for f in dataclasses.fields(FixedWeights)} >= {*LOSSES, "logit", "feature"}
    assert all(weight == 1.0 for weight in dataclasses.asdict(FixedWeights()).values())


def test_uwo_brings_every_loss_to_one() -> None:
    values = losses(0.5, 1.0, 20.0, 1e-3)
    weights = weigh(build("uwo"), values)
    check(weights, [2.0, 1.0, 0.05, 1000.0])
    assert [float((weights[name] * values[name]).detach()) for name in values] == pytest.approx([1.0] * 4, rel=1e-4)
    # with a scale every weight starts at 1
    weighting = build("uwo", scale="first")
    check(weigh(weighting, losses(4.0, 0.1)), [1.0, 1.0])
    check(weigh(weighting, losses(1.0, 0.2)), [4.0, 0.5])


@each("total, sums_to", [("n_active", 3), ("one", 1)])
def test_uwo_with_a_total_keeps_the_losses_equal(total: str, sums_to: int) -> None:
    weights = weigh(build("uwo", total=total), losses(0.5, 1.0, 20.0))
    check(weights, [sums_to * w / 3.05 for w in (2.0, 1.0, 0.05)])


def test_gls_is_the_geometric_mean() -> None:
    """The value and the gradient of the weighted sum are those of (Π L)^{1/n}."""
    numbers_of_losses = (0.5, 1.7, 20.0, 3e-3)
    for count in (1, 2, 3, 4):
        values = losses(*numbers_of_losses[:count])
        weights = weigh(build("gls"), values)
        total = torch.stack([weights[name] * values[name] for name in values]).sum()
        plain = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in numbers_of_losses[:count]]
        product = torch.stack(plain).prod() ** (1 / count)
        assert float(total.detach()) == pytest.approx(float(product.detach()), rel=1e-4)
        expected = torch.autograd.grad(product, plain)
        given = torch.autograd.grad(total, list(values.values()))
        assert [float(g) for g in given] == pytest.approx([float(g) for g in expected], rel=1e-4)


def test_rlw_is_the_softmax_of_standard_normals() -> None:
    weighting, one, values = build("rlw"), build("rlw", total="one"), losses(9.0, 0.1, 1.0, 1.0)
    logs = []
    for step in range(1000):
        weights = numbers(weigh(weighting, values, step))
        assert sum(weights) == pytest.approx(4)
        if step < 10:
            assert numbers(weigh(one, values, step)) == pytest.approx([w / 4 for w in weights]), step
        logs.append([math.log(w) for w in weights])
    ratios = torch.tensor(logs)
    # differences of logs are differences of normals: no mean, variance 2, whatever the losses
    for i, j in ((0, 1), (2, 3), (0, 3)):
        difference = ratios[:, i] - ratios[:, j]
        assert float(difference.mean()) == pytest.approx(0, abs=0.15)
        assert float(difference.var()) == pytest.approx(2, abs=0.3)


def test_rlw_draws_from_the_stream_it_is_given() -> None:
    weighting = build("rlw")
    asked: list[str] = []

    def generator(purpose: str) -> torch.Generator:
        asked.append(purpose)
        return torch.Generator().manual_seed(3)

    state = torch.get_rng_state()
    first = numbers(weighting(losses(1.0, 2.0), ramps(), 0, generator))
    assert numbers(weighting(losses(5.0, 0.1), ramps(), 7, generator)) == first
    assert asked == ["rlw", "rlw"] and torch.equal(torch.get_rng_state(), state)
    assert numbers(weighting(losses(1.0, 2.0), ramps(), 0, generators(4))) != first
    # a loss that joins does not change the ratio of the others
    more = numbers(weighting(losses(1.0, 2.0, 3.0), ramps(), 0, generator))
    assert more[0] / more[1] == pytest.approx(first[0] / first[1])
