"""The student: a DeiT-style ViT on timm's VisionTransformer, read at the extraction points.

The model is timm's own class, so its state dict loads into timm's `deit_tiny_patch16_224` (at DeiT-Tiny's sizes; with the
distillation token `deit_tiny_distilled_patch16_224`) and back; nothing else of the distillation enters it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from basd.models.taps import Taps, grid_of, patch_scores

if TYPE_CHECKING:
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer


@dataclass
class StudentConfig:
    """Sizes of the student. Default: DeiT-Tiny (Touvron et al. 2021, arXiv:2012.12877, table 1)."""

    name: str = "deit_tiny"
    image_size: int = field(default=224, metadata={"min": 1})
    patch_size: int = field(default=16, metadata={"min": 1})
    width: int = field(default=192, metadata={"min": 1})
    depth: int = field(default=12, metadata={"min": 1})
    heads: int = field(default=3, metadata={"min": 1})
    mlp_ratio: float = field(default=4.0, metadata={"min": 0.0})
    drop_path: float = field(default=0.1, metadata={"min": 0.0, "max": 0.999})
    # A count M of extraction points, or a list of block indices.
    points: Any = field(default=4, metadata={"kind": "points"})
    # DeiT's second token with its own head (arXiv:2012.12877, section 4); evaluation takes the mean of both heads' logits.
    distillation_token: bool = False


def extraction_points(points: int | Sequence[int], depth: int) -> tuple[int, ...]:
    """Blocks the losses are attached to: round((i+1)·L_s/M)−1 for a count M (12 blocks, 4 points: 2, 5, 8, 11)."""
    if isinstance(points, int):
        # floor(x + 1/2): Python's round() would send halves to even numbers
        return tuple(int((i + 1) * depth / points + 0.5) - 1 for i in range(points))
    return tuple(int(p) for p in points)


def build_student(config: StudentConfig, classes: int) -> VisionTransformer:
    """A freshly initialised student; draws from torch's global generator.

    With and without the distillation token, the weights that both have start from the same values.
    """
    from timm.models.vision_transformer import VisionTransformer

    options: dict[str, Any] = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "num_classes": classes,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": config.mlp_ratio,
        "drop_path_rate": config.drop_path,
    }
    plain = VisionTransformer(**options)
    return _with_distillation_token(plain, options) if config.distillation_token else plain


def _with_distillation_token(plain: VisionTransformer, options: dict[str, Any]) -> VisionTransformerDistilled:
    """The same student with DeiT's token, its position and its head, which start as timm draws them."""
    from timm.models.deit import VisionTransformerDistilled

    model = VisionTransformerDistilled(**options)
    # two logits in training, their mean in evaluation
    model.set_distilled_training(True)
    shared = plain.state_dict()
    assert model.pos_embed is not None
    with torch.no_grad():
        positions = shared.pop("pos_embed")
        model.pos_embed[:, :1] = positions[:, :1]
        model.pos_embed[:, 2:] = positions[:, 1:]
    missing, unexpected = model.load_state_dict(shared, strict=False)
    assert set(missing) == {"dist_token", "pos_embed", "head_dist.weight", "head_dist.bias"} and not unexpected
    return model


@dataclass
class StudentOutput:
    """What one forward pass of a student offers to the losses.

    logits (B, C); at the M points: tokens (M, B, N, D) and cls (M, B, D), raw outputs of the blocks, and, where asked for,
    scores (M, B, H, 1+N, 1+N). features (B, D): what the classifier head reads, the class token after the final norm.
    distillation_logits (B, C): the distillation head's, in training of a student that has one; `logits` are then the class
    head's, and in evaluation the mean of both.
    """

    logits: Tensor
    tokens: Tensor | None = None
    scores: Tensor | None = None
    cls: Tensor | None = None
    features: Tensor | None = None
    distillation_logits: Tensor | None = None


class TappedStudent:
    """Runs a student and gathers what the losses read. Not a module: it owns no parameter."""

    def __init__(
        self,
        model: VisionTransformer,
        points: Sequence[int],
        attention: bool,
        wrap: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda forward: forward,
    ) -> None:
        """`wrap(forward)` is what runs the forward pass, such as a compiled form of it."""
        self.model = model
        self.points = tuple(points)
        self.attention = attention
        self.grid = grid_of(model)
        self._taps = Taps(model, self.points, self.points if attention else (), features=True)
        self._run = wrap(self._forward)

    def __call__(self, images: Tensor) -> StudentOutput:
        """images: (B, 3, S, S), normalised."""
        return self._run(images)

    def _forward(self, images: Tensor) -> StudentOutput:
        with self._taps.record() as tapped:
            answer = self.model(images)
        logits, distillation_logits = answer if isinstance(answer, tuple) else (answer, None)
        out = StudentOutput(logits, features=tapped.features, distillation_logits=distillation_logits)
        if self.points:
            prefix = self.model.num_prefix_tokens
            out.tokens = torch.stack([tapped.tokens[p][:, prefix:] for p in self.points])
            out.cls = torch.stack([tapped.tokens[p][:, 0] for p in self.points])
            if self.attention:
                out.scores = torch.stack([patch_scores(tapped.scores(p), prefix) for p in self.points])
        return out
