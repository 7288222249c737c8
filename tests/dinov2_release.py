"""DINOv2's released checkpoints and their forward pass, written out from the paper's code (arXiv:2304.07193, 2309.16588)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NATIVE = 37  # 518 pixels in patches of 14
SIZES = {"vits14": (384, 12), "vitb14": (768, 12), "vitl14": (1024, 24)}


def shapes(
    width: int, depth: int, registers: int = 0, patch: int = 14, side: int = NATIVE
) -> dict[str, tuple[int, ...]]:
    """Names and shapes as in `dinov2_vits14_pretrain.pth` and `dinov2_vits14_reg4_pretrain.pth`."""
    found: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + side * side, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    if registers:
        found["register_tokens"] = (1, registers, width)
    for block in range(depth):
        for name, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            found[f"blocks.{block}.{name}.weight"] = (rows, columns)
            found[f"blocks.{block}.{name}.bias"] = (rows,)
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            found[f"blocks.{block}.{name}"] = (width,)
    return found


def random_state(width: int, depth: int, registers: int = 0, patch: int = 14, side: int = NATIVE) -> dict[str, Tensor]:
    """Random weights whose every tensor changes the tokens visibly."""
    generator = torch.Generator().manual_seed(registers)
    state = {}
    for name, shape in shapes(width, depth, registers, patch, side).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "gamma")):
            state[name] = 1 + 0.2 * values
        elif len(shape) >= 2 and "blocks" in name:
            state[name] = values / math.sqrt(shape[-1])
        else:
            state[name] = 0.3 * values if "tok" in name or "pos" in name else 0.05 * values
    return state


def hollow_state(width: int, depth: int, registers: int = 0) -> dict[str, Tensor]:
    """The shapes of a large checkpoint in a small file: each tensor is one number, repeated by its strides."""
    return {name: torch.full((1,), 0.5).expand(shape) for name, shape in shapes(width, depth, registers).items()}


def positions(state: dict[str, Tensor], grid: int) -> Tensor:
    """(1, 1+grid², D): bicubic; offset 0.1 in the scale and no antialias, but exact and antialiased with registers."""
    stored = state["pos_embed"]
    side = math.isqrt(stored.shape[1] - 1)
    if grid == side:
        return stored
    square = stored[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if "register_tokens" in state:
        moved = F.interpolate(square, size=(grid, grid), mode="bicubic", antialias=True)
    else:
        factor = (grid + 0.1) / side
        moved = F.interpolate(square, scale_factor=(factor, factor), mode="bicubic", antialias=False)
    assert moved.shape[-2:] == (grid, grid)
    return torch.cat([stored[:, :1], moved.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)], dim=1)


def _norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def _linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def forward(state: dict[str, Tensor], images: Tensor, heads: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Tokens after every block (class token, registers, patches), attention of every block, class token after the norm."""
    patch, width = state["patch_embed.proj.weight"].shape[-1], state["cls_token"].shape[-1]
    batch, _, size, _ = images.shape
    pixels = F.unfold(images, patch, stride=patch).transpose(1, 2)
    x = pixels @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].expand(batch, -1, -1), x], dim=1) + positions(state, size // patch)
    if "register_tokens" in state:
        x = torch.cat([x[:, :1], state["register_tokens"].expand(batch, -1, -1), x[:, 1:]], dim=1)
    tokens, maps = [], []
    depth = sum(name.endswith("ls1.gamma") for name in state)
    for block in (f"blocks.{i}" for i in range(depth)):
        qkv = _linear(state, f"{block}.attn.qkv", _norm(state, f"{block}.norm1", x))
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.split(width, dim=-1))
        attention = (q @ k.transpose(-2, -1) / math.sqrt(width // heads)).softmax(-1)
        mixed = (attention @ v).transpose(1, 2).flatten(2)
        x = x + state[f"{block}.ls1.gamma"] * _linear(state, f"{block}.attn.proj", mixed)
        hidden = _linear(state, f"{block}.mlp.fc1", _norm(state, f"{block}.norm2", x))
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + state[f"{block}.ls2.gamma"] * _linear(state, f"{block}.mlp.fc2", hidden)
        tokens.append(x)
        maps.append(attention)
    return tokens, maps, _norm(state, "norm", x)[:, 0]
