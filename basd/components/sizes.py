"""The sizes that components are built from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Shapes of a (student, teacher) pair and the length of training.

    points: student blocks the losses are attached to; image_size: side of the student's images in pixels; grids are
    (rows, columns) of patches.
    """

    points: tuple[int, ...]
    image_size: int
    student_depth: int
    student_width: int
    student_heads: int
    student_grid: tuple[int, int]
    teacher_depth: int
    teacher_width: int
    teacher_heads: int
    teacher_grid: tuple[int, int]
    total_steps: int = 1
    steps_per_epoch: int = 1

    @property
    def student_tokens(self) -> int:
        return self.student_grid[0] * self.student_grid[1]

    @property
    def teacher_tokens(self) -> int:
        return self.teacher_grid[0] * self.teacher_grid[1]
