from itertools import product
from typing import Any

import torch
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from basd.models.resampling import resample_attention
from basd.models.teacher import (
    DigitsViTConfig,
    Teacher,
    TeacherShape,
    TimmTeacherConfig,
    build_digits_vit,
    build_timm_teacher,
    teacher_shape,
)


def vit(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    small = {"img_size": (12, 20), "patch_size": 4, "num_classes": 5, "embed_dim": 24, "depth": 3, "num_heads": 3}
    model = VisionTransformer(**{**small, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 12, 20, generator=torch.Generator().manual_seed(1))


def test_teacher_is_frozen() -> None:
    model = vit(drop_path_rate=0.5, proj_drop_rate=0.5).train()
    teacher = Teacher(model)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    out, again = teacher(images().requires_grad_()), teacher(images())
    assert torch.equal(out.tokens, again.tokens)
    for value in (out.tokens, out.cls, out.attention((3, 5)), out.normalized_tokens()):
        assert not value.requires_grad and value.grad_fn is None


def test_train_of_an_owner_does_not_reach_the_teacher() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = Teacher(vit(drop_path_rate=0.5))
            self.own = nn.Linear(2, 2)

    owner = Owner()
    owner.train()
    assert not owner.teacher.model.training
    assert {name for name, _ in owner.named_parameters()} == {"own.weight", "own.bias"}
    assert set(owner.state_dict()) == {"own.weight", "own.bias"}


def test_output_holds_raw_block_outputs() -> None:
    for registers in (0, 3):
        model = vit(reg_tokens=registers)
        out = Teacher(model)(images())
        assert out.tokens.shape == (3, 2, 15, 24) and out.cls.shape == (3, 2, 24) and out.grid == (3, 5), registers
        with torch.no_grad():
            hidden = model._pos_embed(model.patch_embed(images()))
            for layer, block in enumerate(model.blocks):
                hidden = block(hidden)
                assert torch.equal(out.tokens[layer], hidden[:, 1 + registers :]), (registers, layer)
                assert torch.equal(out.cls[layer], hidden[:, 0]), (registers, layer)


def test_normalized_tokens_have_zero_mean_and_unit_variance() -> None:
    tokens = Teacher(vit())(images()).normalized_tokens()
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(3, 2, 15), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.var(-1, unbiased=False), torch.ones(3, 2, 15), atol=1e-3, rtol=0)


def test_attention_of_every_layer_on_the_student_grid() -> None:
    for registers, grid in product([0, 3], [(3, 5), (2, 4), (4, 3)]):
        case = f"{registers} registers, grid {grid}: "
        model = vit(reg_tokens=registers)
        got = Teacher(model)(images()).attention(grid)
        assert got.shape == (3, 2, 3, 1 + grid[0] * grid[1], 1 + grid[0] * grid[1]), case
        torch.testing.assert_close(got.sum(-1), torch.ones(got.shape[:-1]), msg=lambda said, case=case: case + said)
        maps: list[torch.Tensor] = []
        for block in model.blocks:
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_hook(lambda _m, _i, out, maps=maps: maps.append(out))
        model(images())
        keep = [0, *range(1 + registers, 16 + registers)]
        for layer, full in enumerate(maps):
            kept = full[:, :, keep][:, :, :, keep]
            expected = resample_attention(kept / kept.sum(-1, keepdim=True), grid, (3, 5))
            torch.testing.assert_close(
                got[layer], expected, rtol=1e-4, atol=1e-6, msg=lambda said, case=case: case + said
            )


def test_shared_values_are_computed_once() -> None:
    out = Teacher(vit())(images())
    calls: list[int] = []

    def compute() -> int:
        calls.append(1)
        return 7

    assert [out.shared("key", compute) for _ in range(3)] == [7, 7, 7]
    assert len(calls) == 1
    out.shared("other", compute)
    assert len(calls) == 2
    assert out.attention((2, 4)) is out.attention((2, 4))
    assert out.attention((2, 4)).shape != out.attention((4, 3)).shape


def test_shape_of_a_teacher() -> None:
    assert teacher_shape(vit()) == TeacherShape(depth=3, width=24, heads=3, grid=(3, 5))
    config = DigitsViTConfig(image_size=24, patch_size=6, width=12, depth=2, heads=3)
    model = build_digits_vit(config, 7)
    assert teacher_shape(model) == TeacherShape(depth=2, width=12, heads=3, grid=(4, 4))
    assert model.num_classes == model.head.out_features == 7


def test_dinov2_vits14_by_name() -> None:
    model = build_timm_teacher(TimmTeacherConfig(weights="random"))
    stored = 1370 - 257  # positions of the released checkpoint at 518 pixels, which 224 does not use
    assert sum(p.numel() for p in model.parameters()) + stored * 384 == 22_056_192
    teacher = Teacher(model)
    shape = teacher.shape
    assert (shape.depth, shape.width, shape.heads, shape.grid) == (12, 384, 6, (16, 16))
    out = teacher(torch.randn(1, 3, 224, 224))
    assert out.tokens.shape == (12, 1, 256, 384)
    attention = out.attention((14, 14))
    assert attention.shape == (12, 1, 6, 197, 197)
    torch.testing.assert_close(attention.sum(-1), torch.ones(12, 1, 6, 197))
    # LayerScale is not left at 1e-5, which would make all layers alike
    assert (out.tokens[0] - out.tokens[-1]).abs().mean() > 0.1 * out.tokens[0].abs().mean()


def test_weights_file_of_another_image_size(tmp_path: Any) -> None:
    """timm resamples the positions; the other weights are those of the file."""
    config = TimmTeacherConfig(model="test_vit", image_size=96, weights="random")
    model = build_timm_teacher(config)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    config.weights, config.image_size = str(tmp_path / "weights.safetensors"), 64
    smaller = build_timm_teacher(config)
    assert smaller.patch_embed.grid_size == (4, 4)
    got, expected = smaller.state_dict(), model.state_dict()
    positions = resample_abs_pos_embed(expected.pop("pos_embed"), [4, 4], [6, 6])
    torch.testing.assert_close(got.pop("pos_embed"), positions)
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in got)
