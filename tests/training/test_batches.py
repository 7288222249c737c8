"""The views of one step against loops over pixels, with a teacher whose images are larger than the student's."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from basd.data.digits import DigitsConfig
from basd.data.images import ImageSet
from basd.data.mixing import CutmixConfig, Mix, MixupConfig, NoMixingConfig, draw
from basd.data.views import DualViewsConfig, Geometry, SingleViewsConfig, crop, draw_geometry
from basd.models.student import StudentConfig
from basd.objective import ObjectiveConfig
from basd.training import random_streams as streams
from basd.training.batches import StepBatch, TeacherViews

PIXELS, STUDENT, TEACHER, BATCH = 24, 10, 16, 4
SEED, EPOCH = 3, 1
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
TEACHER_MEAN, TEACHER_STD = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
DATA = DigitsConfig(mean=MEAN, std=STD, crop_scale=[0.4, 0.8], horizontal_flip=0.5)
# the strong view does nothing but crop
PLAIN = {"num_ops": 0, "color_jitter": 0.0, "erasing": 0.0}
MIXED = {"mixup": MixupConfig, "cutmix": CutmixConfig}
STEPS = range(4)
CASES = list(itertools.product(MIXED, STEPS))


def config(mixing: Any, views: Any = None) -> Any:
    return SimpleNamespace(
        student=StudentConfig(image_size=STUDENT),
        objective=ObjectiveConfig(label_smoothing=0.1),
        mixing=mixing,
        views=views or SingleViewsConfig(),
    )


def source() -> ImageSet:
    """Noise, so that every pixel of every image is a different one."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, PIXELS, PIXELS), generator=g, dtype=torch.uint8)
    return ImageSet(images, torch.tensor([0, 1, 2, 3, 4, 0]), 5)


INDICES = torch.tensor([5, 0, 3, 2])


def batch_of(step: int, images: ImageSet | None = None) -> StepBatch:
    return StepBatch(images or source(), INDICES, DATA, SEED, EPOCH, step)


class Watched:
    """In the teacher's place: gives back what it was shown."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, images: Tensor) -> Tensor:
        self.count += 1
        return images


def teacher_views(batch: StepBatch) -> TeacherViews:
    return TeacherViews(Watched(), batch, TEACHER, TEACHER_MEAN, TEACHER_STD)  # type: ignore[arg-type]


def clean_crop(step: int, size: int, mean: list[float], std: list[float]) -> np.ndarray:
    """The step's crop, normalised channel by channel."""
    geometry = draw_geometry(BATCH, PIXELS, PIXELS, DATA, streams.generator(SEED, streams.CLEAN_VIEW, EPOCH, step))
    image = crop(source().images[INDICES], geometry, size).double().numpy()
    return np.stack([(image[:, c] - mean[c]) / std[c] for c in range(3)], axis=1)


def mix_of(mixing: Any, step: int) -> Mix:
    mix = draw(mixing, STUDENT, STUDENT, streams.generator(SEED, streams.MIXING, EPOCH, step))
    assert mix is not None
    return mix


def covered(mix: Mix, y: int, x: int, size: int) -> float:
    """The partner's share of pixel (y, x) of an image of `size`: the box lies in an image of the student's size."""
    if mix.box is None:
        return 1 - mix.lam
    y0, y1, x0, x1 = (edge * size / STUDENT for edge in mix.box)
    return max(0.0, min(y + 1, y1) - max(y, y0)) * max(0.0, min(x + 1, x1) - max(x, x0))


def mixed(images: np.ndarray, mix: Mix) -> np.ndarray:
    size, out = images.shape[-1], np.empty_like(images)
    for b in range(BATCH):
        for y in range(size):
            for x in range(size):
                partner = covered(mix, y, x, size)
                out[b, :, y, x] = (1 - partner) * images[b, :, y, x] + partner * images[BATCH - 1 - b, :, y, x]
    return out


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """Bilinear upsampling, pixel centres at halves."""
    small = images.shape[-1]
    assert size >= small
    out = np.zeros((*images.shape[:2], size, size))
    for y in range(size):
        for x in range(size):
            v, u = ((i + 0.5) * small / size - 0.5 for i in (y, x))
            v, u = min(max(v, 0), small - 1), min(max(u, 0), small - 1)
            top, left = min(int(v), small - 2), min(int(u), small - 2)
            for j, weight_y in ((top, 1 - (v - top)), (top + 1, v - top)):
                for i, weight_x in ((left, 1 - (u - left)), (left + 1, u - left)):
                    out[:, :, y, x] += weight_y * weight_x * images[:, :, j, i]
    return out


def close(got: Any, expected: np.ndarray, case: object = "") -> None:
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=2e-5, err_msg=str(case))


def test_the_steps_here_cut_through_pixels_of_the_teacher() -> None:
    """Otherwise the loops below could not tell a covered pixel from a partly covered one."""
    shares = [covered(mix_of(CutmixConfig(), s), y, x, TEACHER) for s in STEPS for y in range(16) for x in range(16)]
    assert 0.0 in shares and 1.0 in shares and any(0.01 < share < 0.99 for share in shares)


def test_student_images_and_labels_are_mixed_alike() -> None:
    for kind, step in CASES:
        settings = config(MIXED[kind]())
        images, targets, mix = batch_of(step).student_images(settings)
        drawn = mix_of(settings.mixing, step)
        assert mix == drawn, (kind, step)
        close(images, mixed(clean_crop(step, STUDENT, MEAN, STD), drawn), (kind, step))
        labels = source().labels[INDICES].tolist()
        expected = np.full((BATCH, 5), 0.1 / 5)
        for b in range(BATCH):
            expected[b, labels[b]] += 0.9 * drawn.lam
            expected[b, labels[BATCH - 1 - b]] += 0.9 * (1 - drawn.lam)
        close(targets, expected, (kind, step))


def test_the_real_view_is_clean_and_mixed_like_the_student_s() -> None:
    for kind, step in CASES:
        settings = config(MIXED[kind](), DualViewsConfig(geometry="independent"))
        batch = batch_of(step)
        seen, real = batch.student_images(settings)[0], batch.real_images(settings)
        close(real, mixed(clean_crop(step, STUDENT, MEAN, STD), mix_of(settings.mixing, step)), (kind, step))
        assert (seen - real).abs().max() > 0.1, (kind, step)


def test_the_teacher_s_views() -> None:
    """clean: unmixed whatever the student's batch; mixed: the box in the teacher's pixels; virtual: the student's own."""
    for kind, step in CASES:
        settings = config(MIXED[kind](), DualViewsConfig())
        batch = batch_of(step)
        views = teacher_views(batch)
        clean = clean_crop(step, TEACHER, TEACHER_MEAN, TEACHER_STD)
        student = batch.student_images(settings)[0]
        close(views.clean(), clean, (kind, step))
        close(views.mixed(settings), mixed(clean, mix_of(settings.mixing, step)), (kind, step))
        seen = resized(student.double().numpy(), TEACHER)
        expected = [(seen[:, c] * STD[c] + MEAN[c] - TEACHER_MEAN[c]) / TEACHER_STD[c] for c in range(3)]
        close(views.virtual(settings), np.stack(expected, axis=1), (kind, step))
        again = views.clean(), views.mixed(settings), views.virtual(settings)
        assert views.teacher.count == 3 and len(again) == 3, (kind, step)  # type: ignore[attr-defined]


def test_without_a_mix_every_view_is_the_clean_crop() -> None:
    settings = config(NoMixingConfig())
    batch = batch_of(0)
    views = teacher_views(batch)
    images, _, mix = batch.student_images(settings)
    assert mix is None
    close(images, clean_crop(0, STUDENT, MEAN, STD))
    assert torch.equal(batch.real_images(settings), images)
    assert views.mixed(settings) is views.clean()


def test_arms_of_different_settings_get_their_own_views() -> None:
    """What the cohort shares is kept under every setting that changes it."""
    batch = batch_of(0)
    views = teacher_views(batch)
    arms = [config(MIXED[kind](), view) for kind in MIXED for view in (SingleViewsConfig(), DualViewsConfig())]
    for settings in arms:
        alone = batch_of(0)
        assert torch.equal(batch.student_images(settings)[0], alone.student_images(settings)[0])
        assert torch.equal(batch.real_images(settings), alone.real_images(settings))
        assert torch.equal(views.mixed(settings), teacher_views(alone).mixed(settings))  # type: ignore[arg-type]
        assert torch.equal(views.virtual(settings), teacher_views(alone).virtual(settings))  # type: ignore[arg-type]


# -- where the views look ---------------------------------------------------------------------------------------------


def coordinates() -> ImageSet:
    """Red says the column and green the row of a pixel, in tens of grey levels."""
    line = (torch.arange(PIXELS) * 10).to(torch.uint8)
    image = torch.stack(
        [line.expand(PIXELS, PIXELS), line[:, None].expand(PIXELS, PIXELS), torch.zeros(PIXELS, PIXELS)]
    )
    return ImageSet(image.to(torch.uint8).expand(6, -1, -1, -1).contiguous(), torch.zeros(6, dtype=torch.long), 5)


def place(view: Tensor, mean: list[float], std: list[float]) -> np.ndarray:
    """(left, right, top, bottom) edges of each image's view in source pixels; left > right where it is flipped."""
    size = view.shape[-1]
    inside = np.arange(2, size - 2)  # a crop's outermost pixels have half a triangle
    edges = np.empty((BATCH, 4))
    for b in range(BATCH):
        for c in (0, 1):
            values = (view[b, c].double().numpy() * std[c] + mean[c]) * 25.5 + 0.5
            line = values[size // 2, inside] if c == 0 else values[inside, size // 2]
            slope, start = np.polyfit((inside + 0.5) / size, line, 1)
            edges[b, 2 * c : 2 * c + 2] = start, start + slope
    return edges


def test_crop_and_flip_are_shared_by_both_views_unless_asked_otherwise() -> None:
    for geometry in ("shared", "independent"):
        flips = []
        for step in STEPS:
            batch = batch_of(step, coordinates())
            seen = teacher_views(batch).clean()
            teacher = place(seen, TEACHER_MEAN, TEACHER_STD)  # type: ignore[arg-type]
            settings = config(NoMixingConfig(), DualViewsConfig(geometry=geometry, **PLAIN))
            student = place(batch.student_images(settings)[0], MEAN, STD)
            boxes, flipped = batch.geometry()
            flips += flipped.tolist()
            for b, (y, x, h, w) in enumerate(boxes.tolist()):
                sides = (x + w, x) if flipped[b] else (x, x + w)
                np.testing.assert_allclose(teacher[b], [*sides, y, y + h], atol=0.1)
            if geometry == "shared":
                np.testing.assert_allclose(student, teacher, atol=0.1)
            else:
                assert (np.abs(student - teacher).max(axis=1) > 1).sum() >= BATCH - 1, step
        assert {True, False} == set(flips)


def test_the_geometry_of_a_step_depends_on_seed_epoch_and_step_only() -> None:
    def geometry(seed: int, epoch: int, step: int) -> Geometry:
        return StepBatch(source(), INDICES, DATA, seed, epoch, step).geometry()

    first = geometry(0, 0, 0)
    assert torch.equal(first.boxes, geometry(0, 0, 0).boxes)
    for other in (geometry(1, 0, 0), geometry(0, 1, 0), geometry(0, 0, 1)):
        assert not torch.equal(first.boxes, other.boxes)
