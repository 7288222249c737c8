"""The moving average of a student's weights over its steps, which is then what is evaluated and exported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.utils.model_ema import ModelEmaV3


class WeightAverage:
    """timm's ModelEmaV3 with its warm-up: after step t, average ← d·average + (1 − d)·weights.

    d = min(decay, 1 − t^(−2/3)) with t counted from 1, so that the first step's weights replace the random start and short
    trainings average over a shorter past (timm.utils.ModelEmaV3, gamma 1 and power 2/3, after K. Crowson).
    """

    def __init__(self, student: VisionTransformer, decay: float) -> None:
        """Copies the student as it is: before hooks are put on it."""
        self._average = ModelEmaV3(student, decay, use_warmup=True)
        self._average.requires_grad_(False)

    @property
    def student(self) -> VisionTransformer:
        """The averaged student, in evaluation mode."""
        return self._average.module

    def update(self, student: VisionTransformer, step: int) -> None:
        """Take in the weights after `step` finished steps."""
        self._average.update(student, step)

    def state(self) -> dict[str, torch.Tensor]:
        return self.student.state_dict()

    def load(self, state: Mapping[str, Any]) -> None:
        self.student.load_state_dict(state)
