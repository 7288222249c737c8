"""alp: attention of the student's state over the states of all teacher layers.

Source: ALP-KD (arXiv:2012.14022), where α is the softmax over teacher layers of the dot products of class-token states.
Here the states are means over patch tokens, one α serves the whole batch, and LN0 comes first: BERT's states leave a
LayerNorm, while the raw sums of a pre-norm ViT grow with depth, so that the last layer would win by its length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from basd.components.selectors.learned import LearnedSelectorConfig
from basd.components.sizes import Sizes
from basd.distributed import average
from basd.models.teacher import TeacherOutput


@dataclass
class AlpConfig(LearnedSelectorConfig):
    name: str = "alp"

    def build(self, sizes: Sizes) -> nn.Module:
        return AlpSelector(self, sizes)


def pooled_states(tokens: Tensor) -> Tensor:
    """Mean over tokens of LN0 of them, float32: (K, B, N, D) → (K, B, D)."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:]).mean(dim=2)


class AlpSelector(nn.Module):
    """z_{m,l} = mean over images (of all processes) of ⟨W s_m, t_l⟩/√D_t, s and t pooled states; α = softmax(z/τ) over layers.

    W (D_s → D_t, no bias, one for all points) stands only where the widths differ; with equal widths nothing is
    learned and α follows the student. Student states are detached.
    """

    def __init__(self, config: AlpConfig, sizes: Sizes) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.projection: nn.Linear | None = None
        if sizes.student_width != sizes.teacher_width:
            self.projection = nn.Linear(sizes.student_width, sizes.teacher_width, bias=False)

    def forward(self, student: Tensor, teacher: TeacherOutput) -> Tensor:
        """student (M, B, N, D_s) tokens at the points. Returns α (M, L), rows sum to 1."""
        states = pooled_states(student.detach())
        if self.projection is not None:
            states = self.projection(states)
        layers = teacher.shared(("alp", "pooled"), lambda: teacher.normalized_tokens().mean(dim=2))
        images, width = layers.shape[1:]
        logits = states.flatten(1) @ layers.flatten(1).T / (images * math.sqrt(width))
        return (average(logits)[0] / self.temperature).softmax(dim=-1)
