"""DINOv2's release as a teacher: tokens, attention and features, against its forward pass written out by hand."""

from pathlib import Path

import pytest
import torch
from dinov2_release import SIZES, forward, random_state
from torch import Tensor

from basd.models.resampling import resample_attention
from basd.models.teacher import Teacher, TimmTeacherConfig, build_timm_teacher

pytestmark = pytest.mark.slow
Released = tuple[str, Path, dict[str, Tensor]]


@pytest.fixture(scope="module", params=["vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2.lvd142m"])
def released(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Released:
    state = random_state(*SIZES["vits14"], registers=4 if "reg4" in request.param else 0)
    path = tmp_path_factory.mktemp("released") / "dinov2_pretrain.pth"
    torch.save(state, path)
    return request.param, path, state


def build(released: Released, image_size: int, how: str = "original") -> Teacher:
    name, path, _ = released
    config = TimmTeacherConfig(model=name, image_size=image_size, weights=str(path), position_interpolation=how)
    return Teacher(build_timm_teacher(config, 10))


def picture(size: int) -> Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("image_size", [518, 224, 196])
def test_tokens_are_those_of_the_release(released: Released, image_size: int) -> None:
    _, _, state = released
    with torch.no_grad():
        tokens, maps, feature = forward(state, picture(image_size), heads=6)
    out = build(released, image_size)(picture(image_size))
    registers = 4 if "register_tokens" in state else 0
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(out.tokens, torch.stack([x[:, 1 + registers :] for x in tokens]), **close)
    torch.testing.assert_close(out.cls, torch.stack([x[:, 0] for x in tokens]), **close)
    torch.testing.assert_close(out.features, feature, **close)
    if image_size == 196:
        keep = [0, *range(1 + registers, 197 + registers)]
        kept = torch.stack(maps)[..., keep, :][..., keep]
        kept = resample_attention(kept / kept.sum(-1, keepdim=True), (7, 7), (14, 14))
        torch.testing.assert_close(out.attention((7, 7)), kept, rtol=1e-2, atol=1e-5)


def test_timms_positions_are_others_without_registers(released: Released) -> None:
    """About 1 % for the released weights; rough random positions differ more. With registers both are the same."""
    original, timms = (build(released, 224, how)(picture(224)).tokens[0] for how in ("original", "timm"))
    difference = (original - timms).norm() / original.norm()
    assert difference == 0 if "reg4" in released[0] else difference > 0.01
