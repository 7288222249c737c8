"""interpolate: area-overlap resampling of teacher tokens, without parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from basd.components.sizes import Sizes
from basd.models.resampling import row_resampling


@dataclass
class InterpolateConfig:
    name: str = "interpolate"
    student_mlp: ClassVar[bool] = False

    def build(self, sizes: Sizes) -> nn.Module:
        return Interpolate(sizes)


class Interpolate(nn.Module):
    resampling: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.register_buffer(
            "resampling", row_resampling(sizes.student_grid, sizes.teacher_grid).clone(), persistent=False
        )

    def weights(self, tokens: Tensor) -> Tensor:
        """P (1, 1, N_s, N_t), the same for every point and image."""
        return self.resampling[None, None]

    def forward(self, tokens: Tensor) -> Tensor:
        """(M, B, N_t, D) → (M, B, N_s, D)."""
        return self.weights(tokens) @ tokens
