"""One step's batch and the views of it; views that several arms of a cohort share are computed once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from basd.config import Config
from basd.data.images import ImageSource
from basd.data.mixing import Mix, draw, soft_labels
from basd.data.views import Geometry, crop, draw_geometry, normalize, student_view
from basd.training import random_streams as streams

T = TypeVar("T")


class StepBatch:
    """Images and labels at one step of a cohort. Every view is a function of (seed, epoch, step) and its own settings."""

    def __init__(self, source: ImageSource, indices: Tensor, data: Any, seed: int, epoch: int, step: int) -> None:
        self.images, self.labels = source.batch(indices)
        self.classes = source.classes
        self.data = data
        self.seed, self.epoch, self.step = seed, epoch, step
        self._memo: dict[Any, Any] = {}

    def generator(self, purpose: str):
        return streams.generator(self.seed, purpose, self.epoch, self.step)

    def _shared(self, key: Any, compute: Callable[[], T]) -> T:
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    def geometry(self) -> Geometry:
        _, _, height, width = self.images.shape

        def compute() -> Geometry:
            return draw_geometry(len(self.images), height, width, self.data, self.generator(streams.CLEAN_VIEW))

        return self._shared("geometry", compute)

    def clean(self, size: int) -> Tensor:
        """The clean crop in [0, 1], (B, 3, size, size)."""
        return self._shared(("clean", size), lambda: crop(self.images, self.geometry(), size))

    def teacher_images(self, size: int, mean: list[float], std: list[float]) -> Tensor:
        return normalize(self.clean(size), mean, std)

    def student_images(self, config: Config) -> tuple[Tensor, Tensor, Mix | None]:
        """Mixed, normalised images (B, 3, S, S), soft targets (B, C), and how they were mixed, as `config` asks."""
        size = config.student.image_size
        smoothing = config.objective.label_smoothing
        views, mixing = _frozen(config.views), _frozen(config.mixing)

        def view() -> Tensor:
            generator = self.generator(streams.STRONG_VIEW)
            return student_view(self.images, self.clean(size), self.data, config.views, generator)

        def mixed() -> tuple[Tensor, Tensor, Mix | None]:
            images = self._shared(("view", views, size), view)
            mix = draw(config.mixing, size, size, self.generator(streams.MIXING))
            if mix is None:
                return images, soft_labels(self.labels, self.classes, smoothing), None
            return mix.mix_images(images), mix.mix_labels(self.labels, self.classes, smoothing), mix

        return self._shared(("mixed", views, mixing, size, smoothing), mixed)


def _frozen(config: Any) -> tuple:
    return tuple((key, str(value)) for key, value in sorted(dataclasses.asdict(config).items()))
