"""The teacher's features, logits and own head."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from basd.errors import UserError
from basd.models.teacher import Teacher, TimmTeacherConfig, build_timm_teacher

POOLS: dict[str, dict[str, Any]] = {
    "class token": {},
    "registers": {"reg_tokens": 3},
    "mean of patches": {"global_pool": "avg"},
    "no norm": {"final_norm": False},
}


def vit(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    small = {"img_size": (12, 20), "patch_size": 4, "num_classes": 5, "embed_dim": 24, "depth": 3, "num_heads": 3}
    model = VisionTransformer(**{**small, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 12, 20, generator=torch.Generator().manual_seed(1))


def test_own_head_gives_the_models_logits() -> None:
    for pool, options in POOLS.items():
        model = vit(**options)
        with torch.no_grad():
            expected = model(images())
        out = Teacher(model, head=model.head)(images())
        assert torch.equal(out.logits, expected), pool
        assert out.features.shape == (2, 24) and out.features.dtype == torch.float32, pool
        assert not out.logits.requires_grad and out.features.grad_fn is None, pool


def test_features_follow_the_final_norm() -> None:
    for pool in ("class token", "mean of patches"):
        model = vit(**POOLS[pool])
        out = Teacher(model)(images())
        if pool == "class token":
            expected, norm = out.cls[-1], model.norm
        else:
            expected, norm = out.tokens[-1].mean(1), model.fc_norm
        assert isinstance(norm, nn.LayerNorm), pool
        centred = expected - expected.mean(1, keepdim=True)
        expected = centred / (centred.square().mean(1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias
        torch.testing.assert_close(
            out.features, expected.detach(), rtol=1e-4, atol=1e-5, msg=lambda said, pool=pool: f"{pool}: {said}"
        )


def test_any_module_on_the_features_is_a_head() -> None:
    head = nn.Linear(24, 7)
    teacher = Teacher(vit(num_classes=0), head=head)
    out = teacher(images())
    assert out.logits.shape == (2, 7)
    torch.testing.assert_close(out.logits, out.features @ head.weight.T + head.bias)
    assert not any(parameter.requires_grad for parameter in head.parameters()) and not head.training


def test_features_and_logits_are_computed_once_and_only_when_read() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return features

    model, head = vit(global_pool="avg"), Counting()
    pooled: list[int] = []
    model.fc_norm.register_forward_hook(lambda *_: pooled.append(1))
    out = Teacher(model, head=head)(images())
    assert (head.calls, len(pooled)) == (0, 0)
    assert out.features is out.features and len(pooled) == 1 and head.calls == 0
    assert out.logits is out.logits and (head.calls, len(pooled)) == (1, 1)


def test_a_half_precision_teacher_gives_float32() -> None:
    model = vit()
    expected = Teacher(model, head=model.head)(images())
    head = nn.Linear(24, 5)
    head.load_state_dict(model.head.state_dict())
    out = Teacher(vit().bfloat16(), head=head)(images().bfloat16())
    assert out.features.dtype == out.logits.dtype == torch.float32
    torch.testing.assert_close(out.logits, expected.logits, rtol=0.1, atol=0.1)


def test_logits_without_a_head_are_one_sentence() -> None:
    out = Teacher(vit(num_classes=0))(images())
    assert out.features.shape == (2, 24)
    with pytest.raises(UserError, match=r"teacher\.head=probe"):
        out.logits  # noqa: B018


# -- which head a teacher is built with --------------------------------------------------------------------------------


def teacher(head: str = "auto", weights: str = "random", model: str = "test_vit") -> TimmTeacherConfig:
    return TimmTeacherConfig(model=model, image_size=64, weights=weights, head=head)


def test_own_head_where_the_classes_are_the_datas() -> None:
    cases: list[tuple[str, int | None, int]] = [
        ("auto", 1000, 1000),
        ("own", 1000, 1000),
        ("probe", 1000, 0),
        ("auto", 10, 0),
        ("probe", 10, 0),
        ("auto", None, 0),
    ]
    for head, classes, kept in cases:
        model = build_timm_teacher(teacher(head), classes)
        assert model.num_classes == kept, (head, classes)
        assert isinstance(model.head, nn.Linear if kept else nn.Identity), (head, classes)


def test_own_head_that_is_not_there_is_refused_before_anything_is_built() -> None:
    refused = {
        "test_vit": "one of 1000 classes",
        "vit_small_patch14_dinov2.lvd142m": "no single classification head",
        # its logits are the mean of two heads, each on a token of its own
        "deit_tiny_distilled_patch16_224": "no single classification head",
    }
    for (model, said), weights in product(refused.items(), ("random", "hub")):
        config = teacher("own", weights, model)
        config.image_size = 112
        with pytest.raises(UserError, match=said) as caught:
            build_timm_teacher(config, 10)
        assert "teacher.head=probe" in str(caught.value) and "\n" not in str(caught.value), (model, weights)


def test_plain_deit_is_a_teacher() -> None:
    config = TimmTeacherConfig(model="deit_tiny_patch16_224", image_size=32, weights="random")
    model = build_timm_teacher(config, 1000)
    assert Teacher(model, head=model.head)(torch.randn(1, 3, 32, 32)).logits.shape == (1, 1000)


@pytest.fixture(scope="module")
def five_class_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `test_vit` with a head of 5 classes, unlike timm's own of 1000."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "five.safetensors"
    save_file(timm.create_model("test_vit", pretrained=False, img_size=64, num_classes=5).state_dict(), path)
    return path


def test_the_head_in_a_file_is_used_where_its_classes_are_the_datas(five_class_file: Path) -> None:
    stored = load_file(five_class_file)
    cases: list[tuple[str, int | None, bool]] = [
        ("auto", 5, True),
        ("own", 5, True),
        ("probe", 5, False),
        ("auto", 1000, False),
        ("auto", None, False),
    ]
    for head, classes, kept in cases:
        state = build_timm_teacher(teacher(head, str(five_class_file)), classes).state_dict()
        left_out = set() if kept else {"head.weight", "head.bias"}
        assert set(stored) - set(state) == left_out and not set(state) - set(stored), (head, classes)
        assert all(torch.equal(value, stored[name]) for name, value in state.items()), (head, classes)
    with pytest.raises(UserError, match="one of 5 classes"):
        build_timm_teacher(teacher("own", str(five_class_file)), 1000)


def test_a_file_that_lacks_weights_is_refused_with_and_without_its_head(five_class_file: Path, tmp_path: Path) -> None:
    stored = load_file(five_class_file)
    del stored["blocks.1.mlp.fc1.weight"]
    save_file(stored, tmp_path / "torn.safetensors")
    for classes in (5, 10):
        with pytest.raises(UserError, match=r"teacher\.weights"):
            build_timm_teacher(teacher("auto", str(tmp_path / "torn.safetensors")), classes)
