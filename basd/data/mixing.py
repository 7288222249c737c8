"""MixUp and CutMix of the student's batch: one draw a batch, each image with the one at the mirrored place."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

TARGETS = ("follow", "same_input", "clean", "skip")


class _Mixing:
    """What every kind of mixing has. `probability` is the share of batches that are mixed at all (timm's mixup_prob).

    `targets` says what the teacher's targets are where the student's batch is mixed. `follow`: those of the clean
    images, mixed like the student's images. `same_input`: the teacher sees the mixed clean images. `clean`: those of
    the clean images, unmixed. `skip`: none, token losses are computed on unmixed batches only.
    """

    targets: str
    probability: float

    def problems(self) -> list[str]:
        """What does not fit together, one sentence each; empty when all is well."""
        if self.targets == "skip" and self.probability == 1:
            return [
                "mixing.targets=skip with mixing.probability=1 mixes every batch, so nothing would be distilled; "
                "set mixing.probability below 1"
            ]
        return []


@dataclass
class MixupCutmixConfig(_Mixing):
    """MixUp or, with probability `switch`, CutMix."""

    name: str = "mixup_cutmix"
    mixup_alpha: float = field(default=0.8, metadata={"min": 0.01})
    cutmix_alpha: float = field(default=1.0, metadata={"min": 0.01})
    switch: float = field(default=0.5, metadata={"min": 0.0, "max": 1.0})
    targets: str = field(default="follow", metadata={"choices": TARGETS})
    probability: float = field(default=1.0, metadata={"min": 0.0, "max": 1.0})


@dataclass
class MixupConfig(_Mixing):
    """MixUp: λ ~ Beta(mixup_alpha, mixup_alpha)."""

    name: str = "mixup"
    mixup_alpha: float = field(default=0.8, metadata={"min": 0.01})
    targets: str = field(default="follow", metadata={"choices": TARGETS})
    probability: float = field(default=1.0, metadata={"min": 0.0, "max": 1.0})


@dataclass
class CutmixConfig(_Mixing):
    """CutMix: λ ~ Beta(cutmix_alpha, cutmix_alpha) sets the box's area."""

    name: str = "cutmix"
    cutmix_alpha: float = field(default=1.0, metadata={"min": 0.01})
    targets: str = field(default="follow", metadata={"choices": TARGETS})
    probability: float = field(default=1.0, metadata={"min": 0.0, "max": 1.0})


@dataclass
class NoMixingConfig:
    """Images and labels as they are."""

    name: str = "none"


MIXINGS: dict[str, type[Any]] = {
    "mixup_cutmix": MixupCutmixConfig,
    "mixup": MixupConfig,
    "cutmix": CutmixConfig,
    "none": NoMixingConfig,
}
MixingConfig = MixupCutmixConfig | MixupConfig | CutmixConfig | NoMixingConfig


@dataclass(frozen=True)
class Mix:
    """One batch's mixing. The partner of sample i is sample B−1−i (`partner(x)`).

    kind: "mixup" or "cutmix"; lam: the own image's share of pixels and label; box: for CutMix (y0, y1, x0, x1) in
    pixels of the image it was drawn for, end excluded, showing the partner; for MixUp None.
    """

    kind: str
    lam: float
    box: tuple[int, int, int, int] | None = None

    @staticmethod
    def partner(x: Tensor) -> Tensor:
        """Each sample's partner, for any tensor (B,…)."""
        return x.flip(0)

    def mix_images(self, x: Tensor) -> Tensor:
        """The mixed batch of (B,C,H,W), of the size the mix was drawn for; a new tensor."""
        if self.box is None:
            return self.convex(x)
        y0, y1, x0, x1 = self.box
        mixed = x.clone()
        mixed[:, :, y0:y1, x0:x1] = x[:, :, y0:y1, x0:x1].flip(0)
        return mixed

    def mix_labels(self, labels: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
        """Soft targets float32 (B,classes) of labels int64 (B,); rows sum to 1."""
        return self.convex(soft_labels(labels, classes, smoothing))

    def convex(self, x: Tensor) -> Tensor:
        """λ·x + (1−λ)·partner, for any tensor (B,…)."""
        return x * self.lam + self.partner(x) * (1 - self.lam)

    def coverage(
        self, grid_h: int, grid_w: int, image_h: int, image_w: int, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The partner's share of each patch, float32 (grid_h·grid_w,), row by row; its mean is 1−λ.

        CutMix: the exact share of the patch's area under the box, whether or not their edges align; `image_h` and
        `image_w` are the size the mix was drawn for. MixUp: 1−λ everywhere.
        """
        if self.box is None:
            return torch.full((grid_h * grid_w,), 1 - self.lam, device=device)
        y0, y1, x0, x1 = self.box
        rows = _overlap(y0, y1, grid_h, image_h)
        columns = _overlap(x0, x1, grid_w, image_w)
        return torch.outer(rows, columns).flatten().to(device=device, dtype=torch.float32)


def _overlap(start: int, end: int, cells: int, length: int) -> Tensor:
    """The share of each of `cells` equal cells of a line of `length` that [start, end) covers; float64."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * length / cells
    return (edges[1:].clamp_max(end) - edges[:-1].clamp_min(start)).clamp_min(0) * cells / length


def soft_labels(labels: Tensor, classes: int, smoothing: float = 0.0) -> Tensor:
    """One-hot targets float32 (B,classes) of labels int64 (B,), `smoothing` spread over all classes."""
    rest = smoothing / classes
    soft = torch.full((labels.shape[0], classes), rest, device=labels.device)
    return soft.scatter_(1, labels.view(-1, 1), 1 - smoothing + rest)


def draw(config: MixingConfig, height: int, width: int, generator: torch.Generator) -> Mix | None:
    """The mixing of one batch of height×width images, as timm's batch mode draws it; None for a batch that is not mixed.

    CutMix's λ is corrected to the true area of the box, which the image's border may clip. The random numbers are the
    same whatever `probability` is: a smaller one only leaves some batches out.
    """
    if isinstance(config, NoMixingConfig):
        return None
    switch, cy_draw, cx_draw = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    # torch's public Beta draws from global state; this one is NumPy's, on a state of its own
    seed = int(torch.randint(2**62, (), generator=generator))
    if not float(torch.rand((), generator=generator, dtype=torch.float64)) < config.probability:
        return None
    if isinstance(config, MixupCutmixConfig):
        cut = switch < config.switch
        alpha = config.cutmix_alpha if cut else config.mixup_alpha
    elif isinstance(config, CutmixConfig):
        cut, alpha = True, config.cutmix_alpha
    else:
        cut, alpha = False, config.mixup_alpha
    lam = float(np.random.Generator(np.random.PCG64(seed)).beta(alpha, alpha))
    if not cut:
        return Mix("mixup", lam)
    side = math.sqrt(1 - lam)
    cut_h, cut_w = int(height * side), int(width * side)
    cy, cx = int(cy_draw * height), int(cx_draw * width)
    y0, y1 = max(cy - cut_h // 2, 0), min(cy + (cut_h + 1) // 2, height)
    x0, x1 = max(cx - cut_w // 2, 0), min(cx + (cut_w + 1) // 2, width)
    return Mix("cutmix", 1 - (y1 - y0) * (x1 - x0) / (height * width), (y0, y1, x0, x1))
