"""Teachers and their heads made ready: built, fitted on first use under a file lock, cached, named by a hash of weights."""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from basd.config import FrozenArm, digest
from basd.data.disk import DiskImages
from basd.data.feed import Wanted, crop_batches, evaluation_batches, worker_count
from basd.data.images import ImageSet, ImageSource, Splits, epoch_order, fingerprint
from basd.data.settings import semantic
from basd.data.views import clean_view, draw_crops, normalize, resized
from basd.errors import UserError
from basd.evaluation.classification import classification_metrics, predict_batches
from basd.models.checkpoints import check_fit, native_size, read_checkpoint
from basd.models.teacher import DigitsViTConfig, build_digits_vit, build_timm_teacher
from basd.training import random_streams as streams
from basd.training.checkpoint import sync_directory
from basd.training.device import cpu_threads
from basd.training.probes import L2_STRENGTHS, check_labels, empty_probe, fit_probe
from basd.training.recipe import learning_rate

# the splits that a fitted teacher is scored on; its settings are chosen on the first
_SCORED = ("validation", "test")
# what is kept beside cached weights: figures, None where one was not measured, and the weights' fingerprint
Facts = dict[str, Any]


@dataclass
class PreparedTeacher:
    """A teacher's model (eval mode, CPU), the hash of its weights, its accuracies where it has a head, its file.

    `path`: the file its weights come from, given by `teacher.weights` or cached; None for the hub's and random ones.
    """

    model: VisionTransformer
    fingerprint: str
    validation_top1: float | None
    test_top1: float | None
    path: Path | None
    fitted_now: bool = False

    @property
    def accuracy(self) -> str:
        """For people: top-1 on the splits it was scored on."""
        return _accuracy(self.validation_top1, self.test_top1)


@dataclass(frozen=True)
class HeadFacts:
    """What a teacher's head is: its own, or a linear probe; the hash of its weights, and what is known of its accuracy."""

    kind: Literal["own", "probe"]
    fingerprint: str
    validation_top1: float | None
    test_top1: float | None
    # of a probe: chosen strength of L2, its file, and whether this call fitted it
    l2: float | None = None
    path: Path | None = None
    fitted_now: bool = False

    @property
    def description(self) -> str:
        """For people: "linear probe, L2 0.001, validation top-1 …, test top-1 …"."""
        what = "own head" if self.kind == "own" else f"linear probe, L2 {self.l2:g}"
        return f"{what}, {_accuracy(self.validation_top1, self.test_top1)}"


def _accuracy(validation_top1: float | None, test_top1: float | None) -> str:
    scores = [("validation", validation_top1), ("test", test_top1)]
    known = [f"{part} top-1 {100 * value:.2f} %" for part, value in scores if value is not None]
    return ", ".join(known) or "accuracy not measured"


def cache_directory() -> Path:
    """$BASD_CACHE, or `basd` in the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "basd"
    return Path(os.environ.get("BASD_CACHE") or default)


def weights_fingerprint(model: torch.nn.Module) -> str:
    """16 hex digits of the names and values of a model's state."""
    hasher = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()[:16]


def check_fingerprint(prepared: PreparedTeacher, arm: FrozenArm) -> None:
    """`UserError` where the teacher of this process is not the one that was planned."""
    if prepared.fingerprint != arm.teacher_fingerprint:
        raise UserError(
            f"the teacher's weights here ({prepared.fingerprint}) are not those of the plan ({arm.teacher_fingerprint}); "
            "plan again, or restore the teacher with BASD_CACHE or teacher.weights."
        )


def statistics_of(teacher: Any, data: Any) -> tuple[list[float], list[float]]:
    """Channel mean and standard deviation the teacher's input is normalised with."""
    owner = teacher if hasattr(teacher, "mean") else data
    return owner.mean, owner.std


def prepare_teacher(
    teacher: Any,
    data: Any,
    splits: Splits,
    progress: Callable[[int, int], None] | None = None,
    logits: bool = True,
) -> PreparedTeacher:
    """The teacher that a configuration names, with its own head where it has a fitting one; `logits`: whether they are read.

    `progress(step, steps)` is called while one is fitted.
    """
    if isinstance(teacher, DigitsViTConfig):
        return _digits_vit(teacher, data, splits, progress)
    with streams.isolated(0, streams.TEACHER_INIT):
        model = build_timm_teacher(teacher, splits.train.classes, logits)
    return PreparedTeacher(model.eval(), weights_fingerprint(model), None, None, teacher.weights_file)


def _cache_path(config: DigitsViTConfig, data: Any, splits: Splits) -> Path:
    key = digest({"teacher": dataclasses.asdict(config), "data": semantic(data), "content": fingerprint(splits)})
    return cache_directory() / "teachers" / f"digits_vit-{key}.safetensors"


def cached_teacher(config: DigitsViTConfig, data: Any, splits: Splits) -> Path | None:
    """Where the fitted teacher lies, or None if it was not fitted yet."""
    path = config.weights_file or _cache_path(config, data, splits)
    return path if path.exists() else None


def _digits_vit(
    config: DigitsViTConfig, data: Any, splits: Splits, progress: Callable[[int, int], None] | None
) -> PreparedTeacher:
    with streams.isolated(config.seed, streams.TEACHER_FIT):
        model = build_digits_vit(config, splits.train.classes)
    if config.weights_file is not None:
        _load_given(model, config.weights_file, config)
        return PreparedTeacher(model.eval(), weights_fingerprint(model), None, None, config.weights_file)
    path = _cache_path(config, data, splits)

    def fit() -> Facts:
        fit_classifier(model, config, data, splits.train, progress)
        return {f"{part}_top1": top1(model, config, data, getattr(splits, part)) for part in _SCORED}

    facts, fitted_now = _fitted_once(path, model, fit, ("validation_top1",))
    validation, test = (facts.get(f"{part}_top1") for part in _SCORED)
    return PreparedTeacher(model.eval(), weights_fingerprint(model), validation, test, path, fitted_now)


def prepare_head(
    prepared: PreparedTeacher,
    teacher: Any,
    data: Any,
    splits: Splits,
    progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """The teacher's classification head: features (B, D_t) → logits (B, C), float32; frozen, eval mode, CPU.

    Its own where `prepared` has one; otherwise a linear probe, fitted on the training split once for every combination of
    teacher weights, data and image size, and cached. `UserError` where a probe is needed and the data has no labels.
    """
    return _head(prepared, teacher, data, splits, progress)[0]


def head_facts(
    prepared: PreparedTeacher,
    teacher: Any,
    data: Any,
    splits: Splits,
    progress: Callable[[int, int], None] | None = None,
) -> HeadFacts:
    """What `prepare_head` gives with the same arguments, in figures; a probe that is not there yet is fitted."""
    return _head(prepared, teacher, data, splits, progress)[1]


def _head(
    prepared: PreparedTeacher,
    teacher: Any,
    data: Any,
    splits: Splits,
    progress: Callable[[int, int], None] | None,
) -> tuple[nn.Module, HeadFacts]:
    model = prepared.model
    if model.num_classes > 0:
        # a copy: moving or casting the one leaves the other alone
        own = copy.deepcopy(model.head).cpu().float().eval().requires_grad_(False)
        return own, HeadFacts("own", weights_fingerprint(own), prepared.validation_top1, prepared.test_top1)
    check_labels(splits)
    statistics, share = statistics_of(teacher, data), getattr(data, "eval_crop", 1.0)
    key = digest(
        {
            "teacher": [teacher.architecture, prepared.fingerprint],
            "content": fingerprint(splits),
            # the whole central square is how views began
            "view": [teacher.image_size, *statistics, *([share] if share != 1 else [])],
            "l2": L2_STRENGTHS,
        }
    )
    path = cache_directory() / "probes" / f"{teacher.architecture}-{key}.safetensors"
    head = empty_probe(model.num_features, splits.train.classes)

    def fit() -> Facts:
        probe = fit_probe(model, splits, teacher.image_size, statistics, progress, share)
        head.load_state_dict(probe.head.state_dict())
        return {"l2": probe.l2, "validation_top1": probe.validation_top1, "test_top1": probe.test_top1}

    facts, fitted_now = _fitted_once(path, head, fit, ("l2", "validation_top1"))
    scores = (facts.get("validation_top1"), facts.get("test_top1"))
    return head, HeadFacts("probe", weights_fingerprint(head), *scores, facts["l2"], path, fitted_now)


def _fitted_once(
    path: Path, module: nn.Module, fit: Callable[[], Facts], figures: tuple[str, ...]
) -> tuple[Facts, bool]:
    """Weights of `module` from the cache, or from `fit()`, which sets them in place and returns facts to keep beside them.

    `fit()` runs on one CPU thread, so that machines with any number of cores fit the same weights. Processes that ask at the
    same time wait for the one that fits. `figures`: the facts that must be numbers. Returns the facts and whether this call
    fitted.
    """
    folder, beside = path.parent, path.with_suffix(".json")
    try:
        # both are renamed into place, so what is there is whole: no lock, and a cache that is only readable serves
        if path.exists() and beside.exists():
            return _cached(path, module, figures), False
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            if path.exists() and beside.exists():
                return _cached(path, module, figures), False
            # the weights must not depend on the number of cores; who asks may compute without gradients
            with cpu_threads(1), torch.enable_grad():
                facts = fit()
            # facts of other weights must never stand beside these
            beside.unlink(missing_ok=True)
            _put(path, save(module.state_dict()))
            _put(beside, json.dumps({**facts, "weights": weights_fingerprint(module)}).encode())
            return facts, True
    except OSError as error:
        raise UserError(
            f"the cache directory {folder} cannot be used ({error.strerror}); set BASD_CACHE to one that can be read and "
            "written."
        ) from error


def _cached(path: Path, module: nn.Module, figures: tuple[str, ...]) -> Facts:
    """Load cached weights; returns the facts beside them, as `_fitted_once`."""
    beside = path.with_suffix(".json")
    try:
        facts = json.loads(beside.read_bytes())
        if not isinstance(facts, dict) or any(facts.get(name) is None for name in figures):
            raise ValueError(figures)
        for name, value in facts.items():
            if value is not None and type(value) is not (str if name == "weights" else float):
                raise ValueError(name)
    except ValueError as error:
        raise UserError(f"{beside} is damaged; remove it, and its weights are fitted again.") from error
    _load_into(module, path)
    # files from before the fingerprint was kept have none
    if facts.get("weights") not in (None, weights_fingerprint(module)):
        raise UserError(f"{path} is damaged; remove it, and its weights are fitted again.")
    return facts


def _put(path: Path, content: bytes) -> None:
    """Written aside, synced, renamed: a file of this name is whole, whenever the machine stops."""
    fresh = path.with_name(f"{path.name}.tmp")
    with open(fresh, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    sync_directory(path.parent)


def _load_given(model: VisionTransformer, path: Path, config: DigitsViTConfig) -> None:
    """The weights of a file that the user names; `UserError` unless they are of exactly this model."""
    checkpoint = read_checkpoint(path)
    way_out = "correct teacher.weights, or the teacher's sizes"
    check_fit(checkpoint, model, config.name, way_out)
    size = native_size(checkpoint, model)
    if size != config.image_size:
        raise UserError(
            f"teacher.weights={path} is for {size} pixels, but teacher.image_size={config.image_size}; {way_out}."
        )
    model.load_state_dict(checkpoint.state)


def _load_into(module: nn.Module, path: Path) -> None:
    """Weights that BASD cached itself."""
    what = "teacher" if isinstance(module, VisionTransformer) else "linear probe"
    try:
        module.load_state_dict(load_file(path))
    except Exception as error:
        raise UserError(
            f"{path} does not hold the weights of this {what} (damaged, or of another size); remove the file."
        ) from error


@contextmanager
def _locked(path: Path):
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fit_classifier(
    model: VisionTransformer,
    config: DigitsViTConfig,
    data: Any,
    train: ImageSource,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Train the teacher on the training images for a fixed number of epochs; nothing else is looked at."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    train = train.to(device)
    batches = len(train) // config.batch_size
    total = batches * config.epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    for step, (view, labels) in enumerate(_fitting_views(train, config, data)):
        epoch = step // batches
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, math.ceil(0.1 * total), config.lr, config.lr * 0.01)
        model.train()
        with streams.isolated(config.seed, streams.TEACHER_FIT, epoch, step):
            loss = F.cross_entropy(model(normalize(view, data.mean, data.std)), labels, label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if progress is not None:
            progress(step + 1, total)
    model.zero_grad(set_to_none=True)
    model.eval().cpu()


def _fitting_views(train: ImageSource, config: DigitsViTConfig, data: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Random crops (B, 3, S, S) in [0, 1] and labels of every step of `fit_classifier`."""

    def steps() -> Iterator[tuple[Tensor, torch.Generator]]:
        step = 0
        for epoch in range(config.epochs):
            order = streams.generator(config.seed, streams.TEACHER_ORDER, epoch)
            for indices in epoch_order(len(train), config.batch_size, order):
                yield indices, streams.generator(config.seed, streams.TEACHER_VIEW, epoch, step)
                step += 1

    if isinstance(train, ImageSet):
        for indices, generator in steps():
            images, labels = train.batch(indices)
            yield clean_view(images, data, config.image_size, generator)[0], labels
        return
    assert isinstance(train, DiskImages), type(train)
    wanted = (Wanted(indices, draw_crops(len(indices), generator)) for indices, generator in steps())
    for crops in crop_batches(train, wanted, config.batch_size, worker_count(-1, train.device)):
        yield resized(crops.images, config.image_size), crops.labels


def top1(model: VisionTransformer, config: DigitsViTConfig, data: Any, images: ImageSource) -> float:
    """Top-1 of a fitted teacher on a split, in [0, 1]."""

    def forward(view: Tensor) -> Tensor:
        return model(normalize(view, data.mean, data.std))

    cpu = torch.device("cpu")
    share = getattr(data, "eval_crop", 1.0)
    views = evaluation_batches(images, config.image_size, share, 256, cpu, worker_count(-1, cpu))
    logits, labels = predict_batches(forward, views)
    return classification_metrics(logits[labels >= 0], labels[labels >= 0])["top1"]
