"""Any ViT of timm's VisionTransformer family as a teacher, whatever its tokens; what cannot be one, refused by name."""

import os
from itertools import product
from typing import Any

import huggingface_hub.errors
import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from basd.errors import UserError
from basd.hub import no_waiting_offline
from basd.models.resampling import resample_attention
from basd.models.taps import check_tappable
from basd.models.teacher import Teacher, TimmTeacherConfig, build_timm_teacher, check_timm_teacher

SMALL: dict[str, Any] = {"img_size": 12, "patch_size": 4, "num_classes": 5, "embed_dim": 24, "depth": 2, "num_heads": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head": {"num_heads": 1},
    "many heads": {"num_heads": 12, "embed_dim": 48},
    "deep": {"depth": 5},
    "registers": {"reg_tokens": 4},
    "registers without positions": {"reg_tokens": 4, "no_embed_class": True},
    "normed queries and keys": {"qk_norm": True},
    "layer scale": {"init_values": 0.5},
    "norm before": {"pre_norm": True},
    "no bias": {"qkv_bias": False},
    "mean of patches": {"global_pool": "avg", "class_token": True},
    "distillation token": {"distilled": True},
}


def build(kind: str) -> VisionTransformer:
    torch.manual_seed(0)
    options = {**SMALL, **VARIANTS[kind]}
    model = VisionTransformerDistilled if options.pop("distilled", False) else VisionTransformer
    built = model(**options)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return built.eval()


def close(got: Tensor, expected: Tensor, kind: str) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=lambda said: f"{kind}: {said}")


@torch.no_grad()
def test_tokens_and_attention_of_every_kind() -> None:
    """Against the blocks' own outputs, and attention as timm computes it where it is not fused."""
    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    for kind in VARIANTS:
        check_tokens_and_attention(kind, images)


def check_tokens_and_attention(kind: str, images: Tensor) -> None:
    reference = build(kind)
    maps: list[Tensor] = []
    blocks: list[Tensor] = []
    for block in reference.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _m, _i, out: maps.append(out))
        block.register_forward_hook(lambda _m, _i, out: blocks.append(out))
    final = reference.forward_features(images)
    teacher = Teacher(check_tappable(build(kind), kind))
    out = teacher(images)
    prefix = reference.num_prefix_tokens
    assert prefix == 1 + (4 if "registers" in kind else 0) + (kind == "distillation token"), kind
    options = {**SMALL, **VARIANTS[kind]}
    assert (teacher.shape.width, teacher.shape.depth, teacher.shape.heads) == (
        options["embed_dim"],
        options["depth"],
        options["num_heads"],
    ), kind
    close(out.tokens, torch.stack([x[:, prefix:] for x in blocks]), kind)
    close(out.cls, torch.stack([x[:, 0] for x in blocks]), kind)
    keep = [0, *range(prefix, prefix + 9)]
    kept = torch.stack(maps)[..., keep, :][..., keep]
    kept = kept / kept.sum(-1, keepdim=True)
    got = out.attention((2, 2))
    close(got, resample_attention(kept, (2, 2), (3, 3)), kind)
    close(got.sum(-1), torch.ones(got.shape[:-1]), kind)
    close(out.features, reference.forward_head(final, pre_logits=True), kind)


def test_a_distilled_teacher_by_name() -> None:
    config = TimmTeacherConfig(model="deit_tiny_distilled_patch16_224", image_size=32, weights="random")
    out = Teacher(build_timm_teacher(config, 10))(torch.randn(1, 3, 32, 32))
    assert out.tokens.shape == (12, 1, 4, 192) and out.attention((2, 2)).shape == (12, 1, 3, 5, 5)


# -- refused, before anything is built or downloaded ---------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be downloaded here")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", fail)


REFUSED = {
    "vit_base_patch16_siglip_224": "has no class token.*; choose a ViT with one",
    "vit_small_patch16_18x2_224": "ParallelThingsBlock",
    "vit_base_patch16_xp_224": "ParallelScalingBlock",
    "eva02_tiny_patch14_224": "timm's eva family",
    "vit_small_patch16_dinov3": "timm's eva family",
    "beit_base_patch16_224": "timm's beit family; choose",
    "vit_relpos_small_patch16_224": "timm's vision_transformer_relpos family",
    "vit_small_patch14_dinov2.lvd": r"choose vit_small_patch14_dinov2\.lvd142m",
    "no_such_model": "is not a model of timm",
    "resnet10t": "VisionTransformer family",
    "vit_tinyy": "is not a model of timm; see",
    "vit_tiny_patch7_224": "is not a model of timm; did you mean .*_tiny",
}


@pytest.mark.usefixtures("offline")
def test_what_cannot_be_a_teacher_is_refused_by_name() -> None:
    for model, said in REFUSED.items():
        with pytest.raises(UserError, match=said) as caught:
            build_timm_teacher(TimmTeacherConfig(model=model), 10)
        assert model in str(caught.value) and "\n" not in str(caught.value), model


@pytest.mark.usefixtures("offline")
def test_an_image_that_is_no_multiple_of_the_patch() -> None:
    for size, choose in ((225, "224 or 238"), (10, "14")):
        with pytest.raises(UserError, match=rf"not a multiple of the 14 pixels .*; choose {choose}\.$"):
            check_timm_teacher(TimmTeacherConfig(image_size=size))


# -- the hub -------------------------------------------------------------------------------------------------------------


def test_without_network_a_file_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    errors: list[Exception] = [
        huggingface_hub.errors.LocalEntryNotFoundError("An error happened while trying to locate the file.\nCheck it."),
        huggingface_hub.errors.OfflineModeIsEnabled("Cannot reach https://huggingface.co: offline mode is enabled."),
        OSError("[Errno 101] Network is unreachable"),
        TimeoutError(),
    ]
    for error in errors:

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
        monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", fail)
        with pytest.raises(UserError, match=r"cannot be downloaded \(.*\); give teacher\.weights=FILE") as caught:
            build_timm_teacher(TimmTeacherConfig(model="test_vit.r160_in1k", image_size=64), 10)
        assert "\n" not in str(caught.value) and type(error).__name__ in str(caught.value), error


def test_offline_nobody_waits_for_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network only the cache is asked; where names resolve, or a proxy resolves them, the hub is asked."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # the hub's address begins with https
    for resolves, proxy in product([False, True], ["", "https_proxy", "http_proxy", "no_proxy"]):

        def resolve(*_: object, resolves: bool = resolves) -> list[object]:
            if not resolves:
                raise OSError("Name or service not known")
            return []

        with monkeypatch.context() as patch:
            patch.setattr("socket.getaddrinfo", resolve)
            if proxy:
                patch.setenv(proxy, "http://proxy:3128")
            with no_waiting_offline():
                offline = huggingface_hub.constants.is_offline_mode()
            assert offline == (not resolves and proxy != "https_proxy"), (resolves, proxy)
            assert not huggingface_hub.constants.is_offline_mode(), (resolves, proxy)


def test_a_model_that_timm_offers_no_weights_for() -> None:
    nothing = next(
        name
        for name in ("vit_small_patch16_36x1_224", "vit_huge_patch14_224")
        if not timm.models.is_model_pretrained(name)
    )
    with pytest.raises(UserError, match=f"no weights for teacher.model={nothing}; give teacher.weights=FILE"):
        build_timm_teacher(TimmTeacherConfig(model=nothing), 10)


def test_weights_of_the_hub_load_strictly(monkeypatch: pytest.MonkeyPatch) -> None:
    state = timm.create_model("test_vit", pretrained=False).state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(state))
    config = TimmTeacherConfig(model="test_vit.r160_in1k", image_size=160)
    built = build_timm_teacher(config, 1000).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in built.items()) and built.keys() == state.keys()
    del state["blocks.0.norm1.weight"]
    with pytest.raises(UserError, match="cannot be built"):
        build_timm_teacher(config, 1000)
