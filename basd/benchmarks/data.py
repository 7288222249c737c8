"""`basd bench data`: how long training waits for images, in memory and from a folder of JPEGs that is written for it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from basd.benchmarks.setup import DEFAULTS
from basd.benchmarks.timing import Ratio, Report, device_name
from basd.compose import compose
from basd.errors import UserError
from basd.grid.ablations import merge_overrides
from basd.grid.plan import freeze, prepare
from basd.training import random_streams as streams
from basd.training.cohort import train_cohort
from basd.training.device import check_device

CLASSES = 4
# height and width of most images of ImageNet
PIXELS = (375, 500)
HELD_OUT = 0.1
# the digits are trained as `basd train` does
DIGITS = ["recipe.duration=2 epochs", "warmup=none"]


class _Clock:
    """A recorder that keeps what is said of time at the ends of epochs."""

    def __init__(self) -> None:
        self.epochs: list[Mapping[str, float]] = []

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if "time/data_wait_share" in values:
            self.epochs.append(values)

    def flush(self) -> int:
        return 0

    def rewind(self, position: int) -> None:
        pass


def run(overrides: Sequence[str], repeats: int) -> Report:
    """Share of the second of two epochs that went into the batch and its clean view; of the folder `repeats` steps an epoch.

    The digits are trained as `basd train` does; the folder with the models and the batch of the other benchmarks.
    """
    own = [text for text in overrides if text.startswith(("runtime.", "method=", "views", "mixing"))]
    found = {"digits": _second_epoch([*DIGITS, *own])}
    rest = [text for text in merge_overrides(DEFAULTS, overrides) if not text.startswith("data")]
    config = compose(merge_overrides(DEFAULTS, overrides)).config
    batch = config.recipe.batch_size
    with tempfile.TemporaryDirectory(prefix="basd-bench-") as folder:
        write_jpegs(Path(folder), math.ceil(repeats * batch / (1 - HELD_OUT)) + 2 * CLASSES)
        place = ("data=folder", f"data.root={folder}", f"data.validation_share={HELD_OUT}")
        size = f"data.image_size={config.student.image_size}"
        found["folder of JPEGs"] = _second_epoch(merge_overrides(rest, [*place, size, "recipe.duration=2 epochs"]))
    ratios = tuple(
        Ratio(f"data wait of {name} ÷ step", values["time/data_wait_share"], "≤ 0.05") for name, values in found.items()
    )
    figures = {
        f"throughput of {name}": (values["time/images_per_second"], "images/s") for name, values in found.items()
    }
    settings = {"batch": batch, "steps an epoch of the folder": repeats, "overrides": list(overrides)}
    return Report("data", device_name(check_device(config)), settings, (), ratios, figures)


def write_jpegs(folder: Path, count: int) -> None:
    """`count` images of photographs' size and smoothness for training and one a class to test on, in four classes."""
    generator = np.random.default_rng(0)
    for number in range(count + CLASSES):
        split, label = ("train" if number < count else "val"), number % CLASSES
        place = folder / split / f"class_{label}"
        place.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(generator.integers(0, 256, (PIXELS[0] // 8, PIXELS[1] // 8, 3), dtype=np.uint8))
        coarse.resize(PIXELS[::-1], Image.Resampling.BICUBIC).save(place / f"{number}.JPEG", quality=90)


def _second_epoch(overrides: Sequence[str]) -> Mapping[str, float]:
    """Throughput and wait of the second epoch: the first one holds what happens once."""
    composed = compose(overrides)
    clock = _Clock()
    with streams.isolated(0, streams.PROBE), tempfile.TemporaryDirectory(prefix="basd-bench-") as folder:
        arm = freeze(composed, "bench", prepare(composed.config))
        (result,) = train_cohort([arm], [Path(folder)], [clock])
    if result.status != "complete":
        raise UserError(f"the benchmark's arm failed: {result.reason}")
    return clock.epochs[1]
