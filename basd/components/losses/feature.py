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
    # The hidden states that are compared: patch tokens, the class token, or all 1+N of them.
    samples: str = field(default="patches", metadata={"choices": tuple(READS)})

    @property
    def reads(self) -> frozenset[str]:
        return READS[self.samples]

    def build(self, sizes: Sizes) -> FeatureLoss:
        return FeatureLoss(self)


class FeatureLoss(nn.Module):
    """L = mean of (s − t)² over points, images, tokens and channels.

    The teacher's side has mean square 1 (LN0 of the mixture), less where the token aligner or the mixing averages: 1 at
    most for a student that says nothing, 0 for a match, more for an unrelated one.
    """

    def __init__(self, config: FeatureLossConfig) -> None:
        super().__init__()
        self.samples = config.samples

    def compare(self, comparison: Comparison) -> Tensor:
        """The loss of one step."""
        student, teacher = [], []
        if self.samples != "patches":
            student.append(comparison.projected_cls.unsqueeze(2))
            teacher.append(comparison.target_cls.unsqueeze(2))
        if self.samples != "cls":
            student.append(comparison.projected)
            teacher.append(comparison.target)
        return self(torch.cat(student, dim=2), torch.cat(teacher, dim=2))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """student, teacher (M, B, N, D) in the teacher's width. Returns a scalar."""
        assert student.shape == teacher.shape, (student.shape, teacher.shape)
        return F.mse_loss(student, teacher)
