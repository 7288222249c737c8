"""Plans: an ablation expanded into frozen arms, before anything is trained."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from basd.combinations import teacher_errors
from basd.components.losses import LossesConfig
from basd.compose import Composed, compose, difference_from_preset, overridden_keys, setting_name, setting_words
from basd.config import (
    GROUPS,
    Config,
    FrozenArm,
    digest,
    flatten,
    from_dict,
    join_problems,
    keys_of,
    normalized,
    remarks,
    suggest,
    without_effect,
)
from basd.data import load as load_data
from basd.data.images import fingerprint
from basd.errors import UserError
from basd.grid.ablations import load_ablation, merge_overrides
from basd.grid.layout import Reported, marks_of, shown_value
from basd.grid.options import as_folder
from basd.models.taps import attention_of
from basd.models.teacher import teacher_title
from basd.training.device import check_device
from basd.training.recipe import parse_duration
from basd.version import code_version

if TYPE_CHECKING:
    from basd.training.teachers import PreparedTeacher

# Words on the command line of plan and grid that speak of the table, not of the configuration.
TABLE_KEYS = ("seeds", "rows", "setting")


@dataclass(frozen=True)
class PlanRow:
    name: str
    label: str
    configuration_key: str
    overrides: tuple[str, ...]
    section: str = ""
    # level of each factor of a factorial table; empty for a row beside the combinations
    factors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """An ablation under a setting, frozen: resolved configurations, keys, code version."""

    name: str
    setting: str
    question: str
    reference: str
    metrics: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: tuple[PlanRow, ...]
    # row name → seed → arm key; rows that are the same computation share keys
    cells: dict[str, dict[int, str]]
    arms: dict[str, FrozenArm]
    version: str
    hash: str
    teacher_top1: float | None = None
    notices: tuple[str, ...] = ()
    # the table's layout: settings by title of a column of marks, figures that others have reported, notes below
    marks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reported: tuple[Reported, ...] = ()
    notes: tuple[str, ...] = ()
    # the rows that get figures of their own
    figures: tuple[str, ...] = ()
    # of a sweep: its study, its pruner and the trials under way (basd.grid.search)
    sweep: dict[str, Any] | None = None

    def only(self, keys: Collection[str]) -> Plan:
        """The plan of some of its arms."""
        cells = {row: {s: key for s, key in cell.items() if key in keys} for row, cell in self.cells.items()}
        cells = {row: cell for row, cell in cells.items() if cell}
        return dataclasses.replace(
            self,
            rows=tuple(row for row in self.rows if row.name in cells),
            cells=cells,
            arms={key: arm for key, arm in self.arms.items() if key in keys},
        )

    @property
    def command(self) -> str:
        """The command that trains what is missing."""
        return f"basd {'grid' if self.sweep is None else 'sweep'} {self.name}"

    def labels_of(self, arm_key: str) -> list[str]:
        """Names of the rows that an arm serves."""
        return [row for row, seeds in self.cells.items() if arm_key in seeds.values()]

    def arms_of(self, row: str) -> list[FrozenArm]:
        """The arms of a row, one a seed."""
        return [self.arms[key] for key in self.cells[row].values()]

    @property
    def row_marks(self) -> dict[str, tuple[str, ...]]:
        """What each row shows in the columns of marks, from the configurations that are trained."""
        return marks_of(self.marks, {row.name: from_dict(self.arms_of(row.name)[0].config) for row in self.rows})

    def same_arms(self, row: str) -> list[str]:
        """Names of the other rows that are the same computation."""
        return [other for other, cell in self.cells.items() if other != row and cell == self.cells[row]]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        given = dict(values)
        given["rows"] = tuple(PlanRow(**{**row, "overrides": tuple(row["overrides"])}) for row in given["rows"])
        given["cells"] = {row: {int(seed): key for seed, key in cell.items()} for row, cell in given["cells"].items()}
        given["arms"] = {key: FrozenArm.from_dict(arm) for key, arm in given["arms"].items()}
        given["seeds"] = tuple(given["seeds"])
        if "metric" in given:
            # a plan of before tables had several
            given["metrics"] = [given.pop("metric")]
        given["metrics"] = tuple(given["metrics"])
        given["notices"] = tuple(given["notices"])
        # a plan of before tables had a layout has none
        given["marks"] = {title: tuple(settings) for title, settings in given.get("marks", {}).items()}
        given["reported"] = tuple(Reported(**figures) for figures in given.get("reported", ()))
        given["notes"] = tuple(given.get("notes", ()))
        given["figures"] = tuple(given.get("figures", [given["reference"]]))
        keys = {key for cell in given["cells"].values() for key in cell.values()}
        if keys - set(given["arms"]) or any(key != arm.arm_key for key, arm in given["arms"].items()):
            raise ValueError("cells and arms differ")
        for name in (given["name"], given["setting"], given["hash"], *given["arms"]):
            as_folder(name)
        if {arm.setting for arm in given["arms"].values()} != {given["setting"]}:
            raise ValueError("arms of another setting")
        return cls(**given)

    @property
    def runtime(self) -> dict[str, Any]:
        """Runtime section, the same for every arm of a plan."""
        return next(iter(self.arms.values())).config["runtime"]

    @property
    def config(self) -> dict[str, Any]:
        """Configuration of the first arm: its runtime, tracking and ledger sections are those of the plan."""
        return next(iter(self.arms.values())).config

    @property
    def teacher(self) -> str:
        """The teacher's name, with its test accuracy where it is known."""
        name = teacher_title(self.config["teacher"])
        return f"{name}, {100 * self.teacher_top1:.1f} % test top-1" if self.teacher_top1 is not None else name

    @property
    def path(self) -> Path:
        return Path(self.runtime["directory"]) / self.setting / "plans" / f"{self.name}-{self.hash}.json"

    def save(self, path: Path | None = None) -> Path:
        path = path or self.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            fresh.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
            os.replace(fresh, path)
        except OSError as error:
            raise UserError(
                f"{path.parent} cannot be written ({error.strerror}); run in a directory that can be, or set runtime.directory."
            ) from error
        return path

    @classmethod
    def load(cls, path: Path) -> Plan:
        try:
            return cls.from_dict(json.loads(path.read_text()))
        except FileNotFoundError as error:
            raise UserError(f"the plan {path} does not exist; run basd grid or basd sweep.") from error
        except (ValueError, TypeError, KeyError, AttributeError, UserError) as error:
            raise UserError(
                f"{path} is not a plan, or of another version of BASD; remove it and run basd grid again."
            ) from error


@dataclass(frozen=True)
class TableOptions:
    seeds: tuple[int, ...] | None = None
    rows: tuple[str, ...] | None = None


def split_overrides(overrides: Sequence[str]) -> tuple[TableOptions, list[str]]:
    """`seeds=[0,1]` and `rows=[a,b]` speak of the table; the rest of the configuration."""
    options: dict[str, Any] = {}
    rest = []
    for text in overrides:
        key, _, value = text.partition("=")
        if key not in TABLE_KEYS:
            rest.append(text)
            continue
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            parsed = value
        options[key] = parsed if isinstance(parsed, list) else [parsed]
    seeds = options.get("seeds")
    if seeds is not None:
        if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
            raise UserError("seeds must name at least one whole number, such as seeds=[0,1,2].")
        if len(set(seeds)) < len(seeds):
            raise UserError(f"seeds={seeds} names a seed twice; a seed counts once.")
    rows = options.get("rows")
    return (
        TableOptions(
            tuple(seeds) if seeds is not None else None, tuple(str(r) for r in rows) if rows is not None else None
        ),
        rest,
    )


@dataclass(frozen=True)
class Resources:
    """What the keys of a setting need: the data's and the teacher's fingerprints and the number of steps in an epoch."""

    teacher: PreparedTeacher
    data_fingerprint: str
    data_sizes: dict[str, int]  # images of train, validation and test, and classes

    @property
    def train_size(self) -> int:
        return self.data_sizes["train"]


def prepare(config: Config, progress: Callable[[int, int], None] | None = None) -> Resources:
    """Load the data and make the teacher ready, and its head where a loss reads logits, fitting them on first use."""
    # here, since it imports timm, which workers and commands that only read plans do without
    from basd.training.teachers import prepare_head, prepare_teacher

    splits = load_data(config.data)
    teacher = prepare_teacher(config.teacher, config.data, splits, progress, config.demands.logits)
    if config.demands.logits:
        prepare_head(teacher, config.teacher, config.data, splits, progress)
    sizes = {name: len(split) for name, split in splits._asdict().items()}
    return Resources(teacher, fingerprint(splits), {**sizes, "classes": splits.train.classes})


class Preparer:
    """`prepare`, once per different (data, teacher, whether its head is needed)."""

    def __init__(self, progress: Callable[[int, int], None] | None = None) -> None:
        self._progress = progress
        self._known: dict[str, Resources] = {}

    def __call__(self, config: Config) -> Resources:
        key = digest([dataclasses.asdict(config.data), dataclasses.asdict(config.teacher), config.demands.logits])
        if key not in self._known:
            self._known[key] = prepare(config, self._progress)
        return self._known[key]


def freeze(composed: Composed, setting: str, resources: Resources, words: Sequence[str] = ()) -> FrozenArm:
    """The arm of a configuration: keys, name, parameters for the tracker. `words`: of the command line that made the setting."""
    config = composed.config
    steps_per_epoch = resources.train_size // config.recipe.batch_size
    if steps_per_epoch < 1:
        raise UserError(
            f"recipe.batch_size={config.recipe.batch_size} is more than the {resources.train_size} training images; lower it."
        )
    total_steps = parse_duration(config.recipe.duration, steps_per_epoch)
    if total_steps < 1:
        raise UserError(f"recipe.duration={config.recipe.duration} is less than one step; make it longer.")
    model = resources.teacher.model
    problems = teacher_errors(config, model.embed_dim, len(model.blocks), attention_of(model, 0).num_heads)
    if problems:
        raise UserError(join_problems(problems))
    keys = keys_of(
        config,
        teacher_fingerprint=resources.teacher.fingerprint,
        data_fingerprint=resources.data_fingerprint,
    )
    return FrozenArm(
        arm_key=keys.arm,
        configuration_key=keys.configuration,
        cohort_key=keys.cohort,
        seed=config.seed,
        setting=setting,
        name=difference_from_preset(composed, words),
        config=config.to_dict(),
        params=parameters(composed),
        version=code_version(),
        teacher_fingerprint=resources.teacher.fingerprint,
        data_fingerprint=resources.data_fingerprint,
        total_steps=total_steps,
        data_sizes=resources.data_sizes,
        setting_words=list(words),
    )


def parameters(composed: Composed) -> dict[str, str]:
    """Flat, short parameters for the tracker: choices of groups, and the numbers that people look for."""
    config = composed.config
    effective = normalized(config)
    shown = {group: choice for group, choice in composed.choices.items() if group in effective or group == "method"}
    shown["losses"] = "+".join(config.enabled) or "none"
    shown["seed"] = str(config.seed)
    shown.update(
        {key: str(value) for key, value in flatten(effective) if key.split(".")[0] in ("recipe", "objective", "losses")}
    )
    return {key: value[:250] for key, value in shown.items() if not key.endswith(".name")}


def effective_differences(reference: Config, config: Config) -> list[str]:
    """What a configuration does otherwise than the reference, in words: "without rel", "selector: adaptive_spectral → alp".

    Fields without effect are left out, and so is what only follows from another difference: settings of a loss that is gone,
    another form that a section takes beside it, settings of a newly chosen component that stand at their defaults.
    """
    before, after = normalized(reference), normalized(config)
    del before["seed"], after["seed"]
    words = []
    for word, gone in (("without", _extra(before, after)), ("with", _extra(after, before))):
        words += [f"{word} {', '.join(gone)}"] if gone else []
    for section, now in after.items():
        if getattr(config, section) == getattr(reference, section):
            continue
        then = before.get(section, {})
        values, old = dict(flatten(now)), dict(flatten(then))
        if now.get("name") != then.get("name"):
            words.append(f"{section}: {then['name']} → {now['name']}" if then else f"{section}: {now['name']}")
            old = {}
        defaults = _defaults(section, now.get("name"))
        for key, value in values.items():
            if key != "name" and value != old.get(key, defaults.get(key, value)):
                from_old = f"{shown_value(old[key])} → " if key in old else ""
                words.append(f"{section}.{key}: {from_old}{shown_value(value)}")
    if not words and before != after:
        old, new = dict(flatten(before)), dict(flatten(after))
        words = [
            f"{key}: {shown_value(old.get(key))} → {shown_value(new.get(key))}"
            for key in {**old, **new}
            if old.get(key) != new.get(key)
        ]
    return words


def _extra(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Losses of one normalised configuration that the other lacks."""
    return [name for name in ours.get("losses", {}) if name not in theirs.get("losses", {})]


def _defaults(section: str, name: str | None) -> dict[str, Any]:
    """Flat defaults of a component's choice, or of the losses."""
    if section == "losses":
        return dict(flatten(dataclasses.asdict(LossesConfig())))
    if section not in GROUPS or name not in GROUPS[section]:
        return {}
    return dict(flatten(dataclasses.asdict(GROUPS[section][name]())))


def make_plan(
    name: str,
    overrides: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
    *,
    before_device: Callable[[Config], object] = lambda _config: None,
) -> Plan:
    """Expand an ablation into frozen arms. Every row is composed and checked before the teacher is touched.

    `before_device` gets the reference's configuration before anything looks at the device that it is trained on.
    """
    ablation = load_ablation(name)
    options, base = split_overrides(overrides)
    if any(text.partition("=")[0] == "setting" for text in overrides):
        raise UserError(
            "setting= chooses among finished tables (status, report); here data=, teacher=, student= and recipe= make it."
        )
    if any(text.partition("=")[0] == "seed" for text in base):
        raise UserError(f"{name} has several seeds; write seeds=[0,1,2] instead of seed=….")
    seeds = options.seeds if options.seeds is not None else ablation.seeds
    if not seeds:
        raise UserError(f"{name} has no seeds; give at least one, such as seeds=[0,1,2].")
    known = [row.name for row in ablation.rows]
    for wanted_row in options.rows or ():
        if wanted_row not in known:
            raise UserError(f"{wanted_row} is not a row of {name}{suggest(wanted_row, known)}")
    chosen = [row for row in ablation.rows if options.rows is None or row.name in options.rows]
    if options.rows is not None and ablation.reference not in options.rows:
        raise UserError(
            f"the reference row {ablation.reference} must be among rows=[…]; the others are compared with it."
        )
    setting, words = setting_name(base), setting_words(base)
    composed: dict[tuple[str, int], Composed] = {}
    notices: list[str] = []
    problems: list[str] = []
    # overrides of the command line that change nothing in any row
    unused = {f"{key} has no effect in this combination" for key in overridden_keys(base)}
    for row in chosen:
        wanted = merge_overrides(base, row.overrides)
        try:
            one = compose(wanted)
        except UserError as error:
            problems.append(f"row {row.name}: {error}")
            continue
        idle = [*without_effect(one.config, overridden_keys(row.overrides)), *remarks(one.config)]
        notices += [f"row {row.name}: {text}" for text in idle]
        unused &= set(without_effect(one.config, overridden_keys(base)))
        for seed in seeds:
            composed[row.name, seed] = dataclasses.replace(one, config=dataclasses.replace(one.config, seed=seed))
    if problems:
        raise UserError("\n".join(problems))
    try:
        marks_of(ablation.marks, {row.name: composed[row.name, seeds[0]].config for row in chosen})
    except UserError as error:
        raise UserError(f"experiments/{name}.yaml: {error}") from error
    before_device(composed[ablation.reference, seeds[0]].config)
    for cell in composed.values():
        check_device(cell.config)
    preparer = Preparer(progress)
    arms: dict[str, FrozenArm] = {}
    cells: dict[str, dict[int, str]] = {}
    rows: list[PlanRow] = []
    teacher = preparer(composed[ablation.reference, seeds[0]].config).teacher
    for row in chosen:
        own = preparer(composed[row.name, seeds[0]].config).teacher
        if own.fingerprint != teacher.fingerprint and composed[row.name, seeds[0]].config.enabled:
            notices.append(f"row {row.name} has a teacher of its own, {own.accuracy}")
        for seed in seeds:
            try:
                resources = preparer(composed[row.name, seed].config)
                arm = freeze(composed[row.name, seed], setting, resources, words)
            except UserError as error:
                raise UserError(f"row {row.name}: {error}") from error
            # the first row that needs an arm gives it its name
            arms.setdefault(arm.arm_key, arm)
            cells.setdefault(row.name, {})[seed] = arm.arm_key
        rows.append(PlanRow(row.name, row.label, arm.configuration_key, row.overrides, row.section, row.factors))
    identity = {"name": name, "setting": setting, "cells": {row: sorted(cell.items()) for row, cell in cells.items()}}
    return Plan(
        name=name,
        setting=setting,
        question=ablation.question,
        reference=ablation.reference,
        metrics=ablation.metrics,
        seeds=tuple(seeds),
        rows=tuple(rows),
        cells=cells,
        arms=arms,
        version=code_version(),
        hash=digest(identity)[:12],
        teacher_top1=teacher.test_top1,
        notices=(*sorted(unused), *dict.fromkeys(notices)),
        marks=ablation.marks,
        reported=ablation.reported,
        notes=ablation.notes,
        figures=tuple(row for row in ablation.figures if row in cells),
    )
