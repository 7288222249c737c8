"""Weights of a ViT from a file: its content says what it is, nothing in it is run, and no weight is left out in silence."""

from __future__ import annotations

import argparse
import hashlib
import math
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from basd.errors import UserError

# Where training programs put the weights within a file, averaged ones first: timm ("state_dict_ema", "state_dict"), DeiT and
# MAE ("model_ema", "model"), DINO and DINOv2 ("teacher").
ENTRIES = ("state_dict_ema", "model_ema", "teacher", "state_dict", "model")

_FORMATS = "give a PyTorch file (.pth) or a .safetensors file, in the layout of DINOv2's release or of timm"


@dataclass(frozen=True)
class WeightsFile:
    """What a file of weights is, for people."""

    path: Path
    # "PyTorch" or "safetensors"
    container: str
    # whose names it uses: "DINOv2 release" or "timm"; where both would be the same, "timm"
    layout: str
    # the entry of the file that holds the weights; "": the file itself
    entry: str
    # of the ViT, the mask token included
    tensors: int
    parameters: int

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hex digits of the file's SHA-256, as `sha256sum` prints it."""
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]

    @property
    def description(self) -> str:
        """For people: "PyTorch file in the layout of DINOv2's release, 175 tensors, 22,056,576 parameters, SHA-256 …"."""
        owner = "DINOv2's release" if self.layout == "DINOv2 release" else "timm"
        entry = f", entry {self.entry}" if self.entry else ""
        counts = f"{self.tensors} tensors, {self.parameters:,} parameters"
        return f"{self.container} file in the layout of {owner}{entry}, {counts}, SHA-256 {self.fingerprint}"


@dataclass(frozen=True)
class Checkpoint:
    """A ViT's weights, on the CPU, by timm's names (`state`), and the file they come from."""

    file: WeightsFile
    state: dict[str, Tensor]

    @property
    def classes(self) -> int:
        """Rows of its classification head; 0: it has none."""
        return len(self.state["head.weight"]) if "head.weight" in self.state else 0

    @property
    def one_head(self) -> bool:
        """Whether its logits come from one head: DeiT's distilled models have two, each on a token of its own."""
        return self.classes > 0 and "head_dist.weight" not in self.state


def read_checkpoint(path: Path) -> Checkpoint:
    """The ViT's weights in a file, converted to timm's names; its content says in which of the known forms it is.

    Forms: a PyTorch file (zip or the older pickle; read with `weights_only`, so no code in it runs) or safetensors; the
    weights themselves or one of `ENTRIES`; with the prefixes that wrappers leave behind; in timm's layout or in that of
    DINOv2's release. `UserError`, one sentence, for anything else, and for weights that are not finite.
    """
    container, content = _read(path)
    entry, found = _weights_in(content, path)
    found = _without_wrappers(found)
    _check_vit(found, path)
    layout = "DINOv2 release" if {"mask_token", "register_tokens"} & found.keys() else "timm"
    facts = WeightsFile(path, container, layout, entry, len(found), sum(value.numel() for value in found.values()))
    state = _timm_names(found)
    broken = [name for name, value in state.items() if not torch.isfinite(value.float()).all()]
    if broken:
        raise UserError(
            f"teacher.weights={path} holds weights that are not finite, in {broken[0]}; give an undamaged file."
        )
    return Checkpoint(facts, state)


def _read(path: Path) -> tuple[str, Any]:
    """The container's name and what is in it; nothing in it is run."""
    try:
        with open(path, "rb") as file:
            head = file.read(256)
    except FileNotFoundError as error:
        raise UserError(f"teacher.weights={path} does not exist; {_FORMATS}.") from error
    except IsADirectoryError as error:
        raise UserError(f"teacher.weights={path} is a directory; {_FORMATS}.") from error
    except OSError as error:
        raise UserError(f"teacher.weights={path} cannot be read ({error.strerror}); {_FORMATS}.") from error
    if not head:
        raise UserError(f"teacher.weights={path} is empty; {_FORMATS}.")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"teacher.weights={path} is a Git LFS pointer and not the weights themselves; fetch them with `git lfs pull`."
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError(f"teacher.weights={path} is a web page and not weights; download the file itself.")
    if head[8:9] == b"{":
        return "safetensors", _read_safetensors(path)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return "PyTorch", _read_torch(path)
    raise UserError(f"teacher.weights={path} is neither a PyTorch nor a safetensors file; {_FORMATS}.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise UserError(
            f"teacher.weights={path} is truncated or damaged ({_first_line(error)}); fetch it again."
        ) from error


def _read_torch(path: Path) -> Any:
    try:
        # timm's training files hold their command-line arguments, which are plain values
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([argparse.Namespace]),
            open(path, "rb") as file,
        ):
            warnings.simplefilter("ignore")
            # given a path, torch.load would go by its ending
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"pickled code ({code[1]})" if code else "a pickle other than PyTorch's"
        raise UserError(
            f"teacher.weights={path} holds {what}, which BASD does not run; save the model's state_dict() alone and give that "
            "file."
        ) from error
    except Exception as error:
        said = str(error)
        if "TorchScript" in said:
            raise UserError(
                f"teacher.weights={path} is a TorchScript program; give a file of the model's state_dict()."
            ) from error
        if "not in a subdirectory" in said:
            raise UserError(f"teacher.weights={path} is a zip archive, but not PyTorch's; {_FORMATS}.") from error
        # the reader fails in many ways on what is not all there: RuntimeError, EOFError, struct.error, IndexError, …
        raise UserError(
            f"teacher.weights={path} is truncated or damaged ({_first_line(error)}); fetch it again."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0].rstrip(".") if lines else type(error).__name__


def _weights_in(content: Any, path: Path) -> tuple[str, dict[str, Tensor]]:
    """The entry that holds the weights, and the weights."""
    if isinstance(content, Mapping):
        for entry in ("", *ENTRIES):
            inner = content.get(entry) if entry else content
            if isinstance(inner, Mapping) and inner and all(isinstance(value, Tensor) for value in inner.values()):
                return entry, {str(name): value for name, value in inner.items()}
        what = f"entries {', '.join(str(name) for name in list(content)[:5])}" if content else "nothing"
    else:
        what = f"a {type(content).__name__}"
    raise UserError(
        f"teacher.weights={path} holds {what} where weights by name are expected; save the model's state_dict() alone."
    )


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the model alone has them: without what DDP, torch.compile and DINO's training put around it."""
    plain = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): value for name, value in state.items()}
    heads = ("dino_head.", "ibot_head.", "head.mlp.", "head.last_layer.")
    if any(name.startswith("backbone.") for name in plain):
        # the projection heads that DINO trains beside the ViT are no part of it
        plain = {name.removeprefix("backbone."): value for name, value in plain.items() if not name.startswith(heads)}
    # DINOv2's training keeps its blocks in chunks, blocks.CHUNK.BLOCK, the block counted through
    return {re.sub(r"^blocks\.\d+\.(\d+)\.", r"blocks.\1.", name): value for name, value in plain.items()}


def _check_vit(state: dict[str, Tensor], path: Path) -> None:
    """`UserError` where the names are not those of a ViT in timm's or in DINOv2's layout."""
    projection = state.get("patch_embed.proj.weight")
    if projection is not None and projection.ndim == 4 and any(name.startswith("blocks.0.") for name in state):
        strange = [name for name, value in state.items() if not value.is_floating_point()]
        if strange:
            kind = str(state[strange[0]].dtype).removeprefix("torch.")
            raise UserError(f"teacher.weights={path} holds {strange[0]} as {kind}; give weights in floating point.")
        positions = state.get("pos_embed")
        if positions is not None and positions.ndim != 3:
            raise UserError(
                f"teacher.weights={path} holds pos_embed of shape {_shape(positions)} instead of (1, tokens, width)."
            )
        return
    if any("encoder.layer." in name for name in state):
        what = "is in the layout of Hugging Face's transformers"
    elif any(name.startswith("visual.") for name in state):
        what = "is in the layout of CLIP"
    else:
        what = f"holds no Vision Transformer (its weights are {', '.join(sorted(state)[:3])}, …)"
    raise UserError(f"teacher.weights={path} {what}; {_FORMATS}.")


def _shape(value: Tensor) -> str:
    return str(tuple(value.shape))


def _timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's and DeiT III's names → timm's; what has timm's names already stays as it is.

    The mask token is of training only. Where DINOv2 has registers, timm keeps no position for the class token: it is added
    to the token itself, which comes to the same.
    """
    state = {name: value for name, value in state.items() if name != "mask_token"}
    if "register_tokens" in state and {"cls_token", "pos_embed"} <= state.keys():
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    # SwiGLU of ViT-g, and the layer scale of DeiT III
    renamed = ((r"\.mlp\.w12\.", ".mlp.fc1."), (r"\.mlp\.w3\.", ".mlp.fc2."), (r"\.gamma_([12])$", r".ls\1.gamma"))
    for old, new in renamed:
        state = {re.sub(old, new, name): value for name, value in state.items()}
    return state


# -- does it fit a model? ----------------------------------------------------------------------------------------------

# teacher= presets by the width and depth of DINOv2's releases
_DINOV2 = {(384, 12): "dinov2_vits14", (768, 12): "dinov2_vitb14", (1024, 24): "dinov2_vitl14"}


@dataclass(frozen=True)
class _Architecture:
    """What the weights' shapes say of a ViT (not its number of heads)."""

    width: int
    depth: int
    patch: int
    registers: int
    distillation_token: bool
    layer_scale: bool

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> _Architecture:
        projection = state["patch_embed.proj.weight"]
        blocks = {int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))}
        width = projection.shape[0]
        registers = state["reg_token"].numel() // width if "reg_token" in state else 0
        return cls(
            width,
            len(blocks),
            projection.shape[-1],
            registers,
            "dist_token" in state,
            "blocks.0.ls1.gamma" in state,
        )

    def __str__(self) -> str:
        """Width 384, depth 12, patch 14, and the tokens that few have."""
        words = [f"width {self.width}", f"depth {self.depth}", f"patch {self.patch}"]
        if self.registers:
            words.append(f"{self.registers} registers")
        if self.distillation_token:
            words.append("a distillation token")
        return ", ".join(words)

    @property
    def preset(self) -> str | None:
        """The teacher= preset of these weights, where it is one of DINOv2's."""
        name = _DINOV2.get((self.width, self.depth))
        if name is None or self.patch != 14 or not self.layer_scale or self.registers not in (0, 4):
            return None
        return f"{name}_reg4" if self.registers else name


def check_fit(checkpoint: Checkpoint, model: nn.Module, name: str, way_out: str) -> None:
    """`UserError`, one sentence, unless the checkpoint holds each weight of `model` in its shape and nothing else.

    Positions may be of another square grid. `model` may be on the meta device. `name`: what the model is called;
    `way_out`: what to do where the file is of another architecture and of no preset.
    """
    path, state, wanted = checkpoint.file.path, checkpoint.state, model.state_dict()
    found, needed = _Architecture.of(state), _Architecture.of(wanted)
    sizes = ("width", "depth", "patch", "registers", "distillation_token")
    if any(getattr(found, size) != getattr(needed, size) for size in sizes):
        choose = f"choose teacher={found.preset}" if found.preset else way_out
        raise UserError(f"teacher.weights={path} is of {found}, but {name} is of {needed}; {choose}.")
    missing = [each for each in wanted if each not in state]
    if missing:
        raise UserError(
            f"teacher.weights={path} lacks {_some(missing)} of {name}; the file is incomplete, or {way_out}."
        )
    extra = [each for each in state if each not in wanted]
    if extra:
        raise UserError(f"teacher.weights={path} holds {_some(extra)}, which {name} does not have; {way_out}.")
    positions = _positions_problem(state, model)
    if positions:
        raise UserError(f"teacher.weights={path} {positions}; give the weights of {name}.")
    for each, value in wanted.items():
        if each != "pos_embed" and value.shape != state[each].shape:
            shapes = f"{_shape(state[each])} where {name} has {_shape(value)}"
            raise UserError(f"teacher.weights={path} holds {each} of shape {shapes}; {way_out}.")


def _some(names: list[str]) -> str:
    weights = "1 weight" if len(names) == 1 else f"{len(names)} weights"
    return f"{weights} ({', '.join(names[:2])}{', …' if len(names) > 2 else ''})"


def native_size(checkpoint: Checkpoint, model: Any) -> int:
    """Pixels a side that the checkpoint's positions are for in a ViT of timm's class; 0: it has no positions."""
    if "pos_embed" not in checkpoint.state:
        return 0
    patches = checkpoint.state["pos_embed"].shape[1] - _position_prefix(model)
    return math.isqrt(patches) * checkpoint.state["patch_embed.proj.weight"].shape[-1]


def _position_prefix(model: Any) -> int:
    """How many tokens before the patches have a position."""
    return 0 if model.no_embed_class else model.num_prefix_tokens


def _positions_problem(state: Mapping[str, Tensor], model: Any) -> str | None:
    if "pos_embed" not in state:
        return None
    lead, count, width = state["pos_embed"].shape
    prefix = _position_prefix(model)
    patches = count - prefix
    if (lead, width) != (1, model.embed_dim):
        return f"holds pos_embed of shape {_shape(state['pos_embed'])}, not (1, tokens, {model.embed_dim})"
    if patches < 1 or math.isqrt(patches) ** 2 != patches:
        return f"holds {count} positions, which are not those of a square grid and {prefix} other tokens"
    return None
