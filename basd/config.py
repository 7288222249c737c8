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

from basd.combinations import combination_errors
from basd.components.head_aligners import HEAD_ALIGNERS
from basd.components.losses import LOSSES, LossesConfig, enabled_losses
from basd.components.selectors import SELECTORS
from basd.components.token_aligners import TOKEN_ALIGNERS
from basd.components.warmup import WARMUPS
from basd.components.weighting import WEIGHTINGS
from basd.data import DATASETS
from basd.data.mixing import MIXINGS
from basd.data.settings import runtime_fields, semantic
from basd.data.views import VIEWS
from basd.errors import UserError
from basd.models.student import StudentConfig, extraction_points
from basd.models.teacher import TEACHERS
from basd.objective import Demands, ObjectiveConfig, demands
from basd.training.recipe import RecipeConfig


@dataclass
class RuntimeConfig:
    """How and where an arm runs; none of it changes the result (threads: on one machine type)."""

    # auto: cuda where there is one, else cpu.
    device: str = "auto"
    # CPU threads of one training process. 1 gives the same bits on machines with any number of cores.
    threads: int = field(default=1, metadata={"min": 1})
    # Number format of forward passes: auto is bf16 on CUDA devices that have it, else fp32. Losses are float32 in each.
    precision: str = field(default="auto", metadata={"choices": ("auto", "fp32", "bf16", "fp16")})
    # torch.compile of teacher and student: auto is on for CUDA.
    compile: str = field(default="auto", metadata={"choices": ("auto", "on", "off")})
    # Processes that decode images beside each training process, for data on disk; 0: it does so itself, -1: as many as the
    # cores allow.
    workers: int = field(default=-1, metadata={"min": -1})
    # Training processes that `basd grid` starts; 0: one per `threads` cores on CPU, one per GPU. Where there
    # are more of them than GPUs, they share those.
    processes: int = field(default=0, metadata={"min": 0})
    # Most arms that train side by side on one teacher forward.
    cohort_size: int = field(default=16, metadata={"min": 1})
    # Step metrics are recorded every so many steps.
    log_every: int = field(default=10, metadata={"min": 1})
    # Whether the bias probes describe an arm at its end: `probe/*`.
    probes: bool = True
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
    def demands(self) -> Demands:
        """What the enabled losses read."""
        return demands(self.losses, self.head_aligner)

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
    config = build(Config, values, "", problems)
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


def build(cls: type, values: Any, path: str, problems: list[str]) -> Any:
    """A dataclass from a section of settings, each field checked; what is wrong is added to `problems`."""
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
                arguments[name] = build(GROUPS[name][choice], value, where, problems)
        elif dataclasses.is_dataclass(hints[name]):
            arguments[name] = build(typing.cast(type, hints[name]), value, where, problems)
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


# -- keys ------------------------------------------------------------------------------------------------------------


def normalized(config: Config) -> dict[str, Any]:
    """The semantic fields that have an effect in this combination; equal dictionaries → equal results."""
    values = config.to_dict()
    for section in NOT_SEMANTIC:
        del values[section]
    for key in runtime_fields(config.data):
        del values["data"][key]
    for section in ("student", "recipe"):
        # a preset's name says nothing that its fields do not
        del values[section]["name"]
    _drop_defaults(values["recipe"], config.recipe, ("accumulation", "ema_decay"))
    wants = config.demands
    for name in LOSSES:
        if name not in wants.enabled:
            del values["losses"][name]
        else:
            # what stands is on
            del values["losses"][name]["enabled"]
            _drop_idle(values["losses"][name], getattr(config.losses, name))
    logit = values["losses"].get("logit", {})
    if logit.get("kind") == "deit_soft" and not config.student.distillation_token:
        # there is only the class head
        logit["kind"] = "kd"
    # where weights lie and how positions were moved is no choice of its own: the teacher's fingerprint says what came of it
    for key in ("weights", "position_interpolation"):
        values["teacher"].pop(key, None)
    if not wants.logits:
        values["teacher"].pop("head", None)
    if wants.trains_selector:
        _drop_defaults(values["objective"], config.objective, ("target_norm",))
    else:
        # nothing reads a mixture of tokens
        del values["objective"]["target_norm"]
    unused = {
        "teacher": not wants.teacher,
        "selector": not wants.selector,
        "token_aligner": not wants.token_aligner,
        "head_aligner": not wants.maps,
        "weighting": not wants.enabled,
        "warmup": not wants.enabled,
        "losses": not wants.enabled,
    }
    for section, idle in unused.items():
        if idle:
            del values[section]
        elif section != "losses":
            _drop_idle(values[section], getattr(config, section))
    _drop_idle(values["views"], config.views)
    _normalize_mixing(values, wants)
    if wants.points:
        # a count and the blocks that it means are one choice
        values["student"]["points"] = list(config.points)
    else:
        del values["student"]["points"]
    if wants.token_aligner and not wants.projections and config.token_aligner.student_mlp:
        # nothing reads the student's MLP, and the teacher's side is that of `interpolate`
        values["token_aligner"]["name"] = "interpolate"
    if wants.maps and len(config.points) == 1:
        # the heads of all points are those of the point
        values["head_aligner"].pop("stack", None)
    if wants.selector:
        _normalize_selector(values["selector"], wants)
    if wants.enabled:
        _normalize_schedule(values, config)
    return values


def _drop_defaults(values: dict[str, Any], config: Any, names: tuple[str, ...]) -> None:
    """Take out settings that came later and do nothing at their default, so that keys of older arms stay theirs."""
    for spec in dataclasses.fields(config):
        if spec.name in names and values[spec.name] == spec.default:
            del values[spec.name]


def _drop_idle(values: dict[str, Any], config: Any) -> None:
    """Take out the fields that a component's configuration names as without effect beside its others (`idle`)."""
    for key in getattr(config, "idle", ()):
        values.pop(key, None)


def _normalize_mixing(values: dict[str, Any], wants: Demands) -> None:
    mixing = values["mixing"]
    if mixing.get("probability") == 0:
        values["mixing"] = {"name": "none"}
        return
    if mixing.get("switch") in (0, 1):
        kind, other = ("cutmix", "mixup") if mixing["switch"] == 1 else ("mixup", "cutmix")
        del mixing["switch"], mixing[f"{other}_alpha"]
        mixing["name"] = kind
    if not wants.enabled:
        mixing.pop("targets", None)
    elif mixing.get("targets") == "skip" and not wants.of_places:
        # only losses that compare places are left out
        mixing["targets"] = "follow"


def _normalize_selector(selector: dict[str, Any], wants: Demands) -> None:
    if not wants.trains_selector:
        selector.pop("entropy", None)
        selector.pop("entropy_weight", None)
    if selector.get("entropy_weight") == 0:
        selector["entropy"] = "none"
    if selector.get("entropy") == "none":
        selector.pop("entropy_weight", None)


def _normalize_schedule(values: dict[str, Any], config: Config) -> None:
    """Weighting and warmup: what does not concern an enabled loss goes, and equal schedules get one form."""
    enabled = config.enabled
    for section in ("starts", "weights"):
        for holder in (values["warmup"], values["weighting"]):
            if section in holder:
                holder[section] = {name: holder[section][name] for name in enabled}
    if config.warmup.name == "staggered" and all(s == 0.0 for s in values["warmup"]["starts"].values()):
        values["warmup"] = {"name": "simultaneous", "length": config.warmup.length}
    if values["warmup"].get("length") == 0 and values["warmup"]["name"] == "simultaneous":
        values["warmup"] = {"name": "none"}
    _normalize_weighting(values, config)


def _normalize_weighting(values: dict[str, Any], config: Config) -> None:
    weighting, name, alone = values["weighting"], config.weighting.name, len(config.enabled) == 1
    scale = weighting.get("scale")
    if alone and scale == "first_mean":
        scale = weighting["scale"] = "first"
    ones = name == "fixed" and all(w == 1.0 for w in weighting["weights"].values())
    if alone and (name == "uwso" or (name == "uwo" and weighting["total"] != "none")):
        # weights that sum to one or to the number of losses
        values["weighting"] = {"name": "equal", "scale": "none"}
    elif ones or (alone and name in ("dwa", "rlw", "gls")):
        values["weighting"] = {"name": "equal", "scale": scale}
    elif values["warmup"]["name"] == "none" and (
        not config.demands.maps or getattr(config.head_aligner, "decay", 1.0) == 1.0
    ):
        # without ramps nothing is ramped before or after
        weighting.pop("order", None)


def without_effect(config: Config, overridden: typing.Iterable[str]) -> list[str]:
    """Sentences about overridden keys that change nothing in this combination: any other value would do the same."""
    effective = normalized(config)
    notices = []
    for key in overridden:
        section = key.split(".")[0]
        if section == "data" and key.split(".")[-1] in runtime_fields(config.data):
            continue
        if (
            section in NOT_SEMANTIC
            or key == "seed"
            or key.endswith((".enabled", ".weights", ".position_interpolation"))
        ):
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
    wants = config.demands
    entropy = getattr(config.selector, "entropy", "none")
    if wants.selector and not wants.trains_selector and entropy != "none":
        return ["with attn alone the selector gets no gradient from a loss, so its entropy term is off"]
    return []


def _perturbed(config: Config, key: str) -> Config:
    """The configuration with another value, not checked, in every leaf at or below a key."""

    def other(value: Any, choices: tuple = ()) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            changed = {
                f.name: other(getattr(value, f.name), f.metadata.get("choices", ())) for f in dataclasses.fields(value)
            }
            return dataclasses.replace(value, **changed)
        if choices:
            return next(choice for choice in choices if choice != value)
        if isinstance(value, bool):
            return not value
        if isinstance(value, int | float):
            return value + 1
        return [*value, 1] if isinstance(value, list) else f"{value}'"

    def put(node: Any, path: list[str], choices: tuple = ()) -> Any:
        if not path:
            return other(node, choices)
        (spec,) = (f for f in dataclasses.fields(node) if f.name == path[0])
        changed = put(getattr(node, path[0]), path[1:], spec.metadata.get("choices", ()))
        return dataclasses.replace(node, **{path[0]: changed})

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
        "data": semantic(config.data),
        "data_fingerprint": data_fingerprint,
        "teacher": dataclasses.asdict(config.teacher),
        "teacher_fingerprint": teacher_fingerprint,
        "batch_size": config.recipe.batch_size,
        "duration": config.recipe.duration,
        "seed": seed,
    }
    # what fixes the teacher's forward beside these; only where it is chosen, so that older plans keep their cohorts
    shared = {
        "accumulation": (config.recipe.accumulation, 1),
        "precision": (config.runtime.precision, "auto"),
        "compile": (config.runtime.compile, "auto"),
    }
    cohort.update({name: value for name, (value, default) in shared.items() if value != default})
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
    # what only people read: images of train, validation and test, and classes; words of the command line that made the setting
    data_sizes: dict[str, int] = field(default_factory=dict)
    setting_words: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FrozenArm:
        return cls(**values)
