"""The bias probes of finished arms: what a student attends to, agrees with and is moved by, described on test images.

They choose nothing, so they look at the images that the test metrics come from, after the last step. What is looked at, in
which batches and under which noise depends on data and seed alone: arms of one seed are compared on the same. What the
probes need of the teacher is computed once a cohort.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from basd import distributed
from basd.components.selectors.depth import nearest_layers
from basd.config import Config, FrozenArm
from basd.data.feed import evaluation_batches, worker_count
from basd.data.images import Splits
from basd.data.views import normalize
from basd.distributed import all_reduce_sum, rank, world
from basd.errors import UserError
from basd.evaluation.agreement import (
    LEAST_IMAGES,
    attention_divergence,
    hsic_triple,
    image_grams,
    minibatch_cka,
    relation_cosine,
    relations,
)
from basd.evaluation.attention import attention_distance
from basd.evaluation.calibration import calibration
from basd.evaluation.frequency import BANDS, band_noise, sensitivity
from basd.evaluation.shifts import shift_consistency, shift_offsets, shifted
from basd.models.resampling import resample_attention, row_resampling
from basd.models.student import extraction_points
from basd.models.taps import Taps, grid_of, patch_attention
from basd.models.teacher import Teacher
from basd.training import random_streams as streams
from basd.training.arm import Answers, TrainingArm
from basd.training.teachers import check_fingerprint, prepare_teacher, statistics_of

log = logging.getLogger("basd.training")

# Of the teacher two maps of N² numbers a point are kept for each image: 0.6 GB for DeiT-Tiny with 4 points, on the CPU.
IMAGES = 512
BATCH = 64
# Depths at which student and teacher are compared, whatever `student.points`: rows of one table on the same.
DEPTHS = 4


class Seen(NamedTuple):
    """What a batch shows of a model at M blocks, on the CPU; see `basd.evaluation.agreement`."""

    distances: Tensor  # (b, L, H), of every block and head
    grams: Tensor  # (M, b, b), float64
    relations: Tensor  # (M, b, N, N)
    attention: Tensor  # (M, b, 1+N, 1+N), heads averaged


class Reference(NamedTuple):
    """The teacher: this process's batches by number, and its mean attention distance."""

    seen: dict[int, Seen]
    distance: float


class Reader:
    """Looks at a model from outside, in float32 whatever it trained in."""

    def __init__(self, model: VisionTransformer) -> None:
        self.model = model.eval()
        self.grid = grid_of(model)
        self._taps = Taps(model, range(len(model.blocks)), range(len(model.blocks)))

    def __call__(self, images: Tensor, blocks: Sequence[int], grid: tuple[int, int]) -> tuple[Tensor, Seen]:
        """The model's output on normalised images, and what is seen at some blocks, moved to `grid`."""
        with self._taps.record() as tapped:
            output = self.model(images)
        prefix, distances, maps = self.model.num_prefix_tokens, [], {}
        for block in range(len(self.model.blocks)):
            attention = tapped.attention(block)
            distances.append(attention_distance(attention, self.grid))
            if block in blocks:
                heads_averaged = patch_attention(attention, prefix).mean(dim=1)
                maps[block] = resample_attention(heads_averaged, grid, self.grid).cpu()
        # normalised, as the losses compare them, and then moved by overlap, as `token_aligner=interpolate` does
        tokens = torch.stack([tapped.tokens[block][:, prefix:].float() for block in blocks])
        tokens = F.layer_norm(tokens, tokens.shape[-1:])
        if grid != self.grid:
            tokens = row_resampling(grid, self.grid).to(tokens) @ tokens
        attention_maps = torch.stack([maps[block] for block in blocks])
        return output, Seen(
            torch.stack(distances, dim=1).cpu(), image_grams(tokens), relations(tokens).cpu(), attention_maps
        )


class BiasProbes:
    """`probes(arm, …)` describes the student that an arm exports, on evenly spaced images of the test split.

    One object serves a cohort. With several processes each takes whole batches, and the results are those of one process;
    all processes call it alike.
    """

    def __init__(
        self, first: FrozenArm, config: Config, splits: Splits, device: torch.device, teacher: Teacher | None = None
    ) -> None:
        """first, config: an arm of the cohort; splits: on the device; teacher: the cohort's.

        None where no arm of the cohort reads a teacher: it is then made ready when an arm ends, from the cache.
        """
        self.first, self.config, self.splits, self.device = first, config, splits, device
        count = min(IMAGES, len(splits.test))
        # evenly spaced: a folder's images are sorted by class
        self.chosen = torch.arange(count) * len(splits.test) // count
        # batches of nearly one size: each must hold enough images for its share of CKA
        self.batch = math.ceil(count / math.ceil(count / BATCH))
        self.batches = math.ceil(count / self.batch)
        self._own = teacher
        self._kept: dict[Any, Reference] = {}

    @torch.no_grad()
    def __call__(self, arm: TrainingArm, test: Answers, validation: Answers) -> dict[str, float]:
        """`probe/<name>` of a student; those that compare it with the teacher only where there is one.

        test, validation: what the student says of these splits.
        """
        reader = Reader(arm.exported)
        reference = self._reference(arm, reader.grid)
        found = self._look(arm, reader, reference)
        metrics = {
            **_distances(found["distances"]),
            **_responses(found["logits"]),
            **calibration(test.logits, test.labels, validation.logits, validation.labels),
        }
        if reference is not None:
            metrics |= _agreement(found) | {"attention_distance_teacher": reference.distance}
        return {f"probe/{name}": value for name, value in metrics.items()}

    def _look(self, arm: TrainingArm, reader: Reader, reference: Reference | None) -> dict[str, Tensor]:
        """Rows of all readable images, and the HSICs of all batches, that the processes find together."""
        config, points = arm.config, compared_blocks(arm)
        size, mean, std = config.student.image_size, config.data.mean, config.data.std
        count, offsets = len(self.chosen), shift_offsets(size)
        # zero until a process fills its own
        found = {
            "read": torch.zeros(count),
            "logits": torch.zeros(count, 1 + len(offsets) + len(BANDS), self.splits.test.classes),
            "distances": torch.zeros(count, config.student.depth, config.student.heads),
            "divergences": torch.zeros(count, len(points)),
            "relations": torch.zeros(count, len(points)),
            "compared": torch.zeros(self.batches),
            "hsics": torch.zeros(self.batches, len(points), 3, dtype=torch.float64),
        }
        for number, positions, views in self._views(size):
            logits, seen = reader(normalize(views, mean, std), points, reader.grid)
            noise = streams.generator(config.seed, streams.BAND_NOISE, 0, number)
            changed = [shifted(views, offset) for offset in offsets]
            changed += [views + band_noise(len(views), size, band, noise).to(views) for band in range(len(BANDS))]
            answers = [logits, *(reader.model(normalize(images, mean, std)) for images in changed)]
            found["read"][positions] = 1
            found["logits"][positions] = torch.stack(answers, dim=1).cpu()
            found["distances"][positions] = seen.distances
            if reference is None:
                continue
            other = reference.seen[number]
            found["divergences"][positions] = attention_divergence(seen.attention, other.attention).T
            found["relations"][positions] = relation_cosine(seen.relations, other.relations).T
            if len(positions) >= LEAST_IMAGES:
                found["compared"][number] = 1
                found["hsics"][number] = hsic_triple(seen.grams, other.grams)
        found = {name: all_reduce_sum(value) for name, value in found.items()}
        batches, rows = found.pop("compared") > 0, found.pop("read") > 0
        return {name: value[batches if name == "hsics" else rows] for name, value in found.items()}

    def _views(self, size: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """This process's batches: their number, the positions of their images among the chosen, views in [0, 1]."""
        positions = torch.arange(len(self.chosen)).split(self.batch)
        own = range(rank(), self.batches, world())
        if not own:
            return
        images = self.splits.test.subset(self.chosen[torch.cat([positions[number] for number in own])])
        share = getattr(self.config.data, "eval_crop", 1.0)
        workers = worker_count(self.config.runtime.workers, self.device)
        batches = evaluation_batches(images, size, share, self.batch, self.device, workers)
        for number, (views, labels) in zip(own, batches, strict=True):
            readable = labels >= 0
            if readable.any():
                yield number, positions[number][readable], views[readable.to(views.device)]

    def _reference(self, arm: TrainingArm, grid: tuple[int, int]) -> Reference | None:
        """The teacher at the layers that lie as deep as the student's compared blocks, on its grid; None without one."""
        reader = self.teacher
        if reader is None:
            return None
        sizes = replace(arm.objective.sizes, points=compared_blocks(arm), teacher_depth=len(reader.model.blocks))
        layers = nearest_layers(sizes)
        key = (layers, grid)
        if key not in self._kept:
            mean, std = statistics_of(self.config.teacher, self.config.data)
            kept = {
                number: reader(normalize(views, mean, std), layers, grid)[1]
                for number, _, views in self._views(self.config.teacher.image_size)
            }
            # sum over images of the mean over blocks and heads, and their number
            sums = torch.zeros(2, dtype=torch.float64)
            for seen in kept.values():
                by_image = seen.distances.double().mean(dim=(1, 2))
                sums += torch.stack([by_image.sum(), torch.tensor(float(len(by_image)))])
            total, images = all_reduce_sum(sums)
            self._kept[key] = Reference(kept, float(total / images))
        return self._kept[key]

    @cached_property
    def teacher(self) -> Reader | None:
        """The teacher looked at: the cohort's, or, where none of its arms reads one, the one that configurations name."""
        model = self._prepared() if self._own is None else self._own.model
        # one process without it is as good as none
        if distributed.any_rank(model is None):
            return None
        assert model is not None
        return Reader(model)

    def _prepared(self) -> VisionTransformer | None:
        """The teacher of a cohort in which no arm reads one; planning has fitted or loaded it before."""
        first = self.config
        try:
            prepared = distributed.first_then_all(
                lambda: prepare_teacher(first.teacher, first.data, self.splits, logits=False)
            )
            check_fingerprint(prepared, self.first)
        except UserError as error:
            log.warning("arms without a teacher are not compared with it, as it is not here: %s", error)
            return None
        return prepared.model.to(self.device)


def compared_blocks(arm: TrainingArm) -> tuple[int, ...]:
    """The student's blocks that are compared with the teacher."""
    depth = arm.config.student.depth
    return extraction_points(min(DEPTHS, depth), depth)


def _distances(distances: Tensor) -> dict[str, float]:
    """Attention distances (n, L, H): over all blocks, and of the first and the last."""
    mean, *blocks = [float(value) for value in (distances.double().mean(), *distances.double().mean(dim=(0, 2)))]
    return {"attention_distance": mean, "attention_distance_first": blocks[0], "attention_distance_last": blocks[-1]}


def _responses(logits: Tensor) -> dict[str, float]:
    """Logits (n, 1+S+3, C): of the images, of their S shifts, of the images with noise in each band."""
    clean, moved, disturbed = logits[:, 0], logits[:, 1 : -len(BANDS)], logits[:, -len(BANDS) :]
    by_band = {f"sensitivity_{band}": sensitivity(clean, disturbed[:, index]) for index, band in enumerate(BANDS)}
    return {"shift_consistency": shift_consistency(clean, moved), **by_band}


def _agreement(found: Mapping[str, Tensor]) -> dict[str, float]:
    """Means over the compared blocks."""
    return {
        "cka": float(minibatch_cka(found["hsics"]).mean()),
        "attention_kl": float(found["divergences"].double().mean()),
        "relation_cosine": float(found["relations"].double().mean()),
    }
