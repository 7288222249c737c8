"""Sizes, tokens and teacher outputs for the tests of layer selectors."""

from functools import lru_cache

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from basd.components.sizes import Sizes
from basd.models.teacher import Teacher, TeacherOutput

LAYERS, WIDTH = 5, 24


def sizes(
    points: tuple[int, ...] = (1, 3),
    student_depth: int = 4,
    teacher_depth: int = LAYERS,
    student_width: int = 6,
    teacher_width: int = WIDTH,
    student_grid: tuple[int, int] = (4, 3),
    teacher_grid: tuple[int, int] = (3, 5),
) -> Sizes:
    return Sizes(
        points=points,
        image_size=24,
        student_depth=student_depth,
        student_width=student_width,
        student_heads=2,
        student_grid=student_grid,
        teacher_depth=teacher_depth,
        teacher_width=teacher_width,
        teacher_heads=3,
        teacher_grid=teacher_grid,
        total_steps=10,
    )


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_teacher() -> TeacherOutput:
    """One forward pass of a ViT whose layers are all different, 3 images."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=(12, 20), patch_size=4, num_classes=2, embed_dim=WIDTH, depth=LAYERS, num_heads=3
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return Teacher(model)(randn(3, 3, 12, 20))


@lru_cache
def teacher_of(layers: int, width: int, grid: tuple[int, int]) -> Teacher:
    model = VisionTransformer(
        img_size=(2 * grid[0], 2 * grid[1]),
        patch_size=2,
        num_classes=0,
        embed_dim=width,
        depth=layers,
        num_heads=1,
        mlp_ratio=1.0,
    )
    return Teacher(model, attention=False)


def teacher_with(tokens: Tensor, grid: tuple[int, int]) -> TeacherOutput:
    """A teacher's output with these patch tokens, (L, B, N_t, D_t)."""
    layers, batch, _, width = tokens.shape
    output = teacher_of(layers, width, grid)(torch.zeros(batch, 3, 2 * grid[0], 2 * grid[1]))
    assert output.tokens.shape == tokens.shape and output.grid == grid
    output.tokens = tokens
    return output


def student_tokens(s: Sizes, batch: int = 3, seed: int = 0) -> Tensor:
    return randn(len(s.points), batch, s.student_tokens, s.student_width, seed=seed)
