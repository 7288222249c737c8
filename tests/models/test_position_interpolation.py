"""DINOv2's positions at other image sizes, against the formula of its original release written out here."""

from itertools import product
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

from basd.models.teacher import TimmTeacherConfig, build_timm_teacher, interpolate_dinov2_positions

NATIVE = 37  # 518 pixels in patches of 14


def released(positions: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """dinov2_vits14: an offset of 0.1 in the scale factor, bicubic, no antialias; the class token's position apart."""
    cls, patches = positions[:, :1], positions[:, 1:]
    side = int(patches.shape[1] ** 0.5)
    square = patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    factor = (float(grid[0] + 0.1) / side, float(grid[1] + 0.1) / side)
    moved = F.interpolate(square, scale_factor=factor, mode="bicubic", antialias=False)
    assert moved.shape[-2:] == grid
    return torch.cat([cls, moved.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)], dim=1)


def released_with_registers(positions: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """dinov2_vits14_reg: the exact output size, bicubic, antialias. timm keeps no position for the class token."""
    side = int(positions.shape[1] ** 0.5)
    square = positions.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    moved = F.interpolate(square, size=grid, mode="bicubic", antialias=True)
    return moved.permute(0, 2, 3, 1).reshape(1, grid[0] * grid[1], -1)


def close(got: torch.Tensor, expected: torch.Tensor, case: object) -> None:
    torch.testing.assert_close(got, expected, msg=lambda said: f"{case}: {said}")


def test_positions_are_those_of_the_release() -> None:
    torch.manual_seed(0)
    plain, registers = torch.randn(1, 1 + NATIVE**2, 8), torch.randn(1, NATIVE**2, 8)
    for grid in [(16, 16), (14, 14), (5, 5), (38, 38), (60, 60), (16, 20)]:
        close(interpolate_dinov2_positions(plain, grid, False), released(plain, grid), grid)
        close(interpolate_dinov2_positions(registers, grid, True), released_with_registers(registers, grid), grid)
    assert torch.equal(interpolate_dinov2_positions(plain, (NATIVE, NATIVE), False), plain)


def test_every_grid_comes_out_at_its_size() -> None:
    """Despite the offset in the scale, at every size that rounding could change."""
    positions = torch.randn(1, 1 + NATIVE**2, 1)
    for side in range(1, 75):
        assert interpolate_dinov2_positions(positions, (side, side), False).shape == (1, 1 + side * side, 1), side


def test_the_offset_and_the_antialias_are_seen() -> None:
    """On smooth positions timm's differ by what the offset moves the samples."""
    ramp = torch.linspace(0, 1, NATIVE).view(1, NATIVE, 1).expand(1, NATIVE, NATIVE).reshape(1, -1, 1)
    positions = torch.cat([torch.zeros(1, 1, 1), ramp], dim=1)
    ours = interpolate_dinov2_positions(positions, (16, 16), False)
    timms = resample_abs_pos_embed(positions, [16, 16], [NATIVE, NATIVE])
    difference = (ours - timms).abs().max()
    # centre i is read at (i + 1/2)·37/16.1 − 1/2 instead of (i + 1/2)·37/16 − 1/2
    expected = 15.5 * (NATIVE / 16 - NATIVE / 16.1) / (NATIVE - 1)
    assert 0.5 * expected < difference < 2 * expected


# -- in the teacher ----------------------------------------------------------------------------------------------------

MODELS = {"plain": "vit_small_patch14_dinov2.lvd142m", "registers": "vit_small_patch14_reg4_dinov2.lvd142m"}


def released_file(kind: str, folder: Path) -> Path:
    """A checkpoint at 518 pixels with random weights, in timm's layout."""
    with torch.device("meta"):
        model = timm.create_model(MODELS[kind].split(".")[0], pretrained=False)
    torch.manual_seed(0)
    path = folder / f"{kind}.safetensors"
    save_file({name: torch.randn(value.shape) for name, value in model.state_dict().items()}, path)
    return path


def check_teacher(kind: str, path: Path, image_size: int, how: str) -> None:
    config = TimmTeacherConfig(model=MODELS[kind], image_size=image_size, weights=str(path), position_interpolation=how)
    model = build_timm_teacher(config, 10)
    stored, got = load_file(path), model.state_dict()
    positions, side = stored.pop("pos_embed"), image_size // 14
    case = (kind, image_size, how)
    assert model.patch_embed.grid_size == (side, side), case
    if image_size == 518:
        expected = positions
    elif kind == "registers":
        # the release antialiases here too: both ways are the same
        expected = released_with_registers(positions, (side, side))
    elif how == "original":
        expected = released(positions, (side, side))
    else:
        expected = resample_abs_pos_embed(positions, [side, side], [NATIVE, NATIVE])
    close(got.pop("pos_embed"), expected, case)
    assert got.keys() == stored.keys() and all(torch.equal(got[name], stored[name]) for name in got), case
    if image_size == 196:
        with torch.no_grad():
            assert model(torch.randn(1, 3, 196, 196)).shape == (1, 384), case


@pytest.mark.full
def test_teacher_at_other_image_sizes(tmp_path: Path) -> None:
    for kind in MODELS:
        path = released_file(kind, tmp_path)
        for image_size, how in product([224, 196, 518], ["original", "timm"]):
            check_teacher(kind, path, image_size, how)


def test_weights_of_the_hub_are_taken_at_their_native_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: None)
    torch.manual_seed(3)
    native = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0)
    torch.manual_seed(3)
    model = build_timm_teacher(TimmTeacherConfig(image_size=224), 10)
    assert native.pos_embed.shape[1] == 1 + NATIVE**2
    torch.testing.assert_close(model.pos_embed.detach(), released(native.pos_embed.detach(), (16, 16)))


def test_other_models_and_random_weights_do_not_change(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", pretrained=False, img_size=96).state_dict(), tmp_path / "w.safetensors")
    for weights in ("random", str(tmp_path / "w.safetensors")):
        built = []
        for how in ("original", "timm"):
            torch.manual_seed(1)
            config = TimmTeacherConfig(model="test_vit", image_size=64, weights=weights, position_interpolation=how)
            built.append(build_timm_teacher(config).state_dict())
        assert all(torch.equal(built[0][name], built[1][name]) for name in built[0])
