"""Hydra composition: presets and command-line overrides → a checked `Config`, with readable errors."""

from __future__ import annotations

import copy
import dataclasses
import importlib.resources
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from basd.components.losses import LossesConfig
from basd.config import (
    GROUPS,
    NOT_SEMANTIC,
    Config,
    LedgerConfig,
    RuntimeConfig,
    TrackingConfig,
    digest,
    flatten,
    from_dict,
    join_problems,
    suggest,
)
from basd.data.settings import semantic
from basd.errors import UserError
from basd.models.student import StudentConfig
from basd.objective import ObjectiveConfig
from basd.training.recipe import RecipeConfig

# Groups whose options are YAML presets on top of a schema.
PRESET_GROUPS = ("data", "teacher", "student", "recipe", "method")
# Groups that make up the setting.
SETTING_GROUPS = ("data", "teacher", "student", "recipe")
# Sections of what Hydra composes that are not settings.
INSIDE = ("hydra", "preset")


@dataclass
class _Schema:
    """Typed sections of the root; each group puts its own dataclass into its place."""

    data: Any = None
    teacher: Any = None
    student: Any = None
    recipe: Any = None
    views: Any = None
    mixing: Any = None
    selector: Any = None
    token_aligner: Any = None
    head_aligner: Any = None
    weighting: Any = None
    warmup: Any = None
    method: str = "basd"
    # What a method sets of the exchangeable parts above: see `_apply_preset`.
    preset: Any = None
    losses: LossesConfig = field(default_factory=LossesConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    ledger: LedgerConfig = field(default_factory=LedgerConfig)
    seed: int = 0


@lru_cache(maxsize=1)
def register() -> None:
    """Put every component's dataclass into Hydra's ConfigStore, once a process."""
    store = ConfigStore.instance()
    store.store(name="schema", node=_Schema, replace=True)
    for group, options in GROUPS.items():
        for name, node in options.items():
            place = f"schema/{group}" if group in PRESET_GROUPS else group
            store.store(group=place, name=name, node=node, replace=True)
    store.store(group="schema/student", name="vit", node=StudentConfig, replace=True)
    store.store(group="schema/recipe", name="adamw", node=RecipeConfig, replace=True)


@lru_cache(maxsize=1)
def group_choices() -> dict[str, list[str]]:
    """Options of every group, as the command line takes them."""
    choices = {group: sorted(options) for group, options in GROUPS.items()}
    for group in PRESET_GROUPS:
        folder = importlib.resources.files("basd.conf") / group
        choices[group] = sorted(Path(str(f.name)).stem for f in folder.iterdir() if f.name.endswith(".yaml"))
    return choices


@dataclass(frozen=True)
class Composed:
    config: Config
    # Group options as chosen: {"data": "digits", "teacher": "digits_vit", …}
    choices: dict[str, str]


def compose(overrides: Sequence[str] = (), *, combinations: bool = True) -> Composed:
    """The configuration that presets and overrides describe; one `UserError` lists everything that is wrong.

    Without `combinations` each field is checked, but not whether they fit together.
    """
    return _composed(tuple(overrides), combinations)


@lru_cache(maxsize=256)
def _composed(overrides: tuple[str, ...], combinations: bool) -> Composed:
    register()
    problems = _form_problems(overrides)
    if not problems:
        try:
            composed = _compose(overrides)
        except UserError as error:
            # Hydra stops at the first error and speaks of its own insides; look at each override by itself
            problems = _override_problems(overrides) or [str(error)]
    if problems:
        raise UserError(join_problems(problems))
    values, choices = composed
    plain = {str(key): _plain_values(values[key]) for key in values if key not in INSIDE}
    return Composed(from_dict(plain, combinations=combinations), dict(choices))


def _plain_values(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def _compose(overrides: Sequence[str]) -> tuple[DictConfig, dict[str, str]]:
    """What Hydra composes, and the option chosen of each group."""
    groups = tuple(text for text in overrides if _chooses_a_group(text))
    try:
        base, choices = _compose_groups(groups)
        composed = copy.deepcopy(base)
        for one in (_parsed(text) for text in overrides if text not in groups):
            OmegaConf.update(composed, one.key_or_group, one.value(), merge=True)
        _apply_preset(composed, overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_plain(error)) from error
    return composed, choices


def _chooses_a_group(text: str) -> bool:
    """Whether Hydra must compose anew for an override; it takes all others after that, one by one."""
    one = _parsed(text)
    key = one.key_or_group
    return "/" in key or key.split(".")[0] == "hydra" or (key in group_choices() and not isinstance(one.value(), dict))


@lru_cache(maxsize=64)
def _compose_groups(overrides: tuple[str, ...]) -> tuple[DictConfig, dict[str, str]]:
    """A composition that takes Hydra a tenth of a second; callers copy what they change."""
    GlobalHydra.instance().clear()
    with initialize_config_module("basd.conf", job_name="basd"):
        composed = hydra_compose("config", overrides=list(overrides), return_hydra_config=True)
    choices = {str(key): str(value) for key, value in composed.hydra.runtime.choices.items() if "/" not in str(key)}
    base = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
    # a wrong key is an error, not a new setting
    OmegaConf.set_struct(base, True)
    return base, choices


def _apply_preset(composed: Any, overrides: Sequence[str]) -> None:
    """Set what the method's preset says of its parts.

    An override of the same setting goes before it, and a part that was chosen in place of the preset's own keeps its
    defaults where it has no such setting.
    """
    said = tuple(overridden_keys(overrides))
    for key, value in flatten(_plain_values(composed.preset) or {}):
        known = OmegaConf.select(composed, key, throw_on_missing=False) is not None
        if known and not any(key == one or key.startswith(f"{one}.") for one in said if "." in one):
            OmegaConf.update(composed, key, value)


def _plain(error: Exception) -> str:
    """Hydra's message without its frame of hints."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    lines = [
        line for line in lines if not re.match(r"(full_key|object_type|reference_type|set HYDRA|Set the env)", line)
    ]
    return "; ".join(lines[:2])


@lru_cache(maxsize=4096)
def _parsed(text: str) -> Override:
    return OverridesParser.create().parse_override(text)


def _form_problems(overrides: Sequence[str]) -> list[str]:
    """Overrides that are not KEY=VALUE with one value."""
    problems: list[str] = []
    for text in overrides:
        if "_target_" in text:
            problems.append(f'"{text}" names code to run, which no setting may')
            continue
        try:
            override = _parsed(text)
        except HydraException:
            problems.append(f'"{text}" is not an override; write KEY=VALUE, such as seed=1')
            continue
        if override.is_sweep_override():
            problems.append(f'"{text}" holds several values; one is needed here (`basd train -m` runs several)')
        elif override.key_or_group.split(".")[0] == "preset":
            problems.append(f'"{text}" is in the method; set the part itself, such as mixing.targets=clean')
        elif override.is_delete() or override.is_add():
            problems.append(f'"{text}": settings cannot be added or removed; write KEY=VALUE')
    return problems


def _override_problems(overrides: Sequence[str]) -> list[str]:
    """What is wrong with each override by itself."""
    choices = group_choices()
    problems: list[str] = []
    groups: list[str] = []
    values: list[tuple[str, str, Any]] = []
    for text in overrides:
        override = _parsed(text)
        key, value = override.key_or_group, override.value()
        if key not in choices or isinstance(value, dict | list):
            values.append((text, key, value))
        elif str(value) not in choices[key]:
            problems.append(f"{key}={value} is not known{suggest(str(value), choices[key])}")
        else:
            groups.append(text)
    if problems:
        # without the groups, values cannot be checked against the right schema
        return problems
    base, _ = _compose(groups)
    return [problem for text, key, value in values if (problem := _value_problem(base, text, key, value))]


def _value_problem(base: Any, text: str, key: str, value: Any) -> str | None:
    parent, _, leaf = key.rpartition(".")
    section = OmegaConf.select(base, parent) if parent else base
    known = [str(k) for k in section] if OmegaConf.is_dict(section) else []
    known = [k for k in known if k not in INSIDE]
    if leaf not in known:
        where = f" of {parent}" if parent else ""
        if parent and not known:
            top = key.split(".")[0]
            return f"{key} is not a setting{suggest(top, [str(k) for k in base if k not in INSIDE])}"
        return f"{key} is not a setting{where}{suggest(leaf, known)}"
    try:
        OmegaConf.update(base, key, value)
    except OmegaConfBaseException as error:
        return f"{text}: {_plain(error)}"
    return None


def overridden_keys(overrides: Sequence[str]) -> list[str]:
    return [_parsed(text).key_or_group for text in overrides]


def setting_name(overrides: Sequence[str]) -> str:
    """`<data>-<teacher>-<student>-<recipe>`, plus 6 hex digits where the overrides change a field of these."""
    composed = compose(overrides, combinations=False)
    plain = compose(setting_groups(overrides), combinations=False)
    name = "-".join(composed.choices[group] for group in SETTING_GROUPS)
    before, after = _compared(plain.config), _compared(composed.config)
    changed = {group: after[group] for group in SETTING_GROUPS if after[group] != before[group]}
    return f"{name}-{digest(changed)[:6]}" if changed else name


def setting_words(overrides: Sequence[str]) -> list[str]:
    """The overrides that speak of data, teacher, student or recipe."""
    keys = overridden_keys(overrides)
    return [text for text, key in zip(overrides, keys, strict=True) if key.split(".")[0] in SETTING_GROUPS]


def _compared(config: Config) -> dict[str, Any]:
    """A configuration without where its data lies."""
    return {**config.to_dict(), "data": semantic(config.data)}


def difference_from_preset(composed: Composed, words: Sequence[str] = ()) -> str:
    """The preset's name and what differs from it, in the words of the command line; `words`: those that every run shares."""
    groups = [f"{group}={composed.choices[group]}" for group in (*SETTING_GROUPS, "method")]
    shared = [text for text in words if "." in text.partition("=")[0]]
    try:
        base = compose([*groups, *shared], combinations=False)
    except UserError:  # settings of a group that this configuration has exchanged
        base = compose(groups, combinations=False)
    return " ".join([composed.config.method, *differences(base.config, composed.config)])


def differences(base: Config, config: Config) -> list[str]:
    """Overrides that lead from one configuration to the other; a loss switched off or on reads "without rsd", "with rsd"."""
    words = []
    before, after = _compared(base), _compared(config)
    for section in after:
        if section in (*NOT_SEMANTIC, "seed"):
            continue
        if section in GROUPS and before[section]["name"] != after[section]["name"]:
            words.append(f"{section}={after[section]['name']}")
            defaults = dict(flatten(dataclasses.asdict(GROUPS[section][after[section]["name"]]())))
        else:
            defaults = dict(flatten(before[section]))
        changed = [(key, value) for key, value in flatten(after[section]) if value != defaults.get(key)]
        words += [_worded(section, key, value) for key, value in changed]
    return words


def _worded(section: str, key: str, value: Any) -> str:
    if section == "losses" and key.endswith(".enabled"):
        return f"{'with' if value else 'without'} {key.removesuffix('.enabled')}"
    return f"{section}.{key}={_short(value)}"


def _short(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "_")


def setting_groups(overrides: Sequence[str]) -> list[str]:
    """The overrides that choose data, teacher, student or recipe."""
    choices = group_choices()
    parsed = [(text, _parsed(text)) for text in overrides]
    return [
        text
        for text, one in parsed
        if one.key_or_group in SETTING_GROUPS and str(one.value()) in choices[one.key_or_group]
    ]
