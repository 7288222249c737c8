"""DINOv2's release as a teacher: tokens, attention and features, against its forward pass written out by hand."""

from pathlib import Path

import pytest
import torch
from dinov2_release import SIZES, forward, random_state
from torch import Tensor

from basd.models.resampling import resample_attention
from basd.models.teacher import Teacher, TimmTeacherConfig, build_timm_teacher

Released = tuple[str, Path, dict[str, Tensor]]


@pytest.fixture(scope="module", params=["vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2.lvd142m"])
def released(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Released:
    state = random_state(*SIZES["vits14"], registers=4 if "reg4" in request.param else 0)
    path = tmp_path_factory.mktemp("released") / "dinov2_pretrain.pth"
    torch.save(state, path)
    return request.param, path, state


def check_against_the_release(released: Released, image_size: int) -> None:
    name, path, state = released
    picture = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(image_size))
    with torch.no_grad():
        tokens, maps, feature = forward(state, picture, heads=6)
    config = TimmTeacherConfig(model=name, image_size=image_size, weights=str(path), position_interpolation="original")
    out = Teacher(build_timm_teacher(config, 10))(picture)
    registers = 4 if "register_tokens" in state else 0

    def close(got: Tensor, expected: Tensor, rtol: float = 1e-3, atol: float = 1e-3) -> None:
        case = f"{name} at {image_size} pixels"
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, msg=lambda said: f"{case}: {said}")

    close(out.tokens, torch.stack([x[:, 1 + registers :] for x in tokens]))
    close(out.cls, torch.stack([x[:, 0] for x in tokens]))
    close(out.features, feature)
    if image_size == 196:
        keep = [0, *range(1 + registers, 197 + registers)]
        kept = torch.stack(maps)[..., keep, :][..., keep]
        kept = resample_attention(kept / kept.sum(-1, keepdim=True), (7, 7), (14, 14))
        close(out.attention((7, 7)), kept, rtol=1e-2, atol=1e-5)


def test_teacher_is_the_release_at_the_students_grid(released: Released) -> None:
    check_against_the_release(released, 196)


@pytest.mark.full
def test_teacher_is_the_release_at_its_own_size_and_between(released: Released) -> None:
    for image_size in (518, 224):
        check_against_the_release(released, image_size)
