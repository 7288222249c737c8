"""student_projection: the teacher side is only resampled; what has to be bridged is left to a student MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from basd.components.sizes import Sizes
from basd.components.token_aligners.interpolate import Interpolate


@dataclass
class StudentProjectionConfig:
    """`interpolate` for the teacher's tokens; the objective projects the student's by Linear–GELU–Linear."""

    name: str = "student_projection"
    student_mlp: ClassVar[bool] = True

    def build(self, sizes: Sizes) -> nn.Module:
        return Interpolate(sizes)
