"""The frozen teacher: its configuration, and what one forward pass of it offers to every arm of a cohort."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors import safe_open
from timm.layers import build_sincos2d_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

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
    # Where class logits come from: the checkpoint's own head; a linear probe fitted on its frozen features; or auto, the
    # own head where it has as many classes as the data, a probe otherwise.
    head: str = field(default="auto", metadata={"choices": ("auto", "own", "probe")})
    # How DINOv2's positions are moved to another image size: as its original release does, or as timm does, which always
    # antialiases (tokens differ by about 1 %). Without effect for other models and for random weights.
    position_interpolation: str = field(default="original", metadata={"choices": ("original", "timm")})

    @property
    def architecture(self) -> str:
        """timm's model name without the tag of the weights."""
        return self.model.split(".")[0]


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


def build_timm_teacher(config: TimmTeacherConfig, classes: int | None = None) -> VisionTransformer:
    """A timm ViT with its weights, and with the checkpoint's own head where `config.head` and `classes` of the data ask for it.

    `UserError` where the name, the family, the weights or the head do not fit. Without `classes` there is no head.
    """
    import timm

    known = timm.is_model(config.architecture)
    if not known:
        near = timm.list_models(f"*{config.architecture.split('_patch')[0]}*")[:5]
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models('vit*')."
        raise UserError(f"teacher.model={config.model} is not a model of timm; {hint}")
    builder = timm.model_entrypoint(config.architecture)
    if builder.__module__ not in (VisionTransformer.__module__, VisionTransformerDistilled.__module__):
        raise UserError(
            f"teacher.model={config.model} is of timm's {builder.__module__.rpartition('.')[2]} family; choose a model of "
            "the VisionTransformer family, such as vit_small_patch14_dinov2 or deit_small_patch16_224."
        )
    try:
        checkpoint = _read_checkpoint(config)
        model = _create(config, checkpoint, _own_head_classes(config, checkpoint, classes))
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
class _Checkpoint:
    """What is known of a timm checkpoint before it is loaded."""

    # of its one classification head; 0: none, or two as DeiT's distilled models have
    classes: int
    # pixels a side that its positions are for; 0: not known
    image_size: int
    # rows of the head in a file; None: not a file
    file_head: int | None = None


def _read_checkpoint(config: TimmTeacherConfig) -> _Checkpoint:
    from timm.models import get_pretrained_cfg

    if config.weights in ("hub", "random"):
        known = get_pretrained_cfg(config.model)
        if known is None:
            return _Checkpoint(0, 0)
        one_head = isinstance(known.classifier, str)
        return _Checkpoint(known.num_classes if one_head else 0, known.input_size[-1])
    if not config.weights.endswith(".safetensors"):
        raise UserError(
            f"teacher.weights={config.weights} must be hub, random or a .safetensors file in timm's layout."
        )
    with safe_open(config.weights, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - not a mapping
    rows = shapes["head.weight"][0] if "head.weight" in shapes else 0
    # a class token's position makes the count one more than a square
    side = math.isqrt(shapes["pos_embed"][1]) if "pos_embed" in shapes else 0
    image_size = side * shapes["patch_embed.proj.weight"][-1]
    return _Checkpoint(0 if "head_dist.weight" in shapes else rows, image_size, rows)


def _own_head_classes(config: TimmTeacherConfig, checkpoint: _Checkpoint, classes: int | None) -> int:
    """Classes of the own head that the teacher keeps; 0: none."""
    if classes is None or config.head == "probe":
        return 0
    if checkpoint.classes == classes:
        return classes
    if config.head == "own":
        has = f"one of {checkpoint.classes} classes" if checkpoint.classes else "no single classification head"
        raise UserError(
            f"teacher.head=own needs a head of the data's {classes} classes, but {config.model} has {has}; "
            "choose teacher.head=probe."
        )
    return 0


def _create(config: TimmTeacherConfig, checkpoint: _Checkpoint, classes: int) -> nn.Module:
    import timm

    dinov2 = "dinov2" in config.architecture
    options: dict[str, Any] = {"img_size": config.image_size, "num_classes": classes}
    if config.weights == "random":
        if dinov2:
            # timm's untrained DINOv2 has LayerScale 1e-5: every block would be the identity
            options["init_values"] = 1.0
        return timm.create_model(config.architecture, pretrained=False, **options)
    as_original = dinov2 and config.position_interpolation == "original" and checkpoint.image_size > 0
    if as_original:
        # at the checkpoint's own size the positions come through as they are
        options["img_size"] = checkpoint.image_size
    if config.weights != "hub":
        # with the file's own head timm's loader is strict about every other weight; it resamples the positions
        rows = checkpoint.file_head
        overlay = {"file": config.weights, "num_classes": rows, "custom_load": False}
        options.update(num_classes=rows, pretrained_cfg_overlay=overlay)
    model: Any = timm.create_model(config.model, pretrained=True, **options)
    if model.num_classes != classes:
        model.reset_classifier(classes)
    if as_original and checkpoint.image_size != config.image_size:
        positions = model.pos_embed.detach()
        model.set_input_size(img_size=(config.image_size, config.image_size))
        registers = model.num_reg_tokens > 0
        model.pos_embed = nn.Parameter(interpolate_dinov2_positions(positions, grid_of(model), registers))
    return model


def interpolate_dinov2_positions(positions: Tensor, grid: tuple[int, int], registers: bool) -> Tensor:
    """DINOv2's position embedding on another grid, as its original release computes it (arXiv:2304.07193, its code).

    positions: (1, P+M², D), the P = 0 or 1 prefix positions first, kept as they are; returns (1, P+h·w, D). Bicubic.
    Models without registers: no antialias, and the sampling step follows from the scale (h+0.1)/M instead of h/M. Models
    with `registers` (arXiv:2309.16588): antialias, exact scale.
    """
    side = math.isqrt(positions.shape[1])
    prefix = positions.shape[1] - side * side
    assert prefix in (0, 1), "positions of a square grid, with or without the class token's"
    if grid == (side, side):
        return positions
    square = positions[:, prefix:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if registers:
        moved = F.interpolate(square, size=grid, mode="bicubic", antialias=True)
    else:
        scale = tuple((length + 0.1) / side for length in grid)
        moved = F.interpolate(square, scale_factor=scale, mode="bicubic")
    assert moved.shape[-2:] == grid
    moved = moved.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)
    return torch.cat([positions[:, :prefix], moved], dim=1)


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
    derive from it in the same way is computed once (`shared`), and only when it is asked for.
    """

    def __init__(
        self,
        tokens: Tensor,
        cls: Tensor,
        grid: tuple[int, int],
        tapped: Tapped,
        prefix: int,
        pre_logits: Callable[[], Tensor],
        head: nn.Module | None,
    ) -> None:
        """`pre_logits()` gives what a classifier head reads; `head` maps that, float32, to logits."""
        self.tokens = tokens
        self.cls = cls
        self.grid = grid
        self._tapped = tapped
        self._prefix = prefix
        self._pre_logits = pre_logits
        self._head = head
        self._memo: dict[Any, Any] = {}

    @property
    def features(self) -> Tensor:
        """Pre-logits feature after the final norm, pooled as the teacher's head reads it: (B, D_t), float32."""
        return self.shared("features", lambda: self._pre_logits().float())

    @property
    def logits(self) -> Tensor:
        """Class logits of the teacher's head: (B, C), float32. `UserError` where it has none."""
        head = self._head
        if head is None:
            raise UserError("the teacher was given no classification head; choose teacher.head=probe.")
        return self.shared("logits", lambda: head(self.features).float())

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

    def __init__(self, model: VisionTransformer, attention: bool = True, head: nn.Module | None = None) -> None:
        """`attention=False` leaves queries and keys unread, where no arm uses them.

        `head` maps pre-logits features (B, D_t) to logits (B, C); it is frozen and moved to the model's device.
        """
        self.model = model.eval().requires_grad_(False)
        self.shape = teacher_shape(model)
        self.head = head
        if head is not None:
            device = next(model.parameters()).device
            self.head = head.to(device).eval().requires_grad_(False)
        layers = range(self.shape.depth)
        self._taps = Taps(model, layers, layers if attention else ())

    @torch.no_grad()
    def __call__(self, images: Tensor) -> TeacherOutput:
        """images: (B, 3, S, S), normalised as the teacher was trained."""
        assert not self.model.training
        with self._taps.record() as tapped:
            final = self.model.forward_features(images)
        prefix = self.model.num_prefix_tokens
        stacked = torch.stack([tapped.tokens[i] for i in range(self.shape.depth)])

        def pre_logits() -> Tensor:
            return self.model.forward_head(final, pre_logits=True)

        return TeacherOutput(
            stacked[:, :, prefix:], stacked[:, :, 0], self.shape.grid, tapped, prefix, pre_logits, self.head
        )
