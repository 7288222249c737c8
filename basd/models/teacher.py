"""The frozen teacher: its configuration, and what one forward pass of it offers to every arm of a cohort."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from basd.errors import UserError
from basd.models.resampling import resample_attention
from basd.models.taps import Tapped, Taps, attention_of, check_tappable, grid_of, patch_attention

T = TypeVar("T")


@dataclass
class DigitsViTConfig:
    """A small ViT that BASD trains on the data set itself on first use, and caches.

    Xavier-uniform weights and sin-cos positions at the start. Its patch grid differs from the student's on purpose, so that resampling is exercised.
    """

    name: str = "digits_vit"
    image_size: int = field(default=40, metadata={"min": 1})
    patch_size: int = field(default=5, metadata={"min": 1})
    width: int = field(default=64, metadata={"min": 1})
    depth: int = field(default=4, metadata={"min": 1})
    heads: int = field(default=4, metadata={"min": 1})
    epochs: int = field(default=16, metadata={"min": 1})
    batch_size: int = field(default=32, metadata={"min": 2})
    lr: float = field(default=1e-3, metadata={"min": 0.0})
    weight_decay: float = field(default=0.05, metadata={"min": 0.0})
    seed: int = 0
    # A safetensors file to use instead of fitting one.
    weights: str | None = None


@dataclass
class TimmTeacherConfig:
    """Any ViT of timm's VisionTransformer family, by its timm name."""

    name: str = "timm"
    model: str = "vit_small_patch14_dinov2.lvd142m"
    image_size: int = field(default=224, metadata={"min": 1})
    # "hub": timm's pretrained weights; "random": none (to measure speed); otherwise a safetensors file in timm's layout.
    weights: str = "hub"
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])


TEACHERS: dict[str, type] = {"digits_vit": DigitsViTConfig, "timm": TimmTeacherConfig}


def build_digits_vit(config: DigitsViTConfig, classes: int) -> VisionTransformer:
    """The digits teacher, freshly initialised; draws from torch's global generator."""
    model = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=classes,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        drop_path_rate=0.1,
        weight_init="jax",
    )
    assert model.pos_embed is not None
    with torch.no_grad():
        model.pos_embed[:, 1:] = build_sincos2d_pos_embed(model.patch_embed.grid_size, config.width)
        model.pos_embed[:, :1] = 0
    return model


def build_timm_teacher(config: TimmTeacherConfig) -> VisionTransformer:
    """A timm ViT with its weights; `UserError` where the name, the family or the weights do not fit."""
    import timm

    known = timm.is_model(config.model.split(".")[0])
    if not known:
        near = timm.list_models(f"*{config.model.split('.')[0].split('_patch')[0]}*")[:5]
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models('vit*')."
        raise UserError(f"teacher.model={config.model} is not a model of timm; {hint}")
    builder = timm.model_entrypoint(config.model.split(".")[0])
    if builder.__module__ != VisionTransformer.__module__:
        raise UserError(
            f"teacher.model={config.model} is of timm's {builder.__module__.rpartition('.')[2]} family; choose a model of "
            "the VisionTransformer family, such as vit_small_patch14_dinov2 or deit_small_patch16_224."
        )
    options: dict[str, Any] = {"img_size": config.image_size, "num_classes": 0}
    if config.weights == "random" and "dinov2" in config.model:
        # timm's untrained DINOv2 has LayerScale 1e-5: every block would be the identity
        options["init_values"] = 1.0
    try:
        if config.weights == "random":
            model = timm.create_model(config.model.split(".")[0], pretrained=False, **options)
        elif config.weights == "hub":
            model = timm.create_model(config.model, pretrained=True, **options)
        else:
            if not config.weights.endswith(".safetensors"):
                raise UserError(
                    f"teacher.weights={config.weights} must be hub, random or a .safetensors file in timm's layout."
                )
            # timm's own loader resamples the positions to the image size
            overlay = {"file": config.weights}
            model = timm.create_model(config.model, pretrained=True, pretrained_cfg_overlay=overlay, **options)
    except UserError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the teacher {config.model} cannot be built with teacher.weights={config.weights} ({first}); "
            "give teacher.weights=FILE.safetensors in timm's layout, or teacher.weights=random."
        ) from error
    return check_tappable(model, config.model)


@dataclass(frozen=True)
class TeacherShape:
    """What the components need to know of a teacher."""

    depth: int
    width: int
    heads: int
    grid: tuple[int, int]


def teacher_shape(model: VisionTransformer) -> TeacherShape:
    return TeacherShape(len(model.blocks), model.embed_dim, attention_of(model, 0).num_heads, grid_of(model))


class TeacherOutput:
    """One forward pass of the teacher, shared by every arm of a cohort.

    tokens (L, B, N_t, D_t): raw patch tokens of every block, before the final norm; cls (L, B, D_t). What several arms
    derive from it in the same way is computed once (`shared`).
    """

    def __init__(self, tokens: Tensor, cls: Tensor, grid: tuple[int, int], tapped: Tapped, prefix: int) -> None:
        self.tokens = tokens
        self.cls = cls
        self.grid = grid
        self._tapped = tapped
        self._prefix = prefix
        self._memo: dict[Any, Any] = {}

    def shared(self, key: Any, compute: Callable[[], T]) -> T:
        """`compute()`, once per step and key for the whole cohort. The value must not depend on an arm."""
        if key not in self._memo:
            with torch.no_grad():
                self._memo[key] = compute()
        return self._memo[key]

    def normalized_tokens(self) -> Tensor:
        """LN0 of every layer's patch tokens, float32, (L, B, N_t, D_t)."""
        return self.shared("normalized", lambda: F.layer_norm(self.tokens.float(), self.tokens.shape[-1:]))

    def attention(self, grid: tuple[int, int]) -> Tensor:
        """Attention of every layer on the given grid, (L, B, H_t, 1+N, 1+N), rows sum to 1.

        One layer's map at a time is rebuilt and resampled at once, so the full-size maps never lie side by side.
        """

        def compute() -> Tensor:
            maps = []
            for block in sorted(self._tapped.queries):
                full = patch_attention(self._tapped.attention(block), self._prefix)
                maps.append(resample_attention(full, grid, self.grid))
            return torch.stack(maps)

        return self.shared(("attention", grid), compute)


class Teacher:
    """A frozen ViT. Not a module, so `model.train()` on anything cannot reach it."""

    def __init__(self, model: VisionTransformer, attention: bool = True) -> None:
        """`attention=False` leaves queries and keys unread, where no arm uses them."""
        self.model = model.eval().requires_grad_(False)
        self.shape = teacher_shape(model)
        layers = range(self.shape.depth)
        self._taps = Taps(model, layers, layers if attention else ())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> TeacherOutput:
        """images: (B, 3, S, S), normalised as the teacher was trained."""
        assert not self.model.training
        with self._taps.record() as tapped:
            self.model.forward_features(images)
        prefix = self.model.num_prefix_tokens
        stacked = torch.stack([tapped.tokens[i] for i in range(self.shape.depth)])
        return TeacherOutput(stacked[:, :, prefix:], stacked[:, :, 0], self.shape.grid, tapped, prefix)
