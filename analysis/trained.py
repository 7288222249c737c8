"""A trained student beside its teacher on the same images: what figures of attention, spectra and layers are drawn from."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from basd.errors import UserError

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer
    from torch import Tensor

    from basd.config import Config


@dataclass(frozen=True)
class Layers:
    """What a forward pass leaves in every block of a ViT."""

    tokens: tuple[Tensor, ...]  # patch tokens of each block, (B, N, D)
    attention: tuple[Tensor, ...]  # of each block, prefix tokens first, (B, H, P+N, P+N); rows sum to 1
    grid: tuple[int, int]  # rows and columns of patches, N = rows · columns
    prefix: int  # P, class token and others

    @property
    def depth(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class TrainedArm:
    """A finished arm with its student and teacher in evaluation mode, and images of its validation split."""

    name: str
    arm_key: str
    student: VisionTransformer
    teacher: VisionTransformer
    config: Config
    images: Tensor  # evaluation views of the student's size, (B, 3, H, W), in [0, 1]
    labels: Tensor  # (B,)

    @cached_property
    def student_layers(self) -> Layers:
        """The student's blocks on the images, looked at once."""
        from basd.data.views import normalize

        return read_layers(self.student, normalize(self.images, self.config.data.mean, self.config.data.std))

    @cached_property
    def teacher_layers(self) -> Layers:
        """The teacher's blocks on the same images, at its own size and with its own statistics."""
        from basd.data.views import eval_view, normalize
        from basd.training.teachers import statistics_of

        mean, std = statistics_of(self.config.teacher, self.config.data)
        size = self.config.teacher.image_size
        seen = self.images if self.images.shape[-1] == size else eval_view(self.images, size)
        return read_layers(self.teacher, normalize(seen, mean, std))


@dataclass(frozen=True)
class Distances:
    """Mean attention distance of each block and head, in sides of the image, (blocks, heads)."""

    name: str
    student: Tensor
    teacher: Tensor

    @classmethod
    def of(cls, arm: TrainedArm) -> Distances:
        """Of a student and its teacher on the arm's images."""
        return cls(arm.name, attention_distances(arm.student_layers), attention_distances(arm.teacher_layers))


def open_arm(
    reference: str,
    *,
    runs: str | Path = "runs",
    tracking_uri: str = "sqlite:///mlflow.db",
    setting: str | None = None,
    count: int = 64,
    name: str | None = None,
) -> TrainedArm:
    """A finished arm by its key or the beginning of it, its directory, or its MLflow run id.

    `count` images of the validation split, in its order: the test split is left alone; `name` is what figures call the arm,
    by default its own name. `UserError` where the arm, its
    weights, its data or its teacher are not here.
    """
    import torch

    from basd.config import from_dict
    from basd.data import load as load_data
    from basd.data.feed import evaluation_batches
    from basd.export import trained_student
    from basd.grid.finished import find_finished
    from basd.tracking.files import read_json
    from basd.training.teachers import prepare_teacher

    with tempfile.TemporaryDirectory() as scratch:
        arm = find_finished(reference, Path(runs), tracking_uri, setting, Path(scratch))
        student, _ = trained_student(arm)
    frozen = read_json(Path(arm.place) / "arm.json") or {}
    if "config" not in frozen:
        raise UserError(f"the configuration of {arm.place} is not on this machine; give the arm's directory.")
    config = from_dict(frozen["config"])
    splits = load_data(config.data)
    teacher = prepare_teacher(config.teacher, config.data, splits, logits=False).model.eval()
    batches = evaluation_batches(
        splits.validation, config.student.image_size, getattr(config.data, "eval_crop", 1.0), count, torch.device("cpu")
    )
    images, labels = next(iter(batches))
    return TrainedArm(name or arm.name, arm.arm_key, student, teacher, config, images[:count], labels[:count])


def read_layers(model: VisionTransformer, images: Tensor) -> Layers:
    """Patch tokens and attention of every block; images are normalised, (B, 3, H, W)."""
    import torch

    from basd.models.taps import Taps, grid_of

    taps = Taps(model, range(len(model.blocks)), range(len(model.blocks)))
    with torch.inference_mode(), taps.record() as tapped:
        model(images)
    prefix = model.num_prefix_tokens
    depth = len(model.blocks)
    return Layers(
        tokens=tuple(tapped.tokens[block][:, prefix:] for block in range(depth)),
        attention=tuple(tapped.attention(block) for block in range(depth)),
        grid=grid_of(model),
        prefix=prefix,
    )


def rollout(layers: Layers) -> Tensor:
    """Attention from the class token to each patch through all blocks, (B, rows, columns), summing to 1 with the prefix's.

    Heads averaged, half of each block's weight on the residual path, products from the first block on (Abnar and Zuidema
    2020, arXiv:2005.00928, eq. 1).
    """
    import torch

    length = layers.attention[0].shape[-1]
    identity = torch.eye(length)
    flow = identity.expand(layers.attention[0].shape[0], length, length)
    for attention in layers.attention:
        flow = (0.5 * attention.mean(dim=1) + 0.5 * identity) @ flow
    return flow[:, 0, layers.prefix :].unflatten(-1, layers.grid)


def attention_distances(layers: Layers) -> Tensor:
    """Mean attention distance of each block and head over the images, in parts of the image's side, (blocks, heads)."""
    import torch

    from basd.evaluation.attention import attention_distance

    return torch.stack([attention_distance(attention, layers.grid).mean(dim=0) for attention in layers.attention])


def amplitude_spectra(layers: Layers) -> Tensor:
    """Mean amplitude of the tokens' 2-D Fourier transform over images and channels, DC in the middle, (blocks, rows, columns)."""
    import torch

    spectra = []
    for tokens in layers.tokens:
        maps = tokens.unflatten(1, layers.grid)
        amplitude = torch.fft.fft2(maps, dim=(1, 2), norm="ortho").abs().mean(dim=(0, 3))
        spectra.append(torch.fft.fftshift(amplitude))
    return torch.stack(spectra)


def radial_profiles(spectra: Tensor) -> tuple[Tensor, Tensor]:
    """Frequencies in parts of the Nyquist frequency, (R,), and the mean amplitude at each, (blocks, R); rings one bin wide."""
    import torch

    rows, columns = spectra.shape[1:]
    y = torch.fft.fftshift(torch.fft.fftfreq(rows, dtype=torch.float64)) * 2
    x = torch.fft.fftshift(torch.fft.fftfreq(columns, dtype=torch.float64)) * 2
    radius = (y[:, None] ** 2 + x[None, :] ** 2).sqrt()
    count = min(rows, columns) // 2 + 1
    ring = (radius * (count - 1)).round().long().clamp(max=count - 1).flatten()
    # corners beyond Nyquist belong to no ring
    inside = (radius.flatten() * (count - 1)).round() <= count - 1
    member = torch.nn.functional.one_hot(ring[inside], count).to(spectra.dtype)
    profile = spectra.flatten(1)[:, inside] @ member / member.sum(dim=0)
    return torch.linspace(0, 1, count), profile


def cka(ours: Layers, theirs: Layers) -> Tensor:
    """Linear CKA between blocks, unbiased, with images as samples, (blocks of ours, blocks of theirs).

    See `basd.evaluation.agreement`; around 0 for unrelated features, where noise may take it below.
    """
    import torch

    from basd.evaluation.agreement import LEAST_IMAGES, hsic_triple, image_grams, minibatch_cka

    if len(ours.tokens[0]) < LEAST_IMAGES:
        raise UserError(f"CKA needs at least {LEAST_IMAGES} images; open the arm with a larger count.")
    mine, others = (torch.stack([image_grams(tokens[None])[0] for tokens in one.tokens]) for one in (ours, theirs))
    rows = [minibatch_cka(hsic_triple(gram.expand_as(others), others)[None]) for gram in mine]
    return torch.stack(rows).float()
