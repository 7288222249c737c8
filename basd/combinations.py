"""Combinations of settings that cannot train, each in one sentence with the way out; found before any model is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from basd.errors import UserError
from basd.models.teacher import timm_teacher_facts
from basd.objective import demands
from basd.training.recipe import RecipeConfig, parse_duration

if TYPE_CHECKING:
    from basd.config import Config

METHODS_WITHOUT_LOSSES = ("ce",)


def combination_errors(config: Config) -> list[str]:
    """Everything that is wrong with a configuration whose fields are each right by themselves."""
    problems = [*_size_errors(config), *_objective_errors(config)]
    teacher = config.teacher
    if teacher.name == "digits_vit":
        problems.extend(teacher_errors(config, teacher.width, teacher.depth, teacher.heads))
    elif config.enabled:
        problems.extend(_timm_teacher_errors(config))
    wants = demands(config.losses, config.head_aligner)
    # a loss that does not compare places has something to learn from mixed batches too
    skips_all = bool(config.enabled) and wants.of_places == set(config.enabled)
    parts = [config.data, config.views, *([config.mixing] if skips_all else [])]
    for part in parts:
        if hasattr(part, "problems"):
            problems.extend(part.problems())
    problems.extend(_duration_errors(config.recipe))
    problems.extend(_accumulation_errors(config.recipe))
    return problems


def _size_errors(config: Config) -> list[str]:
    problems: list[str] = []
    for what in ("student", "teacher"):
        part = getattr(config, what)
        patch = getattr(part, "patch_size", None)
        if patch is not None and part.image_size % patch:
            problems.append(f"{what}.image_size={part.image_size} is not a multiple of {what}.patch_size={patch}")
        heads = getattr(part, "heads", None)
        if heads is not None and part.width % heads:
            problems.append(f"{what}.width={part.width} does not divide by {what}.heads={heads}")
    if config.teacher.name == "digits_vit" and config.teacher.width % 4:
        problems.append(f"teacher.width={config.teacher.width} must be a multiple of 4, for its sin-cos positions")
    depth = config.student.depth
    points = config.student.points
    if isinstance(points, int) and not 1 <= points <= depth:
        problems.append(f"student.points={points} must be between 1 and the student's {depth} blocks")
    if isinstance(points, list):
        for point in points:
            if not 0 <= point < depth:
                problems.append(
                    f"student.points holds block {point}, but the student's {depth} blocks are 0 to {depth - 1}"
                )
        if len(set(points)) < len(points) or sorted(points) != points:
            problems.append(f"student.points={points} must be increasing, each block once")
    # digits are made of this size; other data is cut to what each model takes
    if config.data.name == "digits" and config.student.image_size != config.data.image_size:
        problems.append(
            f"student.image_size={config.student.image_size} differs from data.image_size={config.data.image_size}; "
            "set one of them to the other"
        )
    return problems


def _objective_errors(config: Config) -> list[str]:
    problems: list[str] = []
    wants = demands(config.losses, config.head_aligner)
    losses = config.losses
    if not config.enabled and config.method not in METHODS_WITHOUT_LOSSES:
        problems.append(
            f"method={config.method} has every loss off, so nothing is distilled; enable one with "
            "losses.<rsd|rel|attn|spectral>.enabled=true or choose method=ce"
        )
    if not config.enabled and config.objective.ce_weight == 0:
        problems.append("objective.ce_weight=0 with every loss off leaves nothing to train")
    weights = getattr(config.weighting, "weights", None)
    if config.enabled and weights is not None and config.objective.ce_weight == 0:
        if all(getattr(weights, name) == 0 for name in config.enabled):
            problems.append(
                "objective.ce_weight=0 and a weight of 0 for every enabled loss leave nothing to train; set one above 0"
            )
    token = config.student.distillation_token
    if token and not (losses.logit.enabled and losses.logit.kind != "kd"):
        problems.append(
            "student.distillation_token=true needs a loss that trains its head; enable losses.logit with kind deit_hard or "
            "deit_soft"
        )
    grid = config.student.image_size // config.student.patch_size
    if grid == 1 and losses.spectral.enabled and losses.spectral.mode != "spatial_mse":
        problems.append(
            f"losses.spectral.mode={losses.spectral.mode} needs more than one patch, but the student's grid is 1x1; choose a "
            "smaller student.patch_size or losses.spectral.mode=spatial_mse"
        )
    if losses.rel.enabled:
        problems.extend(_relation_errors(config, grid**2))
    if wants.maps and wants.all_layers and not wants.trains_selector and config.selector.learned:
        problems.append(
            f"head_aligner={config.head_aligner.name} compares with every teacher layer by itself, so with attn alone "
            f"selector={config.selector.name} has nothing to select; choose selector=uniform"
        )
    return problems


def _relation_errors(config: Config, patches: int) -> list[str]:
    rel = config.losses.rel
    if rel.vertices == "logits":
        problems = []
        if config.views.name == "single":
            problems.append(
                "losses.rel.vertices=logits compares two views, but views=single has one; choose views=dual"
            )
        if rel.edge != "unit_difference":
            problems.append(
                f"losses.rel.edge={rel.edge} has no effect on losses.rel.vertices=logits, whose edges are unit differences; "
                "choose losses.rel.vertices=tokens or losses.rel.edge=unit_difference"
            )
        if rel.inter_sample_weight == rel.inter_class_weight == 0:
            problems.append(
                "losses.rel.inter_sample_weight and losses.rel.inter_class_weight are both 0, so nothing is compared; set one "
                "above 0"
            )
        return problems
    if rel.vertices == "tokens" and patches == 1:
        return [
            "losses.rel.vertices=tokens needs more than one patch, but the student's grid is 1x1; choose a smaller "
            "student.patch_size or losses.rel.vertices=pooled"
        ]
    images = config.recipe.batch_size // config.recipe.accumulation
    what, vertices = ("patches", patches) if rel.vertices == "tokens" else ("images", images)
    pairs = vertices * (vertices - 1) // 2
    if rel.pairs == "random" and rel.num_pairs > pairs:
        return [
            f"losses.rel.num_pairs={rel.num_pairs} is more than the {pairs} pairs of {vertices} {what}; lower it or choose "
            "losses.rel.pairs=all"
        ]
    return []


def teacher_errors(config: Config, width: int, depth: int, heads: int) -> list[str]:
    """What does not fit a teacher of these sizes."""
    problems: list[str] = []
    wants = demands(config.losses, config.head_aligner)
    if wants.maps and config.head_aligner.name == "none" and heads != config.student.heads:
        problems.append(
            f"head_aligner=none needs equal head counts, but the student has {config.student.heads} and the teacher "
            f"{heads}; choose head_aligner=conv"
        )
    rsd = config.losses.rsd
    if rsd.enabled and rsd.projector == "none" and width != config.student.width:
        problems.append(
            f"losses.rsd.projector=none needs equal widths, but the student's is {config.student.width} and the teacher's "
            f"{width}; choose losses.rsd.projector=linear"
        )
    layer = getattr(config.selector, "layer", None)
    if wants.selector and layer is not None and not 0 <= layer < depth:
        problems.append(
            f"selector.layer={layer} is not a block of the teacher, whose {depth} blocks are 0 to {depth - 1}"
        )
    return problems


def _timm_teacher_errors(config: Config) -> list[str]:
    """As `teacher_errors`, and a head that is asked for where none can be; from the model's structure, without weights."""
    teacher = config.teacher
    try:
        shape, headless = timm_teacher_facts(teacher.model, teacher.image_size)
    except UserError as error:
        return [str(error).rstrip(".")]
    problems = teacher_errors(config, shape.width, shape.depth, shape.heads)
    if (
        demands(config.losses, config.head_aligner).logits
        and teacher.head == "own"
        and teacher.weights_file is None
        and headless
    ):
        problems.append(
            f"teacher.head=own needs a classification head, but {teacher.model} has none; choose teacher.head=probe"
        )
    return problems


def _duration_errors(recipe: RecipeConfig) -> list[str]:
    problems = []
    for key in ("duration", "lr_warmup"):
        try:
            # only a length within training can be a part of it
            whole = 1000 if key == "lr_warmup" else None
            steps = parse_duration(getattr(recipe, key), steps_per_epoch=100, total_steps=whole)
            if key == "duration" and steps < 1:
                problems.append(f"recipe.{key}={getattr(recipe, key)} must be at least one step")
        except ValueError as error:
            problems.append(f"recipe.{key}: {error}")
    return problems


def _accumulation_errors(recipe: RecipeConfig) -> list[str]:
    # each part holds pairs of images, so that mixing partners stay together
    if recipe.accumulation == 1 or recipe.batch_size % (2 * recipe.accumulation) == 0:
        return []
    return [
        f"recipe.batch_size={recipe.batch_size} cannot be split into recipe.accumulation={recipe.accumulation} parts of whole "
        f"pairs of images; choose a batch that is a multiple of {2 * recipe.accumulation}"
    ]
