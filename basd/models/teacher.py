"""The frozen teacher: its configuration, and what one forward pass of it offers to every arm of a cohort."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basd.errors import UserError
from basd.hub import no_waiting_offline
from basd.models.checkpoints import Checkpoint, WeightsFile, check_fit, native_size, read_checkpoint
from basd.models.resampling import resample_attention
from basd.models.taps import Tapped, Taps, attention_of, check_tappable, grid_of, patch_attention

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

T = TypeVar("T")

# Bytes of attention maps that are worked on at once on a CPU.
CACHED_BYTES = 2**21


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
    # A file of weights (.safetensors or .pth) to use instead of fitting one.
    weights: str | None = None

    @property
    def weights_file(self) -> Path | None:
        """The file that `weights` names."""
        return Path(self.weights).expanduser() if self.weights is not None else None


@dataclass
class TimmTeacherConfig:
    """Any ViT of timm's VisionTransformer family, by its timm name."""

    name: str = "timm"
    model: str = "vit_small_patch14_dinov2.lvd142m"
    image_size: int = field(default=224, metadata={"min": 1})
    # "hub": timm's pretrained weights; "random": none (to measure speed); otherwise a file, .safetensors or .pth, in the
    # layout of DINOv2's release or of timm.
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

    @property
    def weights_file(self) -> Path | None:
        """The file that `weights` names; None: the hub's weights or random ones."""
        return None if self.weights in ("hub", "random") else Path(self.weights).expanduser()


def teacher_title(teacher: Any) -> str:
    """A teacher's name for people, from its configuration or the mapping that it was frozen to: timm's name of the model."""
    values = teacher if isinstance(teacher, Mapping) else vars(teacher)
    return str(values.get("model") or values["name"])


TEACHERS: dict[str, type] = {"digits_vit": DigitsViTConfig, "timm": TimmTeacherConfig}


def build_digits_vit(config: DigitsViTConfig, classes: int) -> VisionTransformer:
    """The digits teacher, freshly initialised; draws from torch's global generator."""
    from timm.layers import build_sincos2d_pos_embed
    from timm.models.vision_transformer import VisionTransformer

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


def build_timm_teacher(config: TimmTeacherConfig, classes: int | None = None, logits: bool = True) -> VisionTransformer:
    """A timm ViT with its weights, and with the checkpoint's own head where `config.head` and `classes` of the data ask for it.

    `UserError` where the name, the family, the image size, the weights or the head do not fit, before anything large is
    built. Without `classes` there is no head; without `logits` nothing will read it, and one that is missing is no error.
    """
    from timm.models import get_pretrained_cfg

    structure, checkpoint = _checked(config)
    offered = get_pretrained_cfg(config.model)
    if checkpoint is not None:
        own, size = checkpoint.classes if checkpoint.one_head else 0, native_size(checkpoint, structure)
    elif offered is not None:
        # one name of a classifier, not two as DeiT's distilled models have
        own, size = offered.num_classes if isinstance(offered.classifier, str) else 0, offered.input_size[-1]
    else:
        own = size = 0
    kept = _own_head_classes(config, own, classes, logits)
    try:
        model = _create(config, checkpoint, size, kept)
    except UserError:
        raise
    except Exception as error:
        raise _not_built(config, error) from error
    return check_tappable(model, config.model)


def check_timm_teacher(config: TimmTeacherConfig) -> WeightsFile | None:
    """`UserError` where `build_timm_teacher` would refuse, nothing built or downloaded; what the file is, where one is given."""
    _, checkpoint = _checked(config)
    return checkpoint.file if checkpoint is not None else None


def _checked(config: TimmTeacherConfig) -> tuple[VisionTransformer, Checkpoint | None]:
    """The model on the meta device, and the file's weights, which fit it; None for the hub's or random ones."""
    _check_name(config)
    try:
        structure = _structure(config)
        if config.weights_file is None:
            return structure, None
        checkpoint = read_checkpoint(config.weights_file)
        structure.reset_classifier(checkpoint.classes)
    except UserError:
        raise
    except Exception as error:
        raise _not_built(config, error) from error
    check_fit(checkpoint, structure, config.architecture, "choose the teacher.model that it belongs to")
    return structure, checkpoint


@lru_cache(maxsize=64)
def timm_teacher_facts(model: str, image_size: int) -> tuple[TeacherShape, bool]:
    """A timm model's sizes, and whether its published weights are without a head; `UserError` where it cannot be a teacher."""
    from timm.models import get_pretrained_cfg

    config = TimmTeacherConfig(model=model, image_size=image_size)
    _check_name(config)
    offered = get_pretrained_cfg(model)
    return teacher_shape(_structure(config)), offered is not None and offered.num_classes == 0


def _check_name(config: TimmTeacherConfig) -> None:
    import timm
    from timm.models import list_pretrained
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

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
    tagged = list_pretrained(f"{config.architecture}.*")
    if "." in config.model and config.model not in tagged:
        hint = f"choose {' or '.join(tagged)}" if tagged else f"timm has none; choose {config.architecture}"
        raise UserError(f"teacher.model={config.model} is not a tag of timm's weights; {hint}.")


def _not_built(config: TimmTeacherConfig, error: Exception) -> UserError:
    return UserError(
        f"the teacher {config.model} cannot be built with teacher.weights={config.weights} ({_said(error)}); "
        "give teacher.weights=FILE in the layout of DINOv2's release or of timm, or teacher.weights=random."
    )


def _said(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _structure(config: TimmTeacherConfig) -> VisionTransformer:
    """The model on the meta device: its structure, in no time and memory. `UserError` where it cannot be a teacher."""
    import timm

    with torch.device("meta"):
        built = timm.create_model(config.architecture, pretrained=False, num_classes=0, img_size=config.image_size)
    model = check_tappable(built, f"teacher.model={config.model}")
    patch = int(model.patch_embed.patch_size[0])
    if config.image_size % patch:
        below = config.image_size // patch * patch
        sizes = " or ".join(str(size) for size in (below, below + patch) if size)
        raise UserError(
            f"teacher.image_size={config.image_size} is not a multiple of the {patch} pixels of a patch of {config.model}; "
            f"choose {sizes}."
        )
    return model


def _own_head_classes(config: TimmTeacherConfig, own: int, classes: int | None, needed: bool) -> int:
    """Classes of the own head that the teacher keeps; 0: none. `own`: those of the checkpoint's one head, 0 without one.

    `needed`: whether something will read its logits.
    """
    if classes is None or config.head == "probe":
        return 0
    if own == classes:
        return classes
    if config.head == "own" and needed:
        has = f"one of {own} classes" if own else "no single classification head"
        raise UserError(
            f"teacher.head=own needs a head of the data's {classes} classes, but {config.model} has {has}; "
            "choose teacher.head=probe."
        )
    return 0


def _create(
    config: TimmTeacherConfig, checkpoint: Checkpoint | None, native: int, classes: int
) -> VisionTransformer | nn.Module:
    """The model with its weights. `checkpoint`: None for the hub's or random ones; `native`: pixels of its positions."""
    import timm

    dinov2 = "dinov2" in config.architecture
    options: dict[str, Any] = {"img_size": config.image_size, "num_classes": classes}
    if config.weights == "random":
        if dinov2:
            # timm's untrained DINOv2 has LayerScale 1e-5: every block would be the identity
            options["init_values"] = 1.0
        return timm.create_model(config.architecture, pretrained=False, **options)
    as_original = dinov2 and config.position_interpolation == "original" and native > 0
    if as_original:
        # at the checkpoint's own size the positions come through as they are
        options["img_size"] = native
    model: Any = _from_hub(config, options) if checkpoint is None else _from_file(config, checkpoint, options)
    if model.num_classes != classes:
        model.reset_classifier(classes)
    if as_original and native != config.image_size:
        positions = model.pos_embed.detach()
        model.set_input_size(img_size=(config.image_size, config.image_size))
        registers = model.num_reg_tokens > 0
        model.pos_embed = nn.Parameter(interpolate_dinov2_positions(positions, grid_of(model), registers))
    return model


def _from_hub(config: TimmTeacherConfig, options: dict[str, Any]) -> nn.Module:
    import timm
    from timm.models import get_pretrained_cfg

    offered = get_pretrained_cfg(config.model)
    if offered is None or not offered.has_weights:
        raise UserError(f"timm offers no weights for teacher.model={config.model}; give teacher.weights=FILE.")
    try:
        with no_waiting_offline():
            return timm.create_model(config.model, pretrained=True, **options)
    except Exception as error:
        if isinstance(error, RuntimeError) and "loading state_dict" in str(error):
            raise
        raise UserError(
            f"the weights of teacher.model={config.model} cannot be downloaded ({_said(error)}); give teacher.weights=FILE, "
            "a file fetched elsewhere, in the layout of DINOv2's release or of timm."
        ) from error


def _from_file(config: TimmTeacherConfig, checkpoint: Checkpoint, options: dict[str, Any]) -> nn.Module:
    import timm

    # with the file's own head timm's loader is strict about every other weight; it resamples the positions
    overlay = {"state_dict": checkpoint.state, "num_classes": checkpoint.classes, "custom_load": False}
    options = {**options, "num_classes": checkpoint.classes, "pretrained_cfg_overlay": overlay}
    model: Any = timm.create_model(config.model, pretrained=True, **options)
    # timm leaves a copy of all weights there
    del model.pretrained_cfg["state_dict"]
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

        A few images of one layer at a time are rebuilt and resampled at once: full-size maps never lie side by side, and
        on a CPU they stay in its cache.
        """

        def compute() -> Tensor:
            blocks = sorted(self._tapped.queries)
            batch, heads, length, _ = self._tapped.queries[blocks[0]].shape
            tokens = 1 + grid[0] * grid[1]
            maps = self._tapped.queries[blocks[0]].new_empty(len(blocks), batch, heads, tokens, tokens)
            own = heads * length * length * maps.element_size()
            images = max(1, CACHED_BYTES // own) if maps.device.type == "cpu" else batch
            for layer, block in enumerate(blocks):
                for start in range(0, batch, images):
                    part = slice(start, start + images)
                    full = patch_attention(self._tapped.attention(block, part), self._prefix)
                    resample_attention(full, grid, self.grid, out=maps[layer, part])
            return maps

        return self.shared(("attention", grid), compute)


class Teacher:
    """A frozen ViT. Not a module, so `model.train()` on anything cannot reach it."""

    def __init__(
        self,
        model: VisionTransformer,
        attention: bool = True,
        head: nn.Module | None = None,
        half: torch.dtype | None = None,
        wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda forward: forward,
    ) -> None:
        """`attention=False` leaves queries and keys unread, where no arm uses them.

        `head` maps pre-logits features (B, D_t) to logits (B, C); it is frozen and moved to the model's device.
        `half`: the type that autocast computes the backbone in; queries, keys and maps are then of this type, tokens (the
        residual stream) stay float32. `wrap(forward)` is what runs the forward pass, such as a compiled form of it.
        """
        self.half = half
        self.model = model.eval().requires_grad_(False)
        self.shape = teacher_shape(model)
        self.head = head
        if head is not None:
            device = next(model.parameters()).device
            self.head = head.to(device).eval().requires_grad_(False)
        layers = range(self.shape.depth)
        self._taps = Taps(model, layers, layers if attention else ())
        self._run = wrap(self._forward)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> TeacherOutput:
        """images: (B, 3, S, S), normalised as the teacher was trained."""
        assert not self.model.training
        cast = nullcontext() if self.half is None else torch.autocast(images.device.type, self.half)
        with cast:
            tokens, cls, tapped, final = self._run(images)

        def pre_logits() -> Tensor:
            return self.model.forward_head(final, pre_logits=True)

        prefix = self.model.num_prefix_tokens
        return TeacherOutput(tokens, cls, self.shape.grid, tapped, prefix, pre_logits, self.head)

    def _forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tapped, Tensor]:
        """Patch tokens of all blocks (L, B, N, D) and cls (L, B, D), queries and keys, the tokens after the final norm."""
        with self._taps.record() as tapped:
            final = self.model.forward_features(images)
        blocks = [tapped.tokens[i] for i in range(self.shape.depth)]
        tokens = torch.stack([block[:, self.model.num_prefix_tokens :] for block in blocks])
        cls = torch.stack([block[:, 0] for block in blocks])
        # these are copies: the blocks' own outputs would double what a step keeps
        tapped.tokens = {}
        return tokens, cls, tapped, final
