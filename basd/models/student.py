"""The student: a DeiT-style ViT on timm's VisionTransformer, read at the extraction points.

The model is timm's own class, so its state dict loads into timm's `deit_tiny_patch16_224` (at DeiT-Tiny's sizes) and
back; nothing of the distillation enters it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from basd.models.taps import Taps, grid_of, patch_scores


@dataclass
class StudentConfig:
    """Sizes of the student. Default: DeiT-Tiny (Touvron et al. 2021, arXiv:2012.12877, table 1)."""

    name: str = "deit_tiny"
    image_size: int = field(default=224, metadata={"min": 1})
    patch_size: int = field(default=16, metadata={"min": 1})
    width: int = field(default=192, metadata={"min": 1})
    depth: int = field(default=12, metadata={"min": 1})
    heads: int = field(default=3, metadata={"min": 1})
    mlp_ratio: float = field(default=4.0, metadata={"min": 0.0})
    drop_path: float = field(default=0.1, metadata={"min": 0.0, "max": 0.999})
    # A count M of extraction points, or a list of block indices.
    points: Any = field(default=4, metadata={"kind": "points"})


def extraction_points(points: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Blocks the losses are attached to: round((i+1)·L_s/M)−1 for a count M (12 blocks, 4 points: 2, 5, 8, 11)."""
    if isinstance(points, int):
        # floor(x + 1/2): Python's round() would send halves to even numbers
        return tuple(int((i + 1) * depth / points + 0.5) - 1 for i in range(points))
    return tuple(int(p) for p in points)


def build_student(config: StudentConfig, classes: int) -> VisionTransformer:
    """A freshly initialised student; draws from torch's global generator."""
    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=classes,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        drop_path_rate=config.drop_path,
    )


@dataclass
class StudentOutput:
    """logits (B, C); at the M points: tokens (M, B, N, D) and, where asked for, scores (M, B, H, 1+N, 1+N)."""

    logits: Tensor
    tokens: Tensor | None = None
    scores: Tensor | None = None


class TappedStudent:
    """Runs a student and gathers what the losses read. Not a module: it owns no parameter."""

    def __init__(self, model: VisionTransformer, points: Sequence[int], attention: bool) -> None:
        self.model = model
        self.points = tuple(points)
        self.attention = attention
        self.grid = grid_of(model)
        self._taps = Taps(model, self.points, self.points if attention else ())

    def __call__(self, images: Tensor) -> StudentOutput:
        """images: (B, 3, S, S), normalised."""
        with self._taps.record() as tapped:
            logits = self.model(images)
        if not self.points:
            return StudentOutput(logits)
        prefix = self.model.num_prefix_tokens
        tokens = torch.stack([tapped.tokens[p][:, prefix:] for p in self.points])
        scores = None
        if self.attention:
            scores = torch.stack([patch_scores(tapped.scores(p), prefix) for p in self.points])
        return StudentOutput(logits, tokens, scores)
