"""`basd export`: a trained student as a directory that timm loads, checked against the student it was made from.

model.safetensors   timm's own state dict: timm.create_model("deit_tiny_patch16_224", checkpoint_path=…) at DeiT-Tiny's sizes
config.json         timm's model configuration: timm.create_model("local-dir:DIR", pretrained=True) at any size; its
                    section "basd" says where the student comes from and how VisionTransformer(**args) rebuilds it
model.onnx          with --onnx: images (B,3,S,S) float32, normalised → logits (B,C)
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from basd.errors import UserError
from basd.grid.finished import FinishedArm
from basd.models.student import StudentConfig, build_student
from basd.training.device import cpu_threads

CONFIG, WEIGHTS, ONNX = "config.json", "model.safetensors", "model.onnx"
EXTRA = ("onnx", "onnxscript", "onnxruntime")
# Largest allowed difference of ONNX logits, as a share of the largest logit (of 1 where all are smaller).
ONNX_TOLERANCE = 1e-4
CHECK_IMAGES = 4
# Class names that the data set itself defines.
LABELS = {
    "digits": tuple("0123456789"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}


@dataclass(frozen=True)
class Exported:
    """What was written, and how far ONNX's logits were from the student's (None without ONNX)."""

    directory: Path
    digest: str  # of the weights' file, SHA-256
    onnx_difference: float | None = None
    onnx_opset: int | None = None


def check_onnx_extra() -> None:
    """`UserError` where packages for ONNX are missing."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--onnx needs {', '.join(missing)}: pip install 'basd[onnx]'")


def export(arm: FinishedArm, target: Path, *, onnx: bool = False, force: bool = False) -> Exported:
    """Write the student of a finished arm to the directory `target`, which is there whole or not at all.

    Before it gets its name the export is loaded by timm into a fresh model, whose logits must be the student's bit for bit.
    `force` replaces an earlier export, and nothing else.
    """
    if onnx:
        check_onnx_extra()
    check_target(target, force)
    student, state = trained_student(arm)
    images = check_images(student)
    with torch.inference_mode():
        wanted = student(images)
    if not bool(torch.isfinite(wanted).all()):
        raise UserError(f"the student of {arm.place} gives logits that are not finite; it is of no use to export it.")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=".export-"))
    try:
        save_file(state, fresh / WEIGHTS)
        digest = hashlib.sha256((fresh / WEIGHTS).read_bytes()).hexdigest()
        config = model_config(arm, student, digest)
        (fresh / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        check_timm(fresh, state, images, wanted)
        difference, opset = write_onnx(student, fresh / ONNX, images) if onnx else (None, None)
        _put(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return Exported(target, digest, difference, opset)


def check_target(target: Path, force: bool) -> None:
    """`UserError` unless `target` is free, or with `force` an earlier export."""
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file; choose another directory with --output DIR.")
    if not any(target.iterdir()):
        return
    try:
        earlier = "basd" in json.loads((target / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        earlier = False
    if not earlier:
        raise UserError(f"{target} holds other files; choose another directory with --output DIR.")
    if not force:
        raise UserError(f"{target} holds an export already; --force replaces it, --output DIR writes elsewhere.")


def trained_student(arm: FinishedArm) -> tuple[VisionTransformer, dict[str, Tensor]]:
    """The student with its trained weights in evaluation mode on the CPU, and these weights."""
    try:
        state = load_file(arm.weights)
    except (SafetensorError, ValueError) as error:
        raise UserError(
            f"the weights of {arm.place} cannot be read ({_first_line(error)}); restore {arm.weights.name} from a copy, or "
            "repeat the arm with basd train --again."
        ) from error
    try:
        config = StudentConfig(**arm.student)
        # whatever calls this keeps its random numbers
        with torch.random.fork_rng(devices=[]):
            student = build_student(config, int(state["head.weight"].shape[0]))
        student.load_state_dict(state)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"the weights of {arm.place} are not those of the student that its configuration describes "
            f"({_first_line(error)}); restore the files from a copy, or repeat the arm with basd train --again."
        ) from error
    return student.eval(), {name: value.contiguous() for name, value in student.state_dict().items()}


def architecture(arm: FinishedArm) -> tuple[str, dict[str, Any]]:
    """timm's name of the architecture and the arguments that differ from its defaults or may do so."""
    student = StudentConfig(**arm.student)
    name = "deit_tiny_distilled_patch16_224" if student.distillation_token else "deit_tiny_patch16_224"
    sizes = {
        "img_size": student.image_size,
        "patch_size": student.patch_size,
        "embed_dim": student.width,
        "depth": student.depth,
        "num_heads": student.heads,
        "mlp_ratio": student.mlp_ratio,
    }
    return name, sizes


def model_config(arm: FinishedArm, student: VisionTransformer, digest: str) -> dict[str, Any]:
    """timm's model configuration (timm.models._hub, as saved for its hub), and under "basd" what timm does not ask for."""
    name, sizes = architecture(arm)
    classes, size = int(student.num_classes), sizes["img_size"]
    labels = LABELS.get(str(arm.data.get("name")))
    mean, std = _statistics(arm, "mean"), _statistics(arm, "std")
    config: dict[str, Any] = {
        "architecture": name,
        "num_classes": classes,
        "num_features": sizes["embed_dim"],
        "global_pool": "token",
        "model_args": sizes,
        **({"label_names": labels} if labels and len(labels) == classes else {}),
        "pretrained_cfg": {
            "num_classes": classes,
            "input_size": [3, size, size],
            "fixed_input_size": True,
            # as the student was evaluated: the central square, bilinear with antialiasing
            "interpolation": "bilinear",
            "crop_pct": float(arm.data.get("eval_crop", 1.0)),
            "crop_mode": "center",
            "mean": mean,
            "std": std,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if arm.student.get("distillation_token") else "head",
        },
        "basd": {
            "class": f"{type(student).__module__}.{type(student).__name__}",
            "args": {**sizes, "num_classes": classes},
            "arm_key": arm.arm_key,
            "repetition": arm.mark,
            "configuration_key": arm.configuration_key,
            "setting": arm.setting,
            "name": arm.name,
            "seed": arm.seed,
            "data": arm.data.get("name"),
            "code_version": arm.version,
            "metrics": {name: value if math.isfinite(value) else str(value) for name, value in arm.metrics.items()},
            "sha256": {WEIGHTS: digest},
        },
    }
    return config


def _statistics(arm: FinishedArm, name: str) -> list[float]:
    """The data's mean or standard deviation, one number a channel."""
    values = arm.data.get(name)
    if not isinstance(values, list) or len(values) != 3 or not all(isinstance(v, int | float) for v in values):
        raise UserError(f"{arm.place} does not say the {name} of its data ({name} should be three numbers).")
    return [float(value) for value in values]


def check_images(model: VisionTransformer, count: int = CHECK_IMAGES) -> Tensor:
    """The same normalised images (count,3,S,S) each time."""
    height, width = model.patch_embed.img_size or (0, 0)
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def check_timm(directory: Path, state: dict[str, Tensor], images: Tensor, wanted: Tensor) -> None:
    """`UserError` unless timm makes of the directory a model with these weights and, bit for bit, these logits."""
    refused = "the export was not written: timm {} makes another model of it ({}); try another version of timm."
    try:
        with torch.random.fork_rng(devices=[]):
            model = timm.create_model(f"local-dir:{directory.absolute()}", pretrained=True).eval()
    except Exception as error:
        raise UserError(refused.format(timm.__version__, _first_line(error))) from error
    loaded = model.state_dict()
    if loaded.keys() != state.keys() or not all(torch.equal(loaded[name], state[name]) for name in state):
        raise UserError(refused.format(timm.__version__, "its weights differ"))
    with torch.inference_mode():
        logits = model(images)
    if not torch.equal(logits, wanted):
        raise UserError(refused.format(timm.__version__, "its logits differ"))


# -- ONNX --------------------------------------------------------------------------------------------------------------


def write_onnx(student: VisionTransformer, path: Path, images: Tensor) -> tuple[float, int]:
    """Write the student as ONNX with a free batch size; returns the largest difference of logits and the opset.

    The difference is over batches of 1, of `images` and of one image more, as a share of the largest logit (of 1 where all
    are smaller); `UserError` where it is over ONNX_TOLERANCE.
    """
    import onnx

    with _quiet():
        try:
            # the example's batch must be neither 0 nor 1, which would be taken for constants
            torch.onnx.export(
                student,
                (images[:2],),
                path,
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                external_data=False,
                verbose=False,
            )
        except Exception as error:
            raise UserError(
                f"torch {torch.__version__} cannot write this student as ONNX ({_first_line(error)})."
            ) from error
    written = onnx.load(path)
    # where each node comes from: lines of source files by their paths on this machine
    for node in (*written.graph.node, *(node for function in written.functions for node in function.node)):
        del node.metadata_props[:]
    onnx.checker.check_model(written)
    onnx.save(written, path)
    opset = max(one.version for one in written.opset_import if one.domain in ("", "ai.onnx"))
    difference = _onnx_difference(student, path, images)
    # not a number is not under the tolerance either
    if not difference <= ONNX_TOLERANCE:
        raise UserError(
            f"the export was not written: ONNX's logits differ from the student's by {difference:.1e} of the largest, more "
            f"than {ONNX_TOLERANCE:.0e}; try another version of torch or onnxruntime, or leave out --onnx."
        )
    return difference, opset


def _onnx_difference(student: VisionTransformer, path: Path, images: Tensor) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    largest = 0.0
    for batch in (images[:1], images, torch.cat([images, images[:1].flip(-1)])):
        (found,) = session.run(["logits"], {"images": batch.numpy()})
        with cpu_threads(1), torch.inference_mode():
            wanted = student(batch)
        if found.shape != tuple(wanted.shape):
            return math.inf
        difference = (torch.from_numpy(found) - wanted).abs().max() / wanted.abs().max().clamp(min=1.0)
        largest = max(largest, float(difference)) if bool(difference.isfinite()) else math.inf
    return largest


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's notes on its own progress are for those who develop it."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# -- files -------------------------------------------------------------------------------------------------------------


def _put(fresh: Path, target: Path) -> None:
    """Give a checked export its place; of an earlier one there nothing stays that could be taken for the new one's."""
    fresh.chmod(0o755)
    for path in fresh.iterdir():
        path.chmod(0o644)
    if not target.exists():
        os.rename(fresh, target)
        return
    # without its configuration timm takes a directory for nothing, so it goes first and comes last
    (target / CONFIG).unlink(missing_ok=True)
    for name in (WEIGHTS, ONNX, CONFIG):
        if (fresh / name).exists():
            os.replace(fresh / name, target / name)
        else:
            (target / name).unlink(missing_ok=True)


def _first_line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]
