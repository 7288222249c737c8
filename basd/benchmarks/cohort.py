"""`basd bench cohort`: A arms side by side against T + A·S, and against A solo runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from basd.benchmarks.setup import Setup
from basd.benchmarks.timing import Ratio, Report, Times, alternate, device_name, now
from basd.models.teacher import teacher_title

ARMS = 8


def run(overrides: Sequence[str], repeats: int) -> Report:
    """A solo arm, and a cohort of eight of the same configuration, step by step in turn.

    T and S come from the solo arm's neighbour, a cohort of two whose second arm's part holds no teacher.
    """
    setup = Setup(overrides)
    device = setup.device
    parts: dict[str, list[float]] = {"first": [], "second": []}
    last = 0.0

    def began() -> bool:
        nonlocal last
        last = now(device)
        return False

    def progress(key: str, _step: int, _total: int) -> None:
        nonlocal last
        ended = now(device)
        parts["first" if key.startswith("0-") else "second"].append(ended - last)
        last = ended

    with setup.running() as start:
        arm = setup.arm()
        solo, cohort = start([arm]), start([arm] * ARMS)
        pair = start([arm] * 2, stop=began, progress=progress)
        times = alternate(
            {"solo step": solo, "step of two": pair, f"step of {ARMS}": cohort},
            repeats,
            device,
            warm=3 if device.type == "cuda" else 1,
        )
        used = device_name(device)
    seconds = {**times.seconds, **{f"two: {name} arm": values[-repeats:] for name, values in parts.items()}}
    measured = Times(seconds)

    def split(at: Mapping[str, float]) -> tuple[float, float]:
        own = at["two: second arm"]
        return max(0.0, at["two: first arm"] - own), own

    def over_ideal(at: Mapping[str, float]) -> float:
        shared, own = split(at)
        return at[f"step of {ARMS}"] / (shared + ARMS * own)

    def speed_up(at: Mapping[str, float]) -> float:
        return ARMS * at["solo step"] / at[f"step of {ARMS}"]

    def ideal(at: Mapping[str, float]) -> float:
        shared, own = split(at)
        return ARMS * (shared + own) / (shared + ARMS * own)

    ratios = (
        Ratio(f"cohort of {ARMS} ÷ (T + {ARMS}·S)", measured.ratio(over_ideal), "≤ 1.10"),
        Ratio(f"speed-up over {ARMS} solo runs", measured.ratio(speed_up)),
        Ratio("speed-up that T and S allow", measured.ratio(ideal)),
        Ratio("speed-up ÷ what T and S allow", measured.ratio(lambda at: speed_up(at) / ideal(at)), "≥ 0.9"),
    )
    settings = {
        "teacher": teacher_title(setup.config.teacher),
        "method": setup.config.method,
        "batch": setup.config.recipe.batch_size,
        "arms": ARMS,
        "overrides": setup.overrides,
    }
    shared = measured.ratio(lambda at: split(at)[0])
    figures = {"T": (shared, "s"), "S": (measured["two: second arm"], "s")}
    return Report("cohort", used, settings, measured.measures(), ratios, figures)
