"""The weightings with a memory, learned numbers (uncertainty, imtl_l) and epoch means (dwa), and the direction that three share."""

import math
from typing import Any

import pytest
import torch
from each import each
from torch import Tensor
from weighting_fakes import NAMES, build, check, losses, numbers, ramps, weigh

from basd.components.weighting import WEIGHTINGS
from basd.components.weighting.base import Weighting
from basd.components.weighting.learned import LearnedWeighting


def learned(kind: str, **options: Any) -> LearnedWeighting:
    weighting = build(kind, **options)
    assert isinstance(weighting, LearnedWeighting)
    return weighting


def the_formula(kind: str, s: Tensor, loss: Tensor) -> Tensor:
    return loss / (2 * s.exp()) + s / 2 if kind == "uncertainty" else s.exp() * loss - s


START = {"uncertainty": -0.5, "imtl_l": 0.0}


def set_s(weighting: LearnedWeighting, **values: float) -> None:
    with torch.no_grad():
        for name, value in values.items():
            weighting.s[name].fill_(value)


# -- uncertainty, imtl_l ----------------------------------------------------------------------------------------------


@each("kind", START)
def test_start(kind: str) -> None:
    weighting = learned(kind)
    assert {name: float(s.detach()) for name, s in weighting.s.items()} == dict.fromkeys(NAMES, START[kind])
    values = losses(4.0, 0.1)
    check(weigh(weighting, values), [0.5 * math.exp(0.5)] * 2 if kind == "uncertainty" else [1.0] * 2)
    # the term gives the losses no gradient
    term = weighting.term(values, ramps())
    assert isinstance(term, Tensor)
    term.backward()
    assert all(value.grad is None for value in values.values())
    penalty = START[kind] / 2 if kind == "uncertainty" else -START[kind]
    assert float(term.detach()) == pytest.approx(2 * penalty)


@each("kind", START)
@each("factors", [(1.0, 1.0, 1.0), (0.3, 1.0, 0.01)])
@each("scale", ["none", "first", "first_mean"])
def test_total_is_the_formula(kind: str, factors: tuple[float, ...], scale: str) -> None:
    """Value, gradient for the losses and gradient for s of Σ ramp·formula(s, L/scale)."""
    weighting = learned(kind, scale=scale)
    weigh(weighting, losses(2.0, 0.5, 0.1))
    units = {"none": [1.0] * 3, "first": [2.0, 0.5, 0.1], "first_mean": [2.6 / 3] * 3}[scale]
    set_s(weighting, rsd=0.7, rel=-1.1, attn=0.2)
    names = NAMES[:3]
    values = losses(3.0, 0.4, 0.9)
    weights = weigh(weighting, values, factors=ramps(*factors))
    total = sum(weights[n] * ramps(*factors)[n] * values[n] for n in names) + weighting.term(values, ramps(*factors))
    given = torch.autograd.grad(total, [*values.values(), *(weighting.s[name] for name in names)])
    s = [weighting.s[name].detach().double().requires_grad_() for name in names]
    plain = [value.detach().double().requires_grad_() for value in values.values()]
    expected_total = torch.zeros((), dtype=torch.float64)
    for number, (factor, unit) in enumerate(zip(factors, units, strict=True)):
        expected_total = expected_total + factor * the_formula(kind, s[number], plain[number] / unit)
    expected = torch.autograd.grad(expected_total, [*plain, *s])
    assert float(total.detach()) == pytest.approx(float(expected_total.detach()), rel=1e-5)
    assert [float(g) for g in given] == pytest.approx([float(g) for g in expected], rel=1e-4)


def settle(weighting: LearnedWeighting, values: dict[str, Tensor], factors: dict[str, float]) -> None:
    """Move each s to the point where its gradient changes sign."""
    optimizer = torch.optim.Rprop(weighting.parameters(), lr=0.5, step_sizes=(1e-7, 2.0))
    for step in range(50):
        weigh(weighting, values, step, factors)
        optimizer.zero_grad()
        term = weighting.term(values, factors)
        assert isinstance(term, Tensor)
        term.backward()
        optimizer.step()


@each("kind", START)
@each("scale", ["none", "first"])
def test_s_settles_where_every_weighted_loss_is_alike(kind: str, scale: str) -> None:
    """uncertainty: ½; imtl_l: 1. Neither the ramps nor the scale move that."""
    weighting = learned(kind, scale=scale)
    weigh(weighting, losses(1.0, 1.0, 5.0))
    values = losses(3.0, 0.2, 1.0)
    settle(weighting, values, ramps(1.0, 0.2, 0.05))
    weights = weigh(weighting, values)
    weighted = [float((weights[name] * values[name]).detach()) for name in values]
    assert weighted == pytest.approx([0.5 if kind == "uncertainty" else 1.0] * 3, rel=1e-3)


@each("kind", START)
def test_a_loss_that_joins_starts_cleanly(kind: str) -> None:
    """Before a loss is active its s has no gradient: it does not move and has no state in the optimizer."""
    weighting = learned(kind)
    optimizer = torch.optim.AdamW(weighting.parameters(), lr=0.1, weight_decay=0.0)
    for step in range(5):
        values = losses(3.0, 0.2)
        weigh(weighting, values, step)
        optimizer.zero_grad(set_to_none=True)
        term = weighting.term(values, ramps())
        assert isinstance(term, Tensor)
        term.backward()
        optimizer.step()
    moved = {name: float(s.detach()) != START[kind] for name, s in weighting.s.items()}
    assert moved == {"rsd": True, "rel": True, "attn": False, "spectral": False}
    assert all(weighting.s[name] not in optimizer.state for name in ("attn", "spectral"))


@each("kind", sorted(set(WEIGHTINGS) - set(START)))
def test_the_others_learn_nothing(kind: str) -> None:
    weighting = build(kind)
    assert not list(weighting.parameters()) and weighting.term(losses(1.0, 2.0), ramps()) == 0.0


# -- dwa --------------------------------------------------------------------------------------------------------------


class NaiveDWA:
    """Epoch means of every loss in lists; written from the paper's formula."""

    def __init__(self, steps_per_epoch: int, temperature: float) -> None:
        self.steps_per_epoch, self.temperature = steps_per_epoch, temperature
        self.seen: dict[str, dict[int, list[float]]] = {}

    def weights(self, values: dict[str, float], step: int) -> list[float]:
        epoch = step // self.steps_per_epoch
        ratios = []
        for name in values:
            means = [sum(v) / len(v) for e, v in sorted(self.seen.get(name, {}).items()) if e < epoch]
            ratios.append(means[-1] / means[-2] if len(means) >= 2 else 1.0)
        powers = [math.exp(r / self.temperature) for r in ratios]
        for name, value in values.items():
            self.seen.setdefault(name, {}).setdefault(epoch, []).append(value)
        return [len(values) * p / sum(powers) for p in powers]


@each("steps_per_epoch", [1, 3, 4])
@each("temperature", [0.5, 2.0])
@each("scale", ["none", "first", "first_mean"])
def test_dwa_equals_the_formula(steps_per_epoch: int, temperature: float, scale: str) -> None:
    """Losses that join within an epoch and one that pauses for more than one: each has its own two epochs."""
    weighting = build("dwa", steps_per_epoch=steps_per_epoch, temperature=temperature, scale=scale)
    naive = NaiveDWA(steps_per_epoch, temperature)
    table = (torch.rand(30, 4, generator=torch.Generator().manual_seed(0)) + 0.2).tolist()
    first: dict[str, float] = {}
    for step, row in enumerate(table):
        active = ["rsd"]
        if step >= 5:
            active.append("rel")
        if step >= 9 and not 15 <= step < 22:
            active.append("spectral")
        values = {name: row[NAMES.index(name)] for name in active}
        for name in active:
            first.setdefault(name, values[name])
        mean = sum(first.values()) / len(first)
        expected = naive.weights(values, step)
        if scale != "none":
            units = [first[name] if scale == "first" else mean for name in active]
            expected = [w / unit for w, unit in zip(expected, units, strict=True)]
        given = weigh(weighting, {name: torch.tensor(value) for name, value in values.items()}, step)
        check(given, expected)


def test_dwa_is_equal_for_two_epochs_and_then_favours_the_slow() -> None:
    weighting = build("dwa", steps_per_epoch=2)
    for step in range(4):
        check(weigh(weighting, losses(4.0 - step, 3.0), step), [1.0, 1.0])
    # means 3.5 then 1.5 against 3 and 3
    weights = numbers(weigh(weighting, losses(1.0, 3.0), 4))
    falls, stays = math.exp(1.5 / 3.5 / 2), math.exp(1 / 2)
    assert weights == pytest.approx([2 * falls / (falls + stays), 2 * stays / (falls + stays)], rel=1e-4)
    assert weights[0] < 1 < weights[1]


# -- one direction ----------------------------------------------------------------------------------------------------


def direction(weighting: Weighting, theta: Tensor, centres: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient for θ of the weighted sum of unlike losses, and Σ ∇L/L; float64 but for the weights."""
    theta = theta.detach().requires_grad_()
    values = {name: units[k] * ((theta - centres[k]) ** 2).mean() for k, name in enumerate(NAMES)}
    weights = weigh(weighting, {name: value.detach().float() for name, value in values.items()})
    total = sum(weights[name].double() * values[name] for name in NAMES)
    logs = sum(value.log() for value in values.values())
    assert isinstance(total, Tensor) and isinstance(logs, Tensor)
    (given,) = torch.autograd.grad(total, theta, retain_graph=True)
    (expected,) = torch.autograd.grad(logs, theta)
    return given, expected


def angle(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0))


@each("seed, scale", [(0, "none"), (1, "none"), (2, "first")])
def test_uwo_gls_and_converged_uncertainty_share_one_direction(seed: int, scale: str) -> None:
    """All three go along Σ ∇L/L, only the length differs: UW-O Σ, converged uncertainty ½Σ, GLS GM/n·Σ."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 6, generator=g, dtype=torch.float64)
    units = torch.tensor([0.01, 1.0, 30.0, 0.3], dtype=torch.float64)
    start, theta = torch.randn(2, 6, generator=g, dtype=torch.float64)
    lengths = {}
    for kind in ("uwo", "gls", "uncertainty", "imtl_l"):
        weighting = build(kind, scale="none" if kind == "uwo" else scale)
        direction(weighting, start, centres, units)  # the first values
        if isinstance(weighting, LearnedWeighting):
            values = {name: units[k] * ((theta - centres[k]) ** 2).mean() for k, name in enumerate(NAMES)}
            for s in weighting.s.values():
                s.data.zero_()
            settle(weighting, {name: value.float() for name, value in values.items()}, ramps())
        given, expected = direction(weighting, theta, centres, units)
        assert angle(given, expected) > 0.999999, kind
        lengths[kind] = float(given.norm() / expected.norm())
    assert lengths["uwo"] == pytest.approx(1, rel=1e-3)
    assert lengths["uncertainty"] == pytest.approx(0.5, rel=1e-3)
    assert lengths["imtl_l"] == pytest.approx(1, rel=1e-3)
    if scale == "none":
        values = torch.stack([units[k] * ((theta - centres[k]) ** 2).mean() for k in range(4)])
        assert lengths["gls"] == pytest.approx(float(values.log().mean().exp()) / 4, rel=1e-3)
    # other weightings do not
    for kind in ("equal", "uwso"):
        given, expected = direction(build(kind, scale="none"), theta, centres, units)
        assert angle(given, expected) < 0.99
