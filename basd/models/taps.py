"""Taps: tokens and attention of chosen blocks, read from timm's VisionTransformer while it runs unchanged.

Forward hooks record the output of a block and the output of its `qkv` Linear; queries and keys are taken from the
latter and the attention is rebuilt as softmax(q kᵀ/√d). Fused attention stays on, so the output of the model is
bit-equal to the untapped one. (Hooks on `attn_drop` never fire under fused attention.)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from basd.errors import UserError

if TYPE_CHECKING:
    # takes seconds: imported where a model is made or looked at, so that commands that only read runs answer sooner
    from timm.layers import Attention
    from timm.models.vision_transformer import VisionTransformer


@dataclass
class Tapped:
    """What one forward pass left behind, by block index.

    `tokens[i]`: output of block i, (B, P+N, D), P prefix tokens first. `queries[i]`, `keys[i]`: (B, H, P+N, d), the
    queries already multiplied by 1/√d. `features`: what the classifier head read, (B, D), where asked for.
    """

    tokens: dict[int, Tensor] = field(default_factory=dict)
    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    features: Tensor | None = None

    def scores(self, block: int, images: slice = slice(None)) -> Tensor:
        """Pre-softmax attention q kᵀ/√d of a block, (B, H, P+N, P+N), of all images or some."""
        return self.queries[block][images] @ self.keys[block][images].transpose(-2, -1)

    def attention(self, block: int, images: slice = slice(None)) -> Tensor:
        """Attention probabilities of a block, (B, H, P+N, P+N), of all images or some; rows sum to 1."""
        return self.scores(block, images).softmax(dim=-1)


def check_tappable(model: nn.Module, name: str) -> VisionTransformer:
    """Return the model if its tokens and attention can be read by these taps; a `UserError` otherwise."""
    from timm.layers import Attention
    from timm.models.vision_transformer import Block, VisionTransformer

    if not isinstance(model, VisionTransformer):
        raise UserError(f"{name} is a {type(model).__name__}; choose a model of timm's VisionTransformer family.")
    if not model.has_class_token:
        raise UserError(f"{name} has no class token, which the attention maps need; choose a ViT with one.")
    for block in model.blocks:
        if not isinstance(block, Block):
            raise UserError(f"{name} is built of {type(block).__name__}; only timm's plain Block can be tapped.")
        if type(block.attn) is not Attention:
            raise UserError(f"{name} uses {type(block.attn).__name__}; the taps know timm's Attention only.")
    return model


def attention_of(model: VisionTransformer, block: int) -> Attention:
    """The attention module of a block."""
    from timm.layers import Attention

    attn = model.blocks[block].attn
    assert isinstance(attn, Attention)
    return attn


class Taps:
    """Hooks on a ViT. `with taps.record() as tapped: model(x)` fills `tapped`; outside of it the hooks do nothing."""

    def __init__(
        self,
        model: VisionTransformer,
        tokens: Iterable[int],
        attention: Iterable[int] = (),
        features: bool = False,
    ) -> None:
        self._target: Tapped | None = None
        for index in sorted(set(tokens)):
            model.blocks[index].register_forward_hook(self._block_hook(index))
        for index in sorted(set(attention)):
            attn = attention_of(model, index)
            attn.qkv.register_forward_hook(self._qkv_hook(index, attn))
        if features:
            model.head.register_forward_pre_hook(self._head_hook)

    def record(self) -> _Recording:
        return _Recording(self)

    def _head_hook(self, _module: nn.Module, inputs: tuple) -> None:
        if self._target is not None:
            self._target.features = inputs[0]

    def _block_hook(self, index: int):
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            if self._target is not None:
                self._target.tokens[index] = output

        return hook

    def _qkv_hook(self, index: int, attn: Attention):
        def hook(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
            if self._target is None:
                return
            batch, length, _ = output.shape
            qkv = output.reshape(batch, length, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
            self._target.queries[index] = attn.q_norm(qkv[0]) * attn.scale
            self._target.keys[index] = attn.k_norm(qkv[1])

        return hook


class _Recording:
    def __init__(self, taps: Taps) -> None:
        self._taps = taps

    def __enter__(self) -> Tapped:
        self._taps._target = Tapped()
        return self._taps._target

    def __exit__(self, *_: object) -> None:
        self._taps._target = None


def patch_attention(attention: Tensor, prefix: int) -> Tensor:
    """Drop registers and distillation tokens as queries and keys; rows are renormalised.

    attention: (..., P+N, P+N) probabilities with the class token first. Returns (..., 1+N, 1+N).
    """
    if prefix == 1:
        return attention
    keep = torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(prefix, attention.shape[-1])])
    keep = keep.to(attention.device)
    kept = attention.index_select(-1, keep).index_select(-2, keep)
    return kept / kept.sum(dim=-1, keepdim=True)


def patch_scores(scores: Tensor, prefix: int) -> Tensor:
    """The same for pre-softmax scores: without the dropped keys the softmax renormalises by itself."""
    if prefix == 1:
        return scores
    keep = torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(prefix, scores.shape[-1])]).to(scores.device)
    return scores.index_select(-1, keep).index_select(-2, keep)


def grid_of(model: VisionTransformer) -> tuple[int, int]:
    """Rows and columns of the patch grid."""
    height, width = model.patch_embed.grid_size
    return int(height), int(width)
