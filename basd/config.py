"""The one schema: what an arm is made of, which combinations make sense, and the keys that identify an arm.

No Hydra here: `python -m basd.training ARM.json` rebuilds a configuration on a machine that has only torch and timm.
`basd.compose` turns command-line overrides and presets into these classes.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from basd.components.head_aligners import HEAD_ALIGNERS
from basd.components.losses import LOSSES, TOKEN_LOSSES, LossesConfig, enabled_losses
from basd.components.selectors import SELECTORS
from basd.components.token_aligners import TOKEN_ALIGNERS
from basd.components.warmup import WARMUPS
from basd.components.weighting import WEIGHTINGS
from basd.data import DATASETS
from basd.data.mixing import MIXINGS
from basd.data.views import VIEWS
from basd.errors import UserError
from basd.models.student import StudentConfig, extraction_points
from basd.models.teacher import TEACHERS
from basd.objective import ObjectiveConfig
from basd.training.recipe import RecipeConfig, parse_duration


@dataclass
class RuntimeConfig:
    """How and where an arm runs; none of it changes the result (threads: on one machine type)."""

    # auto: cuda where there is one, else cpu.
    device: str = "auto"
    # CPU threads of one training process. 1 gives the same bits on machines with any number of cores.
    threads: int = field(default=1, metadata={"min": 1})
    # Training processes that `basd grid` starts; 0: one per `threads` cores on CPU, one per GPU.
    processes: int = field(default=0, metadata={"min": 0})
    # Most arms that train side by side on one teacher forward.
    cohort_size: int = field(default=16, metadata={"min": 1})
    # Step metrics are recorded every so many steps.
    log_every: int = field(default=10, metadata={"min": 1})
    # Least seconds between two checkpoints; they are written at epoch ends.
    checkpoint_interval: float = field(default=20.0, metadata={"min": 0.0})
    directory: str = "runs"
    reports: str = "reports"


@dataclass
class TrackingConfig:
    uri: str = "sqlite:///mlflow.db"


@dataclass
class LedgerConfig:
    url: str = "sqlite:///ledger.db"
    # Seconds after which an arm whose owner shows no sign of life is given to another worker.
    grace: float = field(default=120.0, metadata={"min": 1.0})
    # How often a failed arm is tried again.
    retries: int = field(default=1, metadata={"min": 0})


# Fields that hold one of several configurations, told apart by their `name`.
GROUPS: dict[str, dict[str, type]] = {
    "data": DATASETS,
    "teacher": TEACHERS,
    "views": VIEWS,
    "mixing": MIXINGS,
    "selector": SELECTORS,
    "token_aligner": TOKEN_ALIGNERS,
    "head_aligner": HEAD_ALIGNERS,
    "weighting": WEIGHTINGS,
    "warmup": WARMUPS,
}
# Sections that do not change the result and stay out of every key.
NOT_SEMANTIC = ("runtime", "tracking", "ledger", "method")


@dataclass
class Config:
    """A complete configuration with its seed."""

    method: str
    data: Any
    teacher: Any
    student: StudentConfig
    recipe: RecipeConfig
    views: Any
    mixing: Any
    losses: LossesConfig
    selector: Any
    token_aligner: Any
    head_aligner: Any
    weighting: Any
    warmup: Any
    objective: ObjectiveConfig
    seed: int
    runtime: RuntimeConfig
    tracking: TrackingConfig
    ledger: LedgerConfig

    @property
    def enabled(self) -> tuple[str, ...]:
        """Losses that are on."""
        return enabled_losses(self.losses)

    @property
    def points(self) -> tuple[int, ...]:
        return extraction_points(self.student.points, self.student.depth)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def from_dict(values: Mapping[str, Any], *, combinations: bool = True) -> Config:
    """Build and check a configuration; one `UserError` lists everything that is wrong with it.

    Without `combinations` only each field by itself is checked.
    """
    problems: list[str] = []
    config = _build(Config, values, "", problems)
    if not problems and combinations:
        problems = combination_errors(config)
    if problems:
        raise UserError(join_problems(problems))
    return config


def join_problems(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} things do not fit:\n" + "\n".join(f"  - {p}" for p in problems)


def suggest(word: str, choices: typing.Iterable[str]) -> str:
    """The end of a sentence about an unknown word: "; did you mean X? Choices: …" or "; choose one of: …"."""
    choices = sorted(choices)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    listed = ", ".join(choices)
    return f"; did you mean {near[0]}? Choices: {listed}." if near else f"; choose one of: {listed}."


def _build(cls: type, values: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(values, Mapping):
        problems.append(f"{path} must be a section of settings, not {values!r}")
        return None
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            problems.append(f"{_join(path, key)} is not a setting{suggest(str(key), fields)}")
    arguments: dict[str, Any] = {}
    for name, spec in fields.items():
        where = _join(path, name)
        if name not in values:
            if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
                problems.append(f"{where} is missing")
            continue
        value = values[name]
        if cls is Config and name in GROUPS:
            choice = value.get("name") if isinstance(value, Mapping) else value
            if choice not in GROUPS[name]:
                problems.append(f"{where}={choice} is not known{suggest(str(choice), GROUPS[name])}")
            else:
                arguments[name] = _build(GROUPS[name][choice], value, where, problems)
        elif dataclasses.is_dataclass(hints[name]):
            arguments[name] = _build(typing.cast(type, hints[name]), value, where, problems)
        else:
            arguments[name] = _value(value, hints[name], spec.metadata, where, problems)
    return cls(**arguments) if not problems else None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _value(value: Any, hint: Any, metadata: Mapping[str, Any], path: str, problems: list[str]) -> Any:
    kinds = [hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kinds = list(typing.get_args(hint))
    if value is None and type(None) in kinds:
        return None
    kind = next((k for k in kinds if k is not type(None)), hint)
    origin = typing.get_origin(kind)
    if metadata.get("kind") == "points":
        listed = isinstance(value, list | tuple) and value and all(type(v) is int for v in value)
        if not listed and type(value) is not int:
            problems.append(f"{path}={value!r} must be a count of points or a list of block numbers, such as [2,5]")
        return list(value) if listed else value
    if origin is list:
        (inner,) = typing.get_args(kind)
        if not isinstance(value, list | tuple):
            problems.append(f"{path}={value!r} must be a list, such as [{', '.join(['1'] * 2)}]")
            return None
        return [_value(v, inner, metadata, f"{path}[{i}]", problems) for i, v in enumerate(value)]
    if kind is float and type(value) is int:
        value = float(value)
    if kind is not Any and (type(value) is not kind):
        problems.append(f"{path}={value!r} must be {_kind_name(kind)}")
        return None
    choices = metadata.get("choices")
    if choices and value not in choices:
        problems.append(f"{path}={value} is not known{suggest(str(value), choices)}")
    if "min" in metadata and value < metadata["min"]:
        problems.append(f"{path}={value} must be at least {metadata['min']}")
    if "max" in metadata and value > metadata["max"]:
        problems.append(f"{path}={value} must be at most {metadata['max']}")
    if kind is float and value != value:
        problems.append(f"{path} must be a number, not nan")
    return value


def _kind_name(kind: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(kind, str(kind))


def combination_errors(config: Config) -> list[str]:
    """Combinations that cannot train, each in one sentence with the way out; found before any model is built."""
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
    teacher_heads = getattr(config.teacher, "heads", None)
    if "attn" in config.enabled and config.head_aligner.name == "none" and teacher_heads is not None:
        if teacher_heads != config.student.heads:
            problems.append(
                f"head_aligner=none needs equal head counts, but the student has {config.student.heads} and the teacher "
                f"{teacher_heads}; choose head_aligner=conv"
            )
    if not config.enabled and config.method not in METHODS_WITHOUT_LOSSES:
        problems.append(
            f"method={config.method} has every loss off, so nothing is distilled; enable one with "
            "losses.<rsd|rel|attn|spectral>.enabled=true or choose method=ce"
        )
    if not config.enabled and config.objective.ce_weight == 0:
        problems.append("objective.ce_weight=0 with every loss off leaves nothing to train")
    if config.student.image_size != config.data.image_size:
        problems.append(
            f"student.image_size={config.student.image_size} differs from data.image_size={config.data.image_size}; "
            "set one of them to the other"
        )
    for part in (config.data, config.views, config.mixing):
        if hasattr(part, "problems"):
            problems.extend(part.problems())
    problems.extend(duration_errors(config.recipe))
    return problems


METHODS_WITHOUT_LOSSES = ("ce",)


def duration_errors(recipe: RecipeConfig) -> list[str]:
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


# -- keys ------------------------------------------------------------------------------------------------------------


def normalized(config: Config) -> dict[str, Any]:
    """The semantic fields that have an effect in this combination; equal dictionaries → equal results."""
    values = config.to_dict()
    for section in NOT_SEMANTIC:
        del values[section]
    for section in ("student", "recipe"):
        # a preset's name says nothing that its fields do not
        del values[section]["name"]
    enabled = config.enabled
    for name in LOSSES:
        if name not in enabled:
            del values["losses"][name]
        else:
            # what stands is on
            del values["losses"][name]["enabled"]
    tokens = [name for name in enabled if name in TOKEN_LOSSES]
    # where the weights lie is no choice; what they are is in the teacher's fingerprint
    values["teacher"].pop("weights", None)
    if not enabled:
        for section in ("teacher", "selector", "token_aligner", "head_aligner", "weighting", "warmup", "losses"):
            del values[section]
        del values["student"]["points"]
        values["mixing"].pop("targets", None)
    else:
        # a count and the blocks that it means are one choice
        values["student"]["points"] = list(config.points)
        if not tokens:
            del values["token_aligner"]
            for key in ("entropy", "entropy_weight"):
                values["selector"].pop(key, None)
        if values["selector"].get("entropy") == "none":
            values["selector"].pop("entropy_weight", None)
        if values["selector"].get("entropy_weight") == 0:
            values["selector"]["entropy"] = "none"
            values["selector"].pop("entropy_weight")
        if "attn" not in enabled:
            del values["head_aligner"]
        for section in ("starts", "weights"):
            for holder in (values["warmup"], values["weighting"]):
                if section in holder:
                    holder[section] = {name: holder[section][name] for name in enabled}
        if len(enabled) == 1 and config.weighting.name == "uwso":
            # the softmax over one loss is 1
            values["weighting"] = {"name": "equal"}
        if config.weighting.name == "fixed" and all(w == 1.0 for w in values["weighting"]["weights"].values()):
            values["weighting"] = {"name": "equal"}
        if config.warmup.name == "staggered" and all(s == 0.0 for s in values["warmup"]["starts"].values()):
            values["warmup"] = {"name": "simultaneous", "length": config.warmup.length}
        if values["warmup"].get("length") == 0 and values["warmup"]["name"] == "simultaneous":
            values["warmup"] = {"name": "none"}
    return values


def without_effect(config: Config, overridden: typing.Iterable[str]) -> list[str]:
    """Sentences about overridden keys that change nothing in this combination: any other value would do the same."""
    effective = normalized(config)
    notices = []
    for key in overridden:
        section = key.split(".")[0]
        if section in NOT_SEMANTIC or key == "seed" or key.endswith((".enabled", ".weights")):
            continue
        if key in GROUPS:
            idle = section not in effective
        else:
            idle = normalized(_perturbed(config, key)) == effective
        if idle:
            notices.append(f"{key} has no effect in this combination")
    return notices


def remarks(config: Config) -> list[str]:
    """What a person should know of this combination."""
    entropy = getattr(config.selector, "entropy", "none")
    if config.enabled == ("attn",) and entropy != "none":
        return ["with attn alone the selector gets no gradient from a loss, so its entropy term is off"]
    return []


def _perturbed(config: Config, key: str) -> Config:
    """The configuration with another value, not checked, in every leaf at or below a key."""

    def other(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.replace(
                value, **{f.name: other(getattr(value, f.name)) for f in dataclasses.fields(value)}
            )
        if isinstance(value, bool):
            return not value
        if isinstance(value, int | float):
            return value + 1
        return [*value, 1] if isinstance(value, list) else f"{value}'"

    def put(node: Any, path: list[str]) -> Any:
        if not path:
            return other(node)
        return dataclasses.replace(node, **{path[0]: put(getattr(node, path[0]), path[1:])})

    return put(config, key.split("."))


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and leaves of a nested dictionary."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def digest(value: Any) -> str:
    """16 hex digits of the canonical JSON of a value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Keys:
    arm: str
    configuration: str
    cohort: str


def keys_of(config: Config, *, teacher_fingerprint: str, data_fingerprint: str) -> Keys:
    """Keys of an arm. Fingerprints are hashes of the teacher's weights and of the data's content."""
    values = normalized(config)
    seed = values.pop("seed")
    values["data_fingerprint"] = data_fingerprint
    if config.enabled:
        values["teacher_fingerprint"] = teacher_fingerprint
    configuration = digest(values)
    cohort = {
        "data": dataclasses.asdict(config.data),
        "data_fingerprint": data_fingerprint,
        "teacher": dataclasses.asdict(config.teacher),
        "teacher_fingerprint": teacher_fingerprint,
        "batch_size": config.recipe.batch_size,
        "duration": config.recipe.duration,
        "seed": seed,
    }
    return Keys(digest({"configuration": configuration, "seed": seed}), configuration, digest(cohort))


@dataclass(frozen=True)
class FrozenArm:
    """An arm as planned: everything `python -m basd.training` needs, as JSON."""

    arm_key: str
    configuration_key: str
    cohort_key: str
    seed: int
    setting: str
    name: str
    config: dict[str, Any]
    params: dict[str, str]
    version: str
    teacher_fingerprint: str
    data_fingerprint: str
    total_steps: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FrozenArm:
        return cls(**values)
