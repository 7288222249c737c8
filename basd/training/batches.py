"""One step's batch, the views of it and the teacher on them; what several arms of a cohort share is computed once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from basd.config import Config
from basd.data.images import ImageSource
from basd.data.mixing import Mix, draw, soft_labels
from basd.data.views import Geometry, crop, draw_geometry, normalize, resize_normalised, student_view
from basd.models.teacher import Teacher, TeacherOutput
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

    def student_images(self, config: Config) -> tuple[Tensor, Tensor, Mix | None]:
        """Mixed, normalised images (B, 3, S, S), soft targets (B, C), and how they were mixed, as `config` asks."""
        size = config.student.image_size
        smoothing = config.objective.label_smoothing
        views, mixing = _frozen(config.views), _frozen(config.mixing, but=("targets",))

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

    def real_images(self, config: Config) -> Tensor:
        """The clean crop, normalised and mixed like the student's view, (B, 3, S, S)."""
        size = config.student.image_size
        mix = self.student_images(config)[2]

        def compute() -> Tensor:
            images = normalize(self.clean(size), self.data.mean, self.data.std)
            return images if mix is None else mix.mix_images(images)

        return self._shared(("real", _frozen(config.views), _frozen(config.mixing, but=("targets",)), size), compute)


class TeacherViews:
    """The teacher's forward passes of one step: each is made when an arm asks for it, and once for the whole cohort."""

    def __init__(self, teacher: Teacher, batch: StepBatch, size: int, mean: list[float], std: list[float]) -> None:
        self.teacher, self.batch = teacher, batch
        self.size, self.mean, self.std = size, mean, std
        self._memo: dict[Any, TeacherOutput] = {}

    def _shared(self, key: Any, images: Callable[[], Tensor]) -> TeacherOutput:
        if key not in self._memo:
            self._memo[key] = self.teacher(images())
        return self._memo[key]

    def clean(self) -> TeacherOutput:
        """On the clean crop."""
        return self._shared("clean", lambda: normalize(self.batch.clean(self.size), self.mean, self.std))

    def mixed(self, config: Config) -> TeacherOutput:
        """On the clean crop, mixed like the student's view (`mixing.targets=same_input`)."""
        mix = self.batch.student_images(config)[2]
        if mix is None:
            return self.clean()
        side = config.student.image_size

        def images() -> Tensor:
            clean = normalize(self.batch.clean(self.size), self.mean, self.std)
            # the box was drawn in the student's pixels; at another size a pixel may be partly covered
            partner = mix.coverage(self.size, self.size, side, side, clean.device).view(self.size, self.size)
            return clean * (1 - partner) + mix.partner(clean) * partner

        return self._shared(("mixed", _frozen(config.mixing, but=("targets",)), side), images)

    def virtual(self, config: Config) -> TeacherOutput:
        """On the student's view."""
        data = self.batch.data

        def images() -> Tensor:
            seen = self.batch.student_images(config)[0]
            return resize_normalised(seen, self.size, data.mean, data.std, self.mean, self.std)

        key = ("virtual", _frozen(config.views), _frozen(config.mixing, but=("targets",)), config.student.image_size)
        return self._shared(key, images)


def _frozen(config: Any, but: tuple[str, ...] = ()) -> tuple:
    return tuple((key, str(value)) for key, value in sorted(dataclasses.asdict(config).items()) if key not in but)
