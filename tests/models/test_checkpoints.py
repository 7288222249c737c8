"""Files of weights: what they are is read from their content, all of it is loaded, and nothing in them runs."""

import argparse
import dataclasses
import hashlib
import os
import pickle
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import torch
from command import basd_here
from dinov2_release import SIZES, hollow_state, random_state, shapes
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from basd.compose import compose
from basd.data import load
from basd.errors import UserError
from basd.models.checkpoints import read_checkpoint
from basd.models.teacher import (
    DigitsViTConfig,
    TimmTeacherConfig,
    build_digits_vit,
    build_timm_teacher,
    check_timm_teacher,
)
from basd.training.teachers import cached_teacher, prepare_teacher

SMALL = {"width": 8, "depth": 2, "patch": 4, "side": 3}
State = dict[str, Tensor]


def small(registers: int = 0) -> State:
    return random_state(**SMALL, registers=registers)


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def without_mask(state: State) -> State:
    return {name: value for name, value in state.items() if name != "mask_token"}


def chunked(state: State) -> State:
    """DINOv2's training: a block's number within its chunk follows the chunk's."""
    return {
        ".".join([*name.split(".")[:1], "0", *name.split(".")[1:]]) if name.startswith("blocks.") else name: value
        for name, value in state.items()
    }


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


# -- what a file is ----------------------------------------------------------------------------------------------------


def test_the_released_layout_has_its_175_entries() -> None:
    sizes = {name: torch.Size(shape).numel() for name, shape in shapes(*SIZES["vits14"]).items()}
    assert len(sizes) == 175 and sum(sizes.values()) == 22_056_576
    assert sum(sizes.values()) - sizes["mask_token"] == 22_056_192


def test_facts_of_a_released_file(tmp_path: Path) -> None:
    state = hollow_state(*SIZES["vits14"])
    facts = {
        "release": (state, (175, 22_056_576, "DINOv2 release")),
        "without mask token": (without_mask(state), (174, 22_056_192, "timm")),
    }
    for name, (weights, expected) in facts.items():
        path = tmp_path / f"{name}.pth"
        torch.save(weights, path)
        file = read_checkpoint(path).file
        assert (file.tensors, file.parameters, file.layout) == expected, name
        said = file.description
        assert said.startswith("PyTorch file in the layout of ") and f"{expected[1]:,} parameters" in said, name
        assert file.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()[:16] and file.fingerprint in said, name


WRAPPED: dict[str, tuple[str, Callable[[State], Any]]] = {
    "bare": ("", lambda state: state),
    "DeiT": ("model", lambda state: {"model": state, "epoch": 3}),
    "averaged": ("model_ema", lambda state: {"model": {"x": torch.zeros(1)}, "model_ema": state}),
    "timm's training": (
        "state_dict",
        lambda state: {"state_dict": state, "state_dict_ema": None, "args": argparse.Namespace(lr=0.1), "epoch": 1},
    ),
    "DDP and compile": ("state_dict", lambda state: {"state_dict": prefixed("module._orig_mod.", state)}),
    "DINOv2's training": (
        "teacher",
        lambda state: {
            "student": {"x": torch.zeros(1)},
            "teacher": prefixed("module.backbone.", chunked(state)) | {"module.dino_head.mlp.0.weight": torch.ones(2)},
        },
    ),
}


def test_entries_and_prefixes_of_training_programs(tmp_path: Path) -> None:
    for kind, (entry, wrap) in WRAPPED.items():
        torch.save(wrap(small()), tmp_path / "w.pth")
        got = read_checkpoint(tmp_path / "w.pth")
        assert same(got.state, without_mask(small())) and got.file.entry == entry, kind


def write_safetensors(state: State, path: Path) -> None:
    save_file(state, path)


def write_zip(state: State, path: Path) -> None:
    torch.save(state, path)


def write_older(state: State, path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


def test_the_content_counts_and_not_the_name(tmp_path: Path) -> None:
    forms: dict[Callable, str] = {write_safetensors: "safetensors", write_zip: "PyTorch", write_older: "PyTorch"}
    for (write, container), name in product(forms.items(), ["w.pth", "w.safetensors", "w"]):
        write(small(), tmp_path / name)
        got = read_checkpoint(tmp_path / name)
        assert got.file.container == container and same(got.state, without_mask(small())), (write.__name__, name)


# -- names -------------------------------------------------------------------------------------------------------------


def test_names_of_the_release_become_those_that_timm_gives_them(tmp_path: Path) -> None:
    for kind in ("plain", "registers", "SwiGLU"):
        check_names_of_the_release(kind, tmp_path)


def check_names_of_the_release(kind: str, tmp_path: Path) -> None:
    registers = 0 if kind == "plain" else 2
    state = small(registers)
    options: dict[str, Any] = {"reg_tokens": registers, "no_embed_class": registers > 0, "init_values": 1.0}
    if kind == "SwiGLU":
        for block in range(2):
            for part in ("weight", "bias"):
                state[f"blocks.{block}.mlp.w12.{part}"] = state.pop(f"blocks.{block}.mlp.fc1.{part}")
                second = state.pop(f"blocks.{block}.mlp.fc2.{part}")
                state[f"blocks.{block}.mlp.w3.{part}"] = second[:, :16].contiguous() if part == "weight" else second
        options["mlp_layer"] = SwiGLUPacked
    torch.save(state, tmp_path / "w.pth")
    model = VisionTransformer(img_size=12, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=0, **options)
    got = read_checkpoint(tmp_path / "w.pth")
    assert same(got.state, checkpoint_filter_fn(dict(state), model)) and got.file.layout == "DINOv2 release", kind
    model.load_state_dict(got.state)
    # registers alone tell the layout too: timm looks for the mask token
    torch.save(without_mask(state), tmp_path / "w.pth")
    assert same(read_checkpoint(tmp_path / "w.pth").state, got.state), kind


def test_layer_scale_of_deit_iii(tmp_path: Path) -> None:
    state = {name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): v for name, v in small().items()}
    torch.save({"model": without_mask(state)}, tmp_path / "w.pth")
    assert same(read_checkpoint(tmp_path / "w.pth").state, without_mask(small()))


# -- refused -----------------------------------------------------------------------------------------------------------


class Code:
    """Unpickled, it makes a file."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


def test_code_in_a_file_never_runs(tmp_path: Path) -> None:
    for form in ("zip", "older", "pickle", "late"):
        check_code_does_not_run(form, tmp_path)


def check_code_does_not_run(form: str, tmp_path: Path) -> None:
    made, path = tmp_path / f"made by {form}", tmp_path / f"{form}.pth"
    content = {**small(), "extra": Code(made)} if form == "late" else {"extra": Code(made), **small()}
    if form == "pickle":
        path.write_bytes(pickle.dumps({"extra": Code(made)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "older")
    with pytest.raises(UserError, match=r"pickled code \(posix\.mkdir\)") as caught:
        check_timm_teacher(TimmTeacherConfig(weights=str(path)))
    assert not made.exists(), form
    assert str(path) in str(caught.value) and "\n" not in str(caught.value), form
    # without the guard it does run
    if form == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert made.exists(), form


def refuse(path: Path, content: Any = None, raw: bytes | None = None) -> Path:
    if raw is not None:
        path.write_bytes(raw)
    else:
        torch.save(content, path)
    return path


def changed(**tensors: Any) -> State:
    state = {**small(), **{name.replace("__", "."): value for name, value in tensors.items()}}
    return {name: value for name, value in state.items() if value is not None}


def half_of(write: Callable, share: float) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write(small(), folder / "whole")
        whole = (folder / "whole").read_bytes()
        return refuse(folder / "w.pth", raw=whole[: int(len(whole) * share)])

    return make


def other_zip(folder: Path) -> Path:
    numpy.savez(folder / "w.npz", a=numpy.zeros(2))
    return folder / "w.npz"


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda f: f / "w.pth", "does not exist"),
    "directory": (lambda f: f, "is a directory"),
    "empty": (lambda f: refuse(f / "w.pth", raw=b""), "is empty"),
    "text": (lambda f: refuse(f / "w.safetensors", raw=b"hello, world"), "neither a PyTorch nor a safetensors file"),
    "web page": (lambda f: refuse(f / "w.pth", raw=b"\n<!DOCTYPE html><html>"), "web page"),
    "LFS": (lambda f: refuse(f / "w.pth", raw=b"version https://git-lfs.github.com/spec/v1\noid"), "git lfs pull"),
    "half a zip": (half_of(write_zip, 0.5), "truncated or damaged"),
    "most of a zip": (half_of(write_zip, 0.99), "truncated or damaged"),
    "half a pickle": (half_of(write_older, 0.5), "truncated or damaged"),
    "start of a pickle": (half_of(write_older, 0.002), "truncated or damaged"),
    "half a safetensors": (half_of(write_safetensors, 0.5), "truncated or damaged"),
    "start of a safetensors": (half_of(write_safetensors, 0.01), "truncated or damaged"),
    "whole model": (lambda f: refuse(f / "w.pth", torch.nn.Linear(2, 2)), "torch.nn.modules.linear.Linear"),
    "list": (lambda f: refuse(f / "w.pth", [torch.zeros(2)]), "a list"),
    "nothing": (lambda f: refuse(f / "w.pth", {}), "holds nothing"),
    "other entries": (lambda f: refuse(f / "w.pth", {"net": small(), "epoch": 1}), "entries net, epoch"),
    "a head alone": (
        lambda f: refuse(f / "w.pth", {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}),
        "holds no Vision Transformer",
    ),
    "transformers": (
        lambda f: refuse(f / "w.pth", {"encoder.layer.0.norm1.weight": torch.zeros(2)}),
        "Hugging Face's transformers",
    ),
    "CLIP": (lambda f: refuse(f / "w.pth", {"visual.class_embedding": torch.zeros(2)}), "layout of CLIP"),
    "not finite": (lambda f: refuse(f / "w.pth", changed(norm__bias=torch.full((8,), float("nan")))), "norm.bias"),
    "integers": (lambda f: refuse(f / "w.pth", changed(norm__bias=torch.zeros(8).to(torch.int8))), "as int8"),
    "flat positions": (lambda f: refuse(f / "w.pth", changed(pos_embed=torch.zeros(10, 8))), r"\(10, 8\)"),
    "other zip": (other_zip, "zip archive, but not PyTorch's"),
}


def test_what_is_no_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    for kind, (make, said) in REFUSED.items():
        (tmp_path / kind).mkdir()
        path = make(tmp_path / kind)
        with pytest.raises(UserError, match=said) as caught:
            read_checkpoint(path)
        sentence = str(caught.value)
        assert f"teacher.weights={path}" in sentence and "\n" not in sentence and sentence.endswith("."), kind


def check_preset(size: str, registers: int, folder: Path) -> None:
    """The preset takes a file of its release's names and shapes, and another preset names the right one."""
    preset = f"dinov2_{size}_reg4" if registers else f"dinov2_{size}"
    width, depth = SIZES[size]
    torch.save(hollow_state(width, depth, registers), folder / f"{preset}.pth")

    def check(teacher: str) -> Any:
        config = compose([f"teacher={teacher}", f"teacher.weights={folder / preset}.pth"]).config
        assert config.teacher.image_size == 224 and config.teacher.position_interpolation == "original", teacher
        return check_timm_teacher(config.teacher)

    assert check(preset).tensors == (343 if size == "vitl14" else 175) + (registers > 0), preset
    with pytest.raises(UserError, match=rf"choose teacher={preset}\.$") as caught:
        check("dinov2_vits14" if preset != "dinov2_vits14" else "dinov2_vitb14_reg4")
    tokens = ", 4 registers" if registers else ""
    assert f"is of width {width}, depth {depth}, patch 14{tokens}, but" in str(caught.value), preset


def test_the_small_presets_take_their_release_and_name_the_right_one(tmp_path: Path) -> None:
    for registers in (0, 4):
        check_preset("vits14", registers, tmp_path)


@pytest.mark.full
def test_the_large_presets_take_their_release_and_name_the_right_one(tmp_path: Path) -> None:
    for size, registers in product(["vitb14", "vitl14"], [0, 4]):
        check_preset(size, registers, tmp_path)


@pytest.fixture(scope="module")
def vit_state() -> State:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=64, num_classes=3).state_dict()


FIRST = "blocks.0.mlp.fc1.weight"
MISFITS: dict[str, tuple[Callable[[State], State], str]] = {
    "depth": (lambda s: {k: v for k, v in s.items() if not k.startswith("blocks.5.")}, "is of width 64, depth 5"),
    "patch": (lambda s: {**s, "patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)}, "patch 8, but test_vit"),
    "registers": (lambda s: {**s, "reg_token": torch.zeros(1, 2, 64)}, "2 registers, but test_vit"),
    "distilled": (lambda s: {**s, "dist_token": torch.zeros(1, 1, 64)}, "a distillation token, but test_vit"),
    "lacks": (lambda s: {k: v for k, v in s.items() if k != FIRST}, rf"lacks 1 weight \({FIRST}\)"),
    "half a head": (lambda s: {k: v for k, v in s.items() if k != "head.bias"}, r"lacks 1 weight \(head.bias\)"),
    "no class token": (lambda s: {k: v for k, v in s.items() if k != "cls_token"}, r"lacks 1 weight \(cls_token\)"),
    "extra": (lambda s: {**s, "blocks.0.ls1.gamma": torch.ones(64)}, r"holds 1 weight \(blocks.0.ls1.gamma\), which"),
    "pre-logits": (lambda s: {**s, "pre_logits.fc.weight": torch.ones(64, 64)}, "pre_logits.fc.weight"),
    "shape": (lambda s: {**s, FIRST: torch.zeros(128, 64)}, r"\(128, 64\) where test_vit has"),
    "positions": (lambda s: {**s, "pos_embed": s["pos_embed"][:, 1:]}, "holds 16 positions"),
    "width of positions": (lambda s: {**s, "pos_embed": s["pos_embed"][..., :32]}, r"\(1, 17, 32\)"),
}


def test_weights_of_another_model_are_one_sentence(vit_state: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    for kind, (change, said) in MISFITS.items():
        write_zip(change(vit_state), path)
        with pytest.raises(UserError, match=said) as caught:
            build_timm_teacher(TimmTeacherConfig(model="test_vit", image_size=64, weights=str(path)), 3)
        assert f"teacher.weights={path}" in str(caught.value) and "\n" not in str(caught.value), kind


def test_every_weight_of_a_file_is_in_the_teacher(vit_state: State, tmp_path: Path) -> None:
    config = TimmTeacherConfig(model="test_vit", image_size=64, weights=str(tmp_path / "w"))
    for write in (write_zip, write_older, write_safetensors):
        write(vit_state, tmp_path / "w")
        model = build_timm_teacher(config, 3)
        assert same(dict(model.state_dict()), vit_state), write.__name__
        # timm would keep a second copy there
        assert "state_dict" not in model.pretrained_cfg, write.__name__


def test_half_precision_files_load_into_a_float32_teacher(vit_state: State, tmp_path: Path) -> None:
    save_file({name: value.half() for name, value in vit_state.items()}, tmp_path / "w.safetensors")
    config = TimmTeacherConfig(model="test_vit", image_size=64, weights=str(tmp_path / "w.safetensors"))
    got, stored = build_timm_teacher(config).state_dict(), load_file(tmp_path / "w.safetensors")
    assert all(value.dtype == torch.float32 and torch.equal(value, stored[name].float()) for name, value in got.items())


# -- what is said of a file ----------------------------------------------------------------------------------------------


def test_the_prepared_teacher_and_doctor_say_which_file_it_is(vit_state: State, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    write_zip({"model": vit_state}, path)
    words = ["teacher=timm", "teacher.model=test_vit", "teacher.image_size=64", f"teacher.weights={path}"]
    config = compose(words).config
    prepared = prepare_teacher(config.teacher, config.data, load(config.data))
    assert prepared.path == path
    parameters = f"{sum(value.numel() for value in vit_state.values()):,}"
    fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    def doctor() -> tuple[int, str]:
        """Exit status and output without spaces: the output's lines are broken anywhere."""
        status, said = basd_here("doctor", *words, cwd=tmp_path, cache=tmp_path / "cache")
        return status, "".join(said.split())

    status, said = doctor()
    assert status == 0, said
    for part in (str(path), "timm, entry model", f"{len(vit_state)} tensors, {parameters} parameters", fingerprint):
        assert part.replace(" ", "") in said, part
    path.write_bytes(path.read_bytes()[:500])
    status, said = doctor()
    assert status == 1 and "truncatedordamaged" in said, said


def test_a_file_for_the_digits_teacher(tmp_path: Path) -> None:
    config = DigitsViTConfig(image_size=24, patch_size=6, width=12, depth=2, heads=3)
    state = build_digits_vit(config, 10).state_dict()
    config.weights = str(tmp_path / "w")
    data = compose([]).config.data
    splits = load(data)
    for write in (write_zip, write_safetensors):
        write(state, tmp_path / "w")
        assert same(dict(prepare_teacher(config, data, splits).model.state_dict()), state), write.__name__
        assert cached_teacher(config, data, splits) == tmp_path / "w", write.__name__
    for name, value, said in (
        ("image_size", 30, "for 24 pixels"),
        ("depth", 3, "depth 2"),
        ("patch_size", 4, "patch 6"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            prepare_teacher(dataclasses.replace(config, **{name: value}), data, splits)
        assert "correct teacher.weights" in str(caught.value)
