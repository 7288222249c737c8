"""Cohort of six against six solo runs, on the arms of `leave_one_out` (seed 0), one thread.

    python tests/benchmarks/cohort.py [STEPS] [REPEATS]

Prints the wall-time ratio beside the ideal (T + Σ S_i) / Σ (T_i + S_i): T is what a step computes once for the cohort
(views, teacher forward, resampled maps), S_i what an arm adds, both measured inside the same solo runs. Every loss counts
from the first step on. Cohort and solo runs alternate, and medians over the repeats are compared.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from basd.grid.plan import make_plan
from basd.models.teacher import Teacher, TeacherOutput
from basd.training.batches import StepBatch
from basd.training.cohort import train_cohort
from basd.training.recorder import NullRecorder

WARM = 3  # steps before the clock starts


class Shared:
    """Seconds spent in what is computed once a step; nested calls count once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0
        for owner, name in ((Teacher, "__call__"), (TeacherOutput, "shared"), (StepBatch, "_shared")):
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function):
        def timed(*arguments, **keywords):
            self._depth += 1
            began = time.perf_counter()
            try:
                return function(*arguments, **keywords)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += time.perf_counter() - began

        return timed


def measure(arms, steps: int, shared: Shared) -> tuple[float, float]:
    """Seconds a step: in all, and in what is shared."""
    seen = 0
    marks: list[tuple[float, float]] = []

    def stop() -> bool:
        nonlocal seen
        if seen in (WARM, WARM + steps):
            marks.append((time.perf_counter(), shared.seconds))
        seen += 1
        return seen > WARM + steps

    with tempfile.TemporaryDirectory() as folder:
        directories = [Path(folder) / arm.arm_key for arm in arms]
        train_cohort(arms, directories, [NullRecorder() for _ in arms], stop=stop)
    (began, shared_before), (ended, shared_after) = marks
    return (ended - began) / steps, (shared_after - shared_before) / steps


def main(steps: int = 14, repeats: int = 3) -> None:
    plan = make_plan("leave_one_out", ["seeds=[0]", "warmup=none"])
    arms = list(plan.arms.values())
    shared = Shared()
    cohort: list[float] = []
    solo: dict[str, list[tuple[float, float]]] = {arm.arm_key: [] for arm in arms}
    for _ in range(repeats):
        cohort.append(measure(arms, steps, shared)[0])
        for arm in arms:
            solo[arm.arm_key].append(measure([arm], steps, shared))
    together = statistics.median(cohort)
    whole = {key: statistics.median(total for total, _ in runs) for key, runs in solo.items()}
    once = {key: statistics.median(part for _, part in runs) for key, runs in solo.items()}
    print(f"{'row':18} {'solo':>9} {'T':>9} {'S':>9}   milliseconds a step")
    for row in plan.rows:
        key = plan.cells[row.name][0]
        print(f"{row.name:18} {1e3 * whole[key]:9.1f} {1e3 * once[key]:9.1f} {1e3 * (whole[key] - once[key]):9.1f}")
    alone = sum(whole.values())
    ideal = (max(once.values()) + sum(whole[key] - once[key] for key in whole)) / alone
    print(f"cohort of {len(arms)}: {1e3 * together:.1f} ms a step; {len(arms)} solo runs: {1e3 * alone:.1f} ms")
    print(f"ratio {together / alone:.3f}, ideal {ideal:.3f}, ratio / ideal {together / alone / ideal:.3f}")


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
