"""Arms to measure: the real cohort on the embedded images, with models of the size that is asked for and random weights."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from basd.compose import Composed, compose
from basd.config import FrozenArm
from basd.data import load
from basd.grid.ablations import merge_overrides
from basd.grid.plan import Resources, freeze, prepare
from basd.training import random_streams as streams
from basd.training.cohort import Cohort
from basd.training.device import check_device, cpu_threads
from basd.training.recorder import NullRecorder

# DINOv2-S/14 and DeiT-Tiny at 224 pixels; the digits stand for images of that size, random weights for trained ones.
DEFAULTS = (
    *("data=digits", "data.image_size=224", "teacher=dinov2_vits14", "teacher.weights=random", "student=deit_tiny"),
    *("recipe.batch_size=16", "recipe.duration=1000000 steps", "recipe.validate_every=1000000", "warmup=none"),
)


class Setup:
    """Settings, and the arms that they make."""

    def __init__(self, overrides: Sequence[str]) -> None:
        self.overrides = merge_overrides(DEFAULTS, overrides)
        self.composed: Composed = compose(self.overrides)
        self.config = self.composed.config
        self.device = check_device(self.config)
        with self._isolated():
            self.resources: Resources = prepare(self.config)
            self.classes = load(self.config.data).train.classes

    @contextmanager
    def _isolated(self) -> Iterator[None]:
        with streams.isolated(0, streams.PROBE):
            yield

    def arm(self, *changes: str) -> FrozenArm:
        """The arm of the settings with some changed."""
        return freeze(compose(merge_overrides(self.overrides, changes)), "bench", self.resources)

    @contextmanager
    def running(self) -> Iterator[Callable[..., Callable[[], int]]]:
        """`start(arms, **callbacks)` gives a function that trains a cohort by one step a call; ended on leaving."""
        with ExitStack() as stack:
            stack.enter_context(self._isolated())
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="basd-bench-")))
            stack.enter_context(cpu_threads(self.config.runtime.threads))

            def start(arms: Sequence[FrozenArm], **callbacks) -> Callable[[], int]:
                # of one cohort whatever they are called, so that the same configuration may stand in it several times
                named = [
                    dataclasses.replace(arm, arm_key=f"{i}-{arm.arm_key}", cohort_key="bench")
                    for i, arm in enumerate(arms)
                ]
                places = [folder / arm.arm_key for arm in named]
                cohort = Cohort(named, places, [NullRecorder() for _ in named], owned=lambda _key: False, **callbacks)
                steps = cohort.steps()
                stack.callback(steps.close)

                def step() -> int:
                    number = next(steps, None)
                    if number is None:
                        raise RuntimeError("; ".join(result.reason for result in cohort.results))
                    return number

                return step

            yield start
