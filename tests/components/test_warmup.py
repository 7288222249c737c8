import pytest
from each import each

from basd.components.warmup import (
    WARMUPS,
    NoWarmupConfig,
    SimultaneousConfig,
    StaggeredConfig,
    Starts,
    linear_ramp,
)

NAMES = ("rsd", "rel", "attn", "spectral")


def curve(config: StaggeredConfig | SimultaneousConfig | NoWarmupConfig, loss: str, steps: int = 200) -> list[float]:
    return [config.ramp(loss, step, steps) for step in range(steps)]


@each("loss, start", [("rsd", 0), ("rel", 10), ("attn", 20), ("spectral", 30)])
def test_staggered_defaults(loss: str, start: int) -> None:
    ramp = curve(StaggeredConfig(), loss)
    assert all(value == 0 for value in ramp[:start])
    assert all(value == 1 for value in ramp[start + 20 :])
    # linear over 20 steps, at the start or the end of a step
    for step in range(start, start + 20):
        assert (step - start) / 20 - 1e-9 <= ramp[step] <= (step + 1 - start) / 20 + 1e-9
    assert ramp[start] > 0  # a loss counts from the step it starts at
    differences = [b - a for a, b in zip(ramp[start : start + 19], ramp[start + 1 : start + 20], strict=True)]
    assert differences == pytest.approx([0.05] * 19)


def test_starts_are_settings_and_so_is_the_order() -> None:
    config = StaggeredConfig(starts=Starts(rsd=0.3, rel=0.2, attn=0.1, spectral=0.0), length=0.05)
    first = {name: next(i for i, v in enumerate(curve(config, name)) if v > 0) for name in NAMES}
    assert first == {"rsd": 60, "rel": 40, "attn": 20, "spectral": 0}
    assert [curve(config, name)[first[name] + 10] for name in NAMES] == [1.0] * 4


def test_a_start_at_the_end_means_never_and_a_length_of_zero_is_a_switch() -> None:
    assert not any(curve(StaggeredConfig(starts=Starts(rsd=1.0)), "rsd"))
    ramp = curve(StaggeredConfig(length=0.0), "rel")
    assert ramp[:10] == [0.0] * 10 and ramp[10:] == [1.0] * 190


def test_simultaneous_and_none() -> None:
    assert {name: config().name for name, config in WARMUPS.items()} == {name: name for name in WARMUPS}
    assert {"staggered", "simultaneous", "none"} <= set(WARMUPS)
    curves = [curve(SimultaneousConfig(length=0.2), name) for name in NAMES]
    assert all(c == curves[0] for c in curves)
    assert 0 < curves[0][0] <= 0.05 and curves[0][40:] == [1.0] * 160
    assert curves[0] == sorted(curves[0])
    assert all(curve(NoWarmupConfig(), name) == [1.0] * 200 for name in NAMES)


@each("kind", WARMUPS)
@each("steps", [1, 2, 3, 7, 1000])
def test_any_length_of_training(kind: str, steps: int) -> None:
    for name in NAMES:
        ramp = curve(WARMUPS[kind](), name, steps)
        assert all(0 <= value <= 1 for value in ramp) and ramp == sorted(ramp)


def test_starts_are_exact() -> None:
    """Where a share of the steps is a whole number, rounding does not delay the start."""
    for steps in range(20, 2001, 20):
        for name, share in (("rel", 5), ("attn", 10), ("spectral", 15)):
            start = share * steps // 100
            assert StaggeredConfig().ramp(name, start, steps) > 0
            assert StaggeredConfig().ramp(name, start - 1, steps) == 0
    # a start between two steps
    assert linear_ramp(2, 2.5, 4) == 0
    assert linear_ramp(3, 2.5, 4) == pytest.approx(1.5 / 4)
    assert linear_ramp(100, 2.5, 4) == 1
