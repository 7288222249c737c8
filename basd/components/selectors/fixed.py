"""Selectors without parameters: the controls that every learned selector has to beat. None has an entropy term.

The one-hot ones are the strategies that arXiv:2502.04499 finds to do about alike, and `last`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from basd.components.selectors.depth import nearest_layers
from basd.components.sizes import Sizes
from basd.errors import UserError
from basd.models.teacher import TeacherOutput


class FixedSelector(nn.Module):
    """α is constant, (M, L), and kept in the checkpoint; no entropy term."""

    alpha: Tensor

    def __init__(self, alpha: Tensor) -> None:
        super().__init__()
        self.register_buffer("alpha", alpha)

    def forward(self, student: Tensor, teacher: TeacherOutput) -> Tensor:
        """Returns α (M, L), rows sum to 1."""
        return self.alpha


def one_hot_selector(layers: Sequence[int], sizes: Sizes) -> FixedSelector:
    """One teacher layer per point, in the order of the points."""
    alpha = torch.zeros(len(sizes.points), sizes.teacher_depth)
    for point, layer in enumerate(layers):
        alpha[point, layer] = 1.0
    return FixedSelector(alpha)


@dataclass
class UniformConfig:
    """Every layer with the same weight."""

    name: str = "uniform"
    learned: ClassVar[bool] = False

    def build(self, sizes: Sizes) -> nn.Module:
        return FixedSelector(torch.full((len(sizes.points), sizes.teacher_depth), 1 / sizes.teacher_depth))


@dataclass
class ForwardConfig:
    """One layer per point, at proportional depth (arXiv:2502.04499, "forward")."""

    name: str = "forward"
    learned: ClassVar[bool] = False

    def build(self, sizes: Sizes) -> nn.Module:
        return one_hot_selector(nearest_layers(sizes), sizes)


@dataclass
class ReverseConfig:
    """The layers of `forward`, the deepest for the first point (arXiv:2502.04499, "reverse")."""

    name: str = "reverse"
    learned: ClassVar[bool] = False

    def build(self, sizes: Sizes) -> nn.Module:
        return one_hot_selector(nearest_layers(sizes)[::-1], sizes)


@dataclass
class RandomConfig:
    """One layer per point from a random permutation of all layers (arXiv:2502.04499, "random").

    The permutation is drawn once, from torch's global generator at construction, so it depends on the seed. No layer
    comes twice before each has come once.
    """

    name: str = "random"
    learned: ClassVar[bool] = False

    def build(self, sizes: Sizes) -> nn.Module:
        permutation = torch.randperm(sizes.teacher_depth).tolist()
        return one_hot_selector([permutation[m % sizes.teacher_depth] for m in range(len(sizes.points))], sizes)


@dataclass
class AllToOneConfig:
    """Every point learns from the same layer (arXiv:2502.04499, "all-to-one")."""

    name: str = "all_to_one"
    # Block of the teacher, from 0; null: the middle one, at half of the depth (block 5 of 12).
    layer: int | None = field(default=None, metadata={"min": 0})
    learned: ClassVar[bool] = False

    def build(self, sizes: Sizes) -> nn.Module:
        """`UserError` where the teacher has no such block."""
        depth = sizes.teacher_depth
        layer = (depth - 1) // 2 if self.layer is None else self.layer
        if not 0 <= layer < depth:
            raise UserError(
                f"selector.layer={layer} is not a block of the teacher, whose {depth} blocks are 0 to {depth - 1}; "
                "choose one of them, or null for the middle one."
            )
        return one_hot_selector([layer] * len(sizes.points), sizes)


@dataclass
class LastConfig:
    """Every point learns from the teacher's last layer."""

    name: str = "last"
    learned: ClassVar[bool] = False

    def build(self, sizes: Sizes) -> nn.Module:
        return one_hot_selector([sizes.teacher_depth - 1] * len(sizes.points), sizes)
