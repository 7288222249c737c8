"""feature: mean squared error between the student's projected hidden states and the teacher's.

The plain form of feature distillation that layer matching (arXiv:2502.04499), ALP-KD (arXiv:2012.14022) and projection
to the teacher's width share; the selector says which teacher layers a point is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basd.components.comparison import CLS, PROJECTION, TOKENS, Comparison
from basd.components.sizes import Sizes

READS = {
    "patches": frozenset({PROJECTION, TOKENS}),
    "cls": frozenset({PROJECTION, CLS}),
    "both": frozenset({PROJECTION, TOKENS, CLS}),
}


@dataclass
class FeatureLossConfig:
    enabled: bool = False
    # The hidden states that are compared: patch tokens, the class token, or both, each with a mean of its own.
    samples: str = field(default="patches", metadata={"choices": tuple(READS)})

    @property
    def reads(self) -> frozenset[str]:
        return READS[self.samples]

    def build(self, sizes: Sizes) -> FeatureLoss:
        return FeatureLoss(self)


class FeatureLoss(nn.Module):
    """L = mean of (s − t)² over points, images, tokens and channels; with `samples=both`
    L = (MSE of class tokens + MSE of patch tokens)/2, so that the one class token weighs as much as the N patches.

    The teacher's side has mean square 1 (LN0 of the mixture), less where the token aligner or the mixing averages: 1 at
    most for a student that says nothing, 0 for a match, more for an unrelated one. With `objective.target_norm=none` the
    unit is the teacher's.
    """

    def __init__(self, config: FeatureLossConfig) -> None:
        super().__init__()
        self.samples = config.samples

    def compare(self, comparison: Comparison) -> Tensor:
        """The loss of one step."""
        errors = []
        if self.samples != "patches":
            errors.append(self(comparison.projected_cls, comparison.target_cls))
        if self.samples != "cls":
            errors.append(self(comparison.projected, comparison.target))
        return torch.stack(errors).mean()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """student, teacher (M, B, N, D), class tokens (M, B, D), in the teacher's width. Returns a scalar."""
        assert student.shape == teacher.shape, (student.shape, teacher.shape)
        return F.mse_loss(student, teacher)
