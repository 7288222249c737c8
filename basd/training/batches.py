"""One step's batch, the views of it and the teacher on them; what several arms of a cohort share is computed once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from basd.config import Config
from basd.data.disk import DiskImages
from basd.data.feed import Crops, Wanted, crop_batches
from basd.data.images import ImageSet, ImageSource, epoch_order
from basd.data.mixing import Mix, draw, soft_labels
from basd.data.part import Part
from basd.data.views import (
    Geometry,
    crop,
    draw_crops,
    draw_geometry,
    normalize,
    resize_normalised,
    resized,
    student_view,
)
from basd.models.teacher import Teacher, TeacherOutput
from basd.training import random_streams as streams

T = TypeVar("T")


def wanted_crops(
    indices: Tensor, seed: int, epoch: int, step: int, rows: Tensor | None = None, *, own: bool = False
) -> Wanted:
    """What to read of images on disk for a `StepBatch` with the same arguments; `own`: for a student's own geometry too."""
    part = Part(len(indices), rows)
    drawn = [draw_crops(part.whole, streams.generator(seed, streams.CLEAN_VIEW, epoch, step))]
    if own:
        # a student's own crop comes first in its stream
        drawn.append(draw_crops(part.whole, streams.generator(seed, streams.STRONG_VIEW, epoch, step)))
    draws, *rest = [one if rows is None else one.take(rows) for one in drawn]
    return Wanted(part.take(indices), draws, rest[0] if rest else None)


class CropFeed:
    """Reads a split on disk ahead of the steps that use it. For a split in memory there is nothing to do."""

    def __init__(
        self,
        source: ImageSource,
        batch_size: int,
        seed: int,
        steps: int,
        *,
        parts: Sequence[Tensor | None] = (None,),
        own: bool = False,
        workers: int = 0,
    ) -> None:
        """`steps`: where training ends. `parts`: the rows of each part of a step's batch. `own`: see `wanted_crops`."""
        self.source, self.batch_size, self.seed, self.steps = source, batch_size, seed, steps
        self.parts, self.own, self.workers = list(parts), own, workers
        # images that are read at once
        self._share = max(batch_size if rows is None else len(rows) for rows in self.parts)
        self._at: tuple[int, int] | None = None  # step and part that the stream gives next
        self._stream: Generator[Crops, None, None] | None = None

    def crops(self, step: int, part: int = 0) -> Crops | None:
        """Those of a part of a step, prepared while the steps before it ran, if it follows them; None in memory."""
        if not isinstance(self.source, DiskImages):
            return None
        if self._at != (step, part):
            self.close()
            self._stream = crop_batches(self.source, self._wanted(step, part), self._share, self.workers)
        assert self._stream is not None
        found = next(self._stream)
        self._at = (step, part + 1) if part + 1 < len(self.parts) else (step + 1, 0)
        return found

    def _wanted(self, first: int, part: int) -> Iterator[Wanted]:
        steps_per_epoch = len(self.source) // self.batch_size
        order: list[Tensor] = []
        for step in range(first, self.steps):
            epoch, position = divmod(step, steps_per_epoch)
            if position == 0 or not order:
                generator = streams.generator(self.seed, streams.ORDER, epoch)
                order = epoch_order(len(self.source), self.batch_size, generator)
            for rows in self.parts[part if step == first else 0 :]:
                yield wanted_crops(order[position], self.seed, epoch, step, rows, own=self.own)

    def close(self) -> None:
        """End the workers."""
        if self._stream is not None:
            self._stream.close()
        self._stream = self._at = None


class StepBatch:
    """Images and labels at one step of a cohort. Every view is a function of (seed, epoch, step) and its own settings."""

    def __init__(
        self,
        source: ImageSource,
        indices: Tensor,
        data: Any,
        seed: int,
        epoch: int,
        step: int,
        rows: Tensor | None = None,
        crops: Crops | None = None,
    ) -> None:
        """`indices` are those of the whole batch; with `rows`, int64 positions in it, only those are here, and each is the
        same bits as in the whole batch. `crops`: images on disk that were read ahead (as `wanted_crops` says); read now if None.
        """
        self.part = Part(len(indices), rows)
        self.classes = source.classes
        self.data = data
        self.seed, self.epoch, self.step = seed, epoch, step
        self._memo: dict[Any, Any] = {}
        self._images: Tensor | None = None
        self._crops = crops
        if isinstance(source, ImageSet):
            self._images, self.labels = source.batch(self.part.take(indices))
            return
        assert isinstance(source, DiskImages), type(source)
        if crops is None:
            wanted = wanted_crops(indices, seed, epoch, step, rows, own=True)
            (self._crops,) = crop_batches(source, [wanted], len(indices), workers=0)
        assert self._crops is not None
        self.labels = self._crops.labels

    @property
    def unreadable(self) -> tuple[str, ...]:
        """Images that could not be decoded, which others of the split stand for."""
        return self._crops.unreadable if self._crops is not None else ()

    def generator(self, purpose: str):
        return streams.generator(self.seed, purpose, self.epoch, self.step)

    def _shared(self, key: Any, compute: Callable[[], T]) -> T:
        if key not in self._memo:
            self._memo[key] = compute()
        return self._memo[key]

    def geometry(self) -> Geometry:
        """Where the clean crops of images in memory lie."""
        assert self._images is not None
        _, _, height, width = self._images.shape

        def compute() -> Geometry:
            generator = self.generator(streams.CLEAN_VIEW)
            return draw_geometry(self.part.whole, height, width, self.data, generator, self.part)

        return self._shared("geometry", compute)

    def clean(self, size: int) -> Tensor:
        """The clean crop in [0, 1], (B, 3, size, size)."""

        def compute() -> Tensor:
            if self._crops is not None:
                return resized(self._crops.images, size)
            assert self._images is not None
            return crop(self._images, self.geometry(), size)

        return self._shared(("clean", size), compute)

    def _own_crop(self, size: int, generator: torch.Generator) -> Tensor:
        """The student's own crop of images on disk, (B, 3, size, size), made from the numbers that it would draw here."""
        draw_crops(self.part.whole, generator)
        assert self._crops is not None and self._crops.own is not None, (
            "own crops must be asked for when images are read"
        )
        return resized(self._crops.own, size)

    def student_images(self, config: Config) -> tuple[Tensor, Tensor, Mix | None]:
        """Mixed, normalised images (B, 3, S, S), soft targets (B, C), and how they were mixed, as `config` asks."""
        size = config.student.image_size
        smoothing = config.objective.label_smoothing
        views, mixing = _frozen(config.views), _frozen(config.mixing, but=("targets",))

        def view() -> Tensor:
            generator = self.generator(streams.STRONG_VIEW)
            images = self._images if self._images is not None else partial(self._own_crop, size)
            return student_view(images, self.clean(size), self.data, config.views, generator, self.part)

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
