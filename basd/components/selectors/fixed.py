"""Selectors without parameters: the controls that every learned selector has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from basd.components.sizes import Sizes
from basd.models.teacher import TeacherOutput


def proportional_layers(sizes: Sizes) -> tuple[float, ...]:
    """Teacher layer at the same relative depth as each point: (p+1)·L/L_s − 1, not rounded."""
    return tuple((p + 1) * sizes.teacher_depth / sizes.student_depth - 1 for p in sizes.points)


class FixedSelector(nn.Module):
    """α is constant, (M, L); no entropy term."""

    alpha: Tensor

    def __init__(self, alpha: Tensor) -> None:
        super().__init__()
        self.register_buffer("alpha", alpha)

    def forward(self, student: Tensor, teacher: TeacherOutput) -> Tensor:
        """Returns α (M, L), rows sum to 1."""
        return self.alpha


@dataclass
class UniformConfig:
    """Every layer with the same weight."""

    name: str = "uniform"

    def build(self, sizes: Sizes) -> nn.Module:
        return FixedSelector(torch.full((len(sizes.points), sizes.teacher_depth), 1 / sizes.teacher_depth))


@dataclass
class ForwardConfig:
    """One layer per point, at proportional depth (arXiv:2502.04499, "forward")."""

    name: str = "forward"

    def build(self, sizes: Sizes) -> nn.Module:
        alpha = torch.zeros(len(sizes.points), sizes.teacher_depth)
        for point, layer in enumerate(proportional_layers(sizes)):
            alpha[point, min(max(int(layer + 0.5), 0), sizes.teacher_depth - 1)] = 1.0
        return FixedSelector(alpha)
