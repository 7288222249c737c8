import copy
from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers import Attention, AttentionRope
from timm.models.eva import Eva
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from basd.errors import UserError
from basd.models.taps import Taps, check_tappable, grid_of, patch_attention, patch_scores

SIZE = (12, 20)  # a 3×5 grid of 4-pixel patches
SMALL = {"img_size": SIZE, "patch_size": 4, "num_classes": 5, "embed_dim": 24, "depth": 3, "num_heads": 3}

FAMILY: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "plain": (lambda: VisionTransformer(**SMALL), 1),
    "drop_path": (lambda: VisionTransformer(**SMALL, drop_path_rate=0.5), 1),
    "layer_scale": (lambda: VisionTransformer(**SMALL, init_values=0.5), 1),
    "qk_norm": (lambda: VisionTransformer(**SMALL, qk_norm=True), 1),
    "registers": (lambda: VisionTransformer(**SMALL, reg_tokens=4, no_embed_class=True), 5),
    "distilled": (lambda: timm.create_model("deit_tiny_distilled_patch16_224", **SMALL), 2),
    "dinov2_reg4": (lambda: timm.create_model("vit_small_patch14_reg4_dinov2", **SMALL, init_values=1.0), 5),
}


class GatedAttention(Attention):
    """Another attention class, whose path of q and k the taps do not know."""


def build(name: str) -> tuple[VisionTransformer, int]:
    torch.manual_seed(0)
    make, prefix = FAMILY[name]
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            # timm's start is nearly uniform in attention; these maps differ visibly
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval(), prefix  # type: ignore[return-value]


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def reference_maps(model: VisionTransformer, x: Tensor) -> list[Tensor]:
    """Attention probabilities of every block, read where the unfused model computes them."""
    model = copy.deepcopy(model)
    maps: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _m, _i, out: maps.append(out))
    model(x)
    return maps


def reference_tokens(model: VisionTransformer, x: Tensor) -> list[Tensor]:
    tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    outputs = []
    for block in model.blocks:
        tokens = block(tokens)
        outputs.append(tokens)
    return outputs


def close(got: Tensor, expected: Tensor, case: str, rtol: float | None = None, atol: float | None = None) -> None:
    torch.testing.assert_close(got, expected, rtol=rtol, atol=atol, msg=lambda said: f"{case}: {said}")


def test_tapped_model_is_bit_equal_and_fused() -> None:
    for name in FAMILY:
        model, _ = build(name)
        plain, x = copy.deepcopy(model), images()
        taps = Taps(model, range(3), range(3))
        assert all(block.attn.fused_attn for block in model.blocks), name
        with taps.record():
            tapped = model(x)
        assert torch.equal(tapped, plain(x)) and torch.equal(model(x), plain(x)), name
        assert set(model.state_dict()) == set(plain.state_dict()), name


def test_tapped_training_step_is_bit_equal() -> None:
    for name in ("plain", "drop_path", "qk_norm"):
        model, _ = build(name)
        model.train()
        plain, x = copy.deepcopy(model), images(4)
        taps = Taps(model, [0, 2], [1, 2])
        torch.manual_seed(3)
        with taps.record():
            model(x).square().sum().backward()
        torch.manual_seed(3)
        plain(x).square().sum().backward()
        for (key, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad), (name, key)  # type: ignore[arg-type]


def test_tokens_are_raw_block_outputs() -> None:
    for name in FAMILY:
        model, prefix = build(name)
        with Taps(model, [0, 2]).record() as tapped:
            model(images())
        expected = reference_tokens(model, images())
        assert sorted(tapped.tokens) == [0, 2], name
        for index in (0, 2):
            assert torch.equal(tapped.tokens[index], expected[index]), name
            assert tapped.tokens[index].shape == (2, prefix + 15, 24), name


def test_attention_equals_unfused_model() -> None:
    for name in FAMILY:
        model, _ = build(name)
        with Taps(model, (), range(3)).record() as tapped:
            model(images())
        for index, expected in enumerate(reference_maps(model, images())):
            close(tapped.attention(index), expected, name, rtol=1e-4, atol=1e-6)
            close(tapped.scores(index).softmax(-1), expected, name, rtol=1e-4, atol=1e-6)
            assert expected.std() > 0.01, name  # the comparison says something


def test_hooks_rest_outside_of_a_recording() -> None:
    model, _ = build("plain")
    taps = Taps(model, [1], [1])
    with taps.record() as tapped:
        model(images())
    before = tapped.tokens[1].clone()
    model(images() + 1)
    assert torch.equal(tapped.tokens[1], before)
    with taps.record() as other:
        pass
    assert not other.tokens and not other.queries


def test_recording_ends_after_an_error() -> None:
    model, _ = build("plain")
    seen = []
    with pytest.raises(RuntimeError, match="stop"), Taps(model, [1], [1]).record() as tapped:
        seen.append(tapped)
        raise RuntimeError("stop")
    model(images())
    assert not seen[0].tokens and not seen[0].queries


def test_prefix_tokens_are_dropped_and_rows_renormalised() -> None:
    for prefix in (1, 2, 5):
        generator = torch.Generator().manual_seed(prefix)
        scores = torch.randn(2, 3, prefix + 6, prefix + 6, generator=generator)
        full = scores.softmax(-1)
        kept = [0, *range(prefix, prefix + 6)]
        expected = torch.zeros(2, 3, 7, 7)
        for i, q in enumerate(kept):
            for j, k in enumerate(kept):
                expected[:, :, i, j] = full[:, :, q, k] / sum(full[:, :, q, other] for other in kept)
        close(patch_attention(full, prefix), expected, f"{prefix} prefix tokens")
        close(patch_scores(scores, prefix).softmax(-1), expected, f"{prefix} prefix tokens")


def test_family_is_accepted() -> None:
    for name in FAMILY:
        model, _ = build(name)
        assert check_tappable(model, name) is model, name
        assert grid_of(model) == (3, 5), name


def with_rope() -> nn.Module:
    """Attention of one block only is another."""
    model = VisionTransformer(**SMALL)
    model.blocks[1].attn = AttentionRope(24, num_heads=3)
    return model


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "ResNet": lambda: timm.create_model("resnet10t", num_classes=3),
    "class token": lambda: VisionTransformer(**SMALL, class_token=False, global_pool="avg"),
    "Eva": lambda: Eva(**SMALL),
    "uses GatedAttention": lambda: VisionTransformer(**SMALL, attn_layer=GatedAttention),
    "uses DiffAttention": lambda: VisionTransformer(**SMALL, attn_layer="diff"),
    "uses AttentionRope": with_rope,
    "is built of ParallelScalingBlock": lambda: VisionTransformer(**SMALL, block_fn=ParallelScalingBlock),
}


def test_other_families_are_refused_by_name() -> None:
    for word, make in OTHERS.items():
        with pytest.raises(UserError, match=word) as caught:
            check_tappable(make(), "the_model")
        assert "the_model" in str(caught.value), word
