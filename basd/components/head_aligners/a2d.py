"""a2d: Align-to-Distill as published (arXiv:2403.01479): all student heads at once to all heads of all teacher layers.

A softmax over the whole flattened map is taken on both sides, although its entries are probabilities already. They lie
in [0, 1], so the target is nearly uniform: even a map with one key per query is only about 1/K nats away from the uniform
one, where its rows are log K away. This is what was published, and it is here to be measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from basd.components.head_aligners.base import HeadAligner, mix_heads
from basd.components.sizes import Sizes


@dataclass
class A2DConfig:
    name: str = "a2d"
    # The attention loss is multiplied by this at every epoch.
    decay: float = field(default=0.9, metadata={"min": 0.0, "max": 1.0})

    all_layers: ClassVar[bool] = True

    def build(self, sizes: Sizes) -> HeadAligner:
        return A2DHeadAligner(self, sizes)


class A2DHeadAligner(HeadAligner):
    """A 1×1 convolution from the M·H_s student maps to the L·H_t teacher maps, started as torch starts a convolution.

    No bias: the softmax over the map would cancel it. Each side holds L·B·H_t·Q·K values.
    """

    all_layers = True

    def __init__(self, config: A2DConfig, sizes: Sizes) -> None:
        super().__init__()
        self.decay = config.decay
        inputs = len(sizes.points) * sizes.student_heads
        bound = 1 / math.sqrt(inputs)
        shape = (1, sizes.teacher_depth * sizes.teacher_heads, inputs)
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

    def forward(self, scores: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
        """scores (M, B, H_s, Q, K), maps (L, B, H_t, Q, K) → log-probabilities and probabilities (1, B, L·H_t, 1, Q·K)."""
        student = mix_heads(self.weight, scores.softmax(dim=-1)).flatten(3).log_softmax(dim=-1)
        teacher = maps.transpose(0, 1).flatten(3).flatten(1, 2).softmax(dim=-1)
        return student.unsqueeze(3), teacher[None, :, :, None]
