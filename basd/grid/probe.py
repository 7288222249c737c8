"""What a table will cost: a few real steps of each of its configurations, timed, and the wall time that follows from them.

A step of a cohort costs T + Σ S: T is what its arms share (views, teacher forward, resampled maps), S an arm's own part.
Nothing of a probe stays: it trains throwaway arms in a temporary directory, tells neither ledger nor tracking, looks at no
test image, and leaves the random state as it was.
"""

from __future__ import annotations

import dataclasses
import heapq
import logging
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from basd.config import FrozenArm, digest, from_dict
from basd.errors import TOO_MANY_ARMS
from basd.grid.options import GridOptions
from basd.training import random_streams as streams
from basd.training.arm import EVALUATION_BATCH, TrainingArm
from basd.training.cohort import ArmResult, Cohort
from basd.training.device import choose_device, cpu_threads
from basd.training.memory import peak_bytes
from basd.training.recorder import NullRecorder

WARM = 2  # steps before the clock counts: first allocations, and the diagnostics of a first step
TIMED = 4
# More steps than any probe makes, so that none of them ends an arm.
ENDLESS = 10**6
# Of a configuration that does not fit beside the arms that measuring it takes, though it may fit alone.
NO_ROOM = (
    "the arms that measure it do not fit side by side; lower recipe.batch_size, or leave measuring out (--no-probe)"
)


@dataclass(frozen=True)
class Costs:
    """Seconds on one process of this machine, for arms of one structure (`structure_of`)."""

    setup: float  # data, teacher and arms of a cohort, once
    shared: float  # T of a step
    step: dict[str, float]  # S of a step with every loss counting, by configuration key
    evaluation: dict[str, float]  # of one image, by configuration key
    steps_per_epoch: int
    validation_images: int
    test_images: int
    # bytes at the peak of the cohort that was measured, by the device's allocator; on CPU what the process then held
    peak: int | None = None
    # of it, what each arm holds between steps (weights, gradients, optimizer), by configuration key; the others' mean for
    # those that could not be measured
    held: dict[str, int] = field(default_factory=dict)
    # bytes of all arms that were measured side by side
    held_then: int = 0

    def of_step(self, arm: FrozenArm) -> float:
        """S; the median of the others for an arm that could not be measured."""
        return self.step.get(arm.configuration_key, statistics.median(self.step.values()))

    def memory(self, arms: Sequence[FrozenArm]) -> int | None:
        """Bytes at the peak of a cohort of these arms: the measured peak with what they hold in place of what was held then."""
        if self.peak is None or not self.held:
            return None
        usual = round(statistics.mean(self.held.values()))
        return self.peak - self.held_then + sum(self.held.get(arm.configuration_key, usual) for arm in arms)

    def of_evaluations(self, arm: FrozenArm) -> float:
        """All evaluations of an arm: validation on its way and after its last step, then test and validation."""
        epochs = math.ceil(arm.total_steps / self.steps_per_epoch)
        validations = (epochs - 1) // int(arm.config["recipe"]["validate_every"]) + 2
        image = self.evaluation.get(arm.configuration_key, statistics.median(self.evaluation.values()))
        return image * (validations * self.validation_images + self.test_images)


@dataclass(frozen=True)
class Probe:
    """Costs by structure; configurations that failed, with the reason; the seconds that the probe itself took."""

    costs: dict[str, Costs] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def of_step(self, arm: FrozenArm) -> float | None:
        """S of an arm's configuration, where it was measured.

        What only some arms share, such as the teacher's forward on another mixing, counts for the first of them.
        """
        costs = self.costs.get(structure_of(arm))
        return costs.step.get(arm.configuration_key) if costs else None


def structure_of(arm: FrozenArm) -> str:
    """Arms of one structure have the same T: the same data, teacher and batch size, whatever their seed and length."""
    fingerprints = [arm.data_fingerprint, arm.teacher_fingerprint]
    recipe, runtime = arm.config["recipe"], arm.config["runtime"]
    forward = [recipe.get("accumulation", 1), runtime.get("precision", "auto"), runtime.get("compile", "auto")]
    return digest([arm.config["data"], arm.config["teacher"], recipe["batch_size"], *forward, *fingerprints])


# -- measuring ---------------------------------------------------------------------------------------------------------


def measure(arms: Sequence[FrozenArm]) -> Probe:
    """Time the distinct configurations of `arms`, side by side in cohorts as training makes them."""
    began = time.perf_counter()
    structures: dict[str, dict[str, FrozenArm]] = {}
    for arm in arms:
        structures.setdefault(structure_of(arm), {}).setdefault(arm.configuration_key, arm)
    costs: dict[str, Costs] = {}
    failed: dict[str, str] = {}
    with _quiet(), streams.isolated(0, streams.PROBE), tempfile.TemporaryDirectory(prefix="basd-probe-") as folder:
        for structure, distinct in structures.items():
            waiting = list(distinct.values())
            while waiting and structure not in costs:
                measured = _measure_structure(waiting, Path(folder), failed)
                if measured is not None:
                    costs[structure] = measured
                waiting = [arm for arm in waiting if arm.configuration_key not in failed]
    return Probe(costs, failed, time.perf_counter() - began)


@contextmanager
def _quiet() -> Iterator[None]:
    """A probe says in one sentence what failed; the trainer's log would show it at length."""
    log = logging.getLogger("basd.training")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _measure_structure(arms: Sequence[FrozenArm], folder: Path, failed: dict[str, str]) -> Costs | None:
    """Costs of distinct configurations of one structure, in cohorts of the size set; None where the leader failed."""
    # the leader goes first and pays for what a step shares; the arm with most losses reads most of it
    leader = max(arms, key=lambda arm: len(from_dict(arm.config).enabled))
    size = int(leader.config["runtime"]["cohort_size"])
    parts: list[Costs] = []
    waiting = list(arms)
    while waiting:
        try:
            part = _measure_cohort(leader, waiting[:size], folder, failed)
        except _CrowdedError:
            size = max(1, min(size, len(waiting)) // 2)
            continue
        if part is None:
            return None
        parts.append(part)
        waiting = waiting[size:]
    # the cohort that used most beside what its arms hold
    most = max(parts, key=lambda part: (part.peak or 0) - part.held_then)
    return dataclasses.replace(
        parts[0],
        setup=statistics.median(part.setup for part in parts),
        shared=statistics.median(part.shared for part in parts),
        step={key: seconds for part in parts for key, seconds in part.step.items()},
        evaluation={key: seconds for part in parts for key, seconds in part.evaluation.items()},
        held={key: count for part in parts for key, count in part.held.items()},
        peak=most.peak,
        held_then=most.held_then,
    )


class _Clock:
    """Times the steps of a cohort's arms through its callbacks; the part of the arm that goes first holds T as well."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self.device, self.steps = device, steps
        self.seconds: dict[str, list[float]] = {}
        self._begun = 0
        self._last = 0.0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def stop(self) -> bool:
        """The cohort asks before each step."""
        self._begun += 1
        self._last = self.now()
        return self._begun > self.steps

    def progress(self, key: str, _step: int, _total: int) -> None:
        """The cohort tells after each arm's step."""
        now = self.now()
        self.seconds.setdefault(key, []).append(now - self._last)
        self._last = now

    def median(self, key: str) -> float:
        return statistics.median(self.seconds[key][WARM:])


class _CrowdedError(Exception):
    """Fewer arms may find the room that these did not."""


def _measure_cohort(leader: FrozenArm, arms: Sequence[FrozenArm], folder: Path, failed: dict[str, str]) -> Costs | None:
    """One cohort: the leader, its twin, whose time is the leader's without T, and the other arms."""
    twins = {arm.configuration_key: arm for arm in (leader, *arms)}
    trained = [_throwaway(leader, "leader"), *(_throwaway(arm, key) for key, arm in twins.items())]
    clock = _Clock(choose_device(leader.config["runtime"]["device"]), WARM + TIMED)
    built: dict[str, TrainingArm] = {}
    ended: dict[str, str] = {}
    crowded: list[str] = []

    def finished(result: ArmResult) -> None:
        if result.reason == TOO_MANY_ARMS:
            crowded.append(result.arm_key)
            # its memory goes to the others
            built.pop(result.arm_key, None)
        elif result.status == "failed" and result.arm_key in twins:
            ended[result.arm_key] = result.reason

    with cpu_threads(int(leader.config["runtime"]["threads"])):
        began = clock.now()
        cohort = Cohort(
            trained,
            [folder / arm.arm_key for arm in trained],
            [NullRecorder() for _ in trained],
            stop=lambda: clock.stop() or bool(crowded and len(arms) > 1),
            # nobody's: so that nothing is saved on leaving
            owned=lambda _key: False,
            progress=clock.progress,
            finished=finished,
        )
        setup = clock.now() - began
        built.update({member.frozen.arm_key: member.arm for member in cohort.members})
        cohort.run()
        if crowded and len(arms) > 1:
            raise _CrowdedError
        ended |= {leader.configuration_key if key == "leader" else key: NO_ROOM for key in crowded}
        failed.update(ended)
        if leader.configuration_key in failed:
            return None
        images = cohort.splits.validation
        sample = images.subset(torch.arange(min(EVALUATION_BATCH, len(images))))
        evaluation: dict[str, float] = {}
        for key in (key for key in twins if key not in failed):
            if not evaluation:
                built[key].evaluate(sample, "val")  # not timed: first allocations
            began = clock.now()
            built[key].evaluate(sample, "val")
            evaluation[key] = (clock.now() - began) / len(sample)
        peak = peak_bytes(cohort.device)
        held = {key: built[key].held_bytes() for key in ("leader", *evaluation) if key in built}
    # the cohort tells of each part of a step
    step = {key: clock.median(key) * cohort.accumulation for key in evaluation}
    return Costs(
        setup=setup,
        shared=max(0.0, clock.median("leader") * cohort.accumulation - step[leader.configuration_key]),
        step=step,
        evaluation=evaluation,
        steps_per_epoch=cohort.steps_per_epoch,
        validation_images=len(cohort.splits.validation),
        test_images=len(cohort.splits.test),
        peak=peak,
        held={key: count for key, count in held.items() if key != "leader"},
        held_then=sum(held.values()),
    )


def _throwaway(arm: FrozenArm, key: str) -> FrozenArm:
    """The arm as a probe trains it: every loss counts from the first step, and no epoch ends it."""
    recipe = {**arm.config["recipe"], "duration": f"{ENDLESS} steps", "validate_every": ENDLESS}
    runtime = {**arm.config["runtime"], "checkpoint_interval": float(ENDLESS)}
    config = {**arm.config, "recipe": recipe, "runtime": runtime, "warmup": {"name": "none"}, "seed": 0}
    return dataclasses.replace(arm, arm_key=key, cohort_key="probe", seed=0, config=config, total_steps=ENDLESS)


# -- predicting --------------------------------------------------------------------------------------------------------


def predict(
    steps: Mapping[str, int], arms: Mapping[str, FrozenArm], probe: Probe, options: GridOptions
) -> float | None:
    """Seconds until `basd grid` has trained `steps` (arm key → steps left): its workers, claiming as the ledger lets them.

    Starting the processes is left out. None where nothing of a structure could be measured.
    """
    waiting = [arms[key] for key, left in steps.items() if left > 0]
    if any(structure_of(arm) not in probe.costs for arm in waiting):
        return None
    workers = worker_count(options)
    free = [0.0] * max(1, min(workers, len(waiting)))
    while waiting:
        share = min(options.cohort_size, math.ceil(len(waiting) / workers))
        claimed = [arm for arm in waiting if arm.cohort_key == waiting[0].cohort_key][:share]
        taken = {arm.arm_key for arm in claimed}
        waiting = [arm for arm in waiting if arm.arm_key not in taken]
        heapq.heapreplace(free, free[0] + _cohort_seconds(claimed, steps, probe.costs[structure_of(claimed[0])]))
    return max(free) * _crowding(options, len(free))


def predict_memory(
    steps: Mapping[str, int], arms: Mapping[str, FrozenArm], probe: Probe, options: GridOptions
) -> tuple[int, int] | None:
    """Bytes at the peak of the largest cohort that `basd grid` will train, and how many arms it has; None where unknown."""
    waiting = [arms[key] for key, left in steps.items() if left > 0]
    share = min(options.cohort_size, math.ceil(len(waiting) / worker_count(options))) if waiting else 0
    cohorts: dict[str, list[FrozenArm]] = {}
    for arm in waiting:
        cohorts.setdefault(arm.cohort_key, []).append(arm)
    found: list[tuple[int, int]] = []
    for members in cohorts.values():
        costs = probe.costs.get(structure_of(members[0]))
        if costs is None:
            continue
        # those that hold most may be claimed together
        largest = sorted(members, key=lambda arm: costs.held.get(arm.configuration_key, 0), reverse=True)[:share]
        needed = costs.memory(largest)
        if needed is not None:
            found.append((needed, len(largest)))
    return max(found, default=None)


def worker_count(options: GridOptions) -> int:
    """Processes that `basd grid` starts when there are arms for all of them."""
    return options.workers(len(options.devices()) if options.processes != 1 else 0)


def _cohort_seconds(arms: Sequence[FrozenArm], steps: Mapping[str, int], costs: Costs) -> float:
    longest = max(steps[arm.arm_key] for arm in arms)
    own = sum(steps[arm.arm_key] * costs.of_step(arm) + costs.of_evaluations(arm) for arm in arms)
    return costs.setup + longest * costs.shared + own


def _crowding(options: GridOptions, workers: int) -> float:
    """How much longer everything takes where processes have more threads than the machine has cores."""
    if options.devices() or options.device.startswith("cuda"):
        return 1.0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1.0, workers * options.threads / cores)
