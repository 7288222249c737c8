"""Plans: an ablation expanded into frozen arms, before anything is trained."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import basd
from basd.compose import (
    Composed,
    compose,
    difference_from_preset,
    overridden_keys,
    setting_name,
)
from basd.config import Config, FrozenArm, digest, flatten, keys_of, normalized, remarks, suggest, without_effect
from basd.data import load as load_data
from basd.data.images import fingerprint
from basd.errors import UserError
from basd.models.taps import attention_of
from basd.training.cohort import choose_device
from basd.training.recipe import parse_duration
from basd.training.teachers import PreparedTeacher, prepare_teacher
from basd.version import code_version

# Words on the command line of plan and grid that speak of the table, not of the configuration.
TABLE_KEYS = ("seeds", "rows", "setting")


@dataclass(frozen=True)
class Row:
    """A named configuration of an ablation, as its file says it."""

    name: str
    label: str
    overrides: tuple[str, ...]
    section: str = ""


@dataclass(frozen=True)
class Ablation:
    """A file of experiments/."""

    name: str
    question: str
    reference: str
    metric: str
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class PlanRow:
    name: str
    label: str
    configuration_key: str
    overrides: tuple[str, ...]
    section: str = ""


@dataclass(frozen=True)
class Plan:
    """An ablation under a setting, frozen: resolved configurations, keys, code version."""

    name: str
    setting: str
    question: str
    reference: str
    metric: str
    seeds: tuple[int, ...]
    rows: tuple[PlanRow, ...]
    # row name → seed → arm key; rows that are the same computation share keys
    cells: dict[str, dict[int, str]]
    arms: dict[str, FrozenArm]
    version: str
    hash: str
    teacher_top1: float | None = None
    notices: tuple[str, ...] = ()

    def labels_of(self, arm_key: str) -> list[str]:
        """Names of the rows that an arm serves."""
        return [row for row, seeds in self.cells.items() if arm_key in seeds.values()]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        given = dict(values)
        given["rows"] = tuple(PlanRow(**{**row, "overrides": tuple(row["overrides"])}) for row in given["rows"])
        given["cells"] = {row: {int(seed): key for seed, key in cell.items()} for row, cell in given["cells"].items()}
        given["arms"] = {key: FrozenArm.from_dict(arm) for key, arm in given["arms"].items()}
        given["seeds"] = tuple(given["seeds"])
        given["notices"] = tuple(given["notices"])
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
            raise UserError(f"the plan {path} does not exist; run basd plan or basd grid.") from error
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} is not a plan, or of another version of BASD; remove it and run basd grid again."
            ) from error


def ablation_files() -> dict[str, Path]:
    """Ablations by name: experiments/ of the working directory first, then those that came with BASD."""
    found: dict[str, Path] = {}
    # beside the package, in a checkout and in a wheel; by import a folder of that name in the working directory could hide it
    packaged = Path(basd.__file__).resolve().parent.parent / "experiments"
    for folder in (packaged, Path("experiments")):
        if folder.is_dir():
            found.update({file.stem: file for file in folder.glob("*.yaml")})
    return found


def load_ablation(name: str) -> Ablation:
    """Read and check an ablation's file."""
    files = ablation_files()
    if name not in files:
        raise UserError(f"{name} is not an ablation{suggest(name, files)}")
    try:
        values = yaml.safe_load(files[name].read_text())
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise UserError(f"experiments/{name}.yaml is not readable as YAML{line}; correct it and run again.") from error
    try:
        rows = tuple(
            Row(
                name=str(row["name"]),
                label=str(row.get("label", row["name"])),
                overrides=tuple(str(o) for o in row["overrides"]),
                section=str(row.get("section", "")),
            )
            for row in values["rows"]
        )
        ablation = Ablation(
            name=name,
            question=str(values["question"]),
            reference=str(values["reference"]),
            metric=str(values.get("metric", "test/top1")),
            seeds=tuple(int(seed) for seed in values["seeds"]),
            rows=rows,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"experiments/{name}.yaml lacks or misspells {error}; it needs question, reference, seeds and rows with name and "
            "overrides."
        ) from error
    problem = _file_problem(ablation, values)
    if problem:
        raise UserError(f"experiments/{name}.yaml: {problem}")
    names = [row.name for row in rows]
    if len(set(names)) < len(names):
        raise UserError(f"experiments/{name}.yaml names a row twice; give each row its own name.")
    if ablation.reference not in names:
        raise UserError(
            f"experiments/{name}.yaml: the reference {ablation.reference} is not a row{suggest(ablation.reference, names)}"
        )
    return ablation


METRICS = ("test/top1", "test/top5", "test/nll", "test/ece", "val/top1")
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"


def _file_problem(ablation: Ablation, values: Mapping[str, Any]) -> str:
    """The first thing that is wrong with an ablation's file, in one sentence, or nothing."""
    known = ("question", "reference", "metric", "seeds", "rows")
    for key in values:
        if key not in known:
            return f"{key} is not known here{suggest(str(key), known)}"
    if not re.fullmatch(NAME, ablation.name):
        return f"the name {ablation.name} must be letters, digits, dots, dashes and underscores; rename the file."
    if ablation.metric not in METRICS:
        return f"metric: {ablation.metric} is not a final metric{suggest(ablation.metric, METRICS)}"
    if any(seed < 0 for seed in ablation.seeds) or len(set(ablation.seeds)) < len(ablation.seeds):
        return f"seeds {list(ablation.seeds)} must be different whole numbers from 0 on."
    for row in values["rows"]:
        for key in row:
            if key not in ("name", "label", "section", "overrides"):
                return f"row {row['name']}: {key} is not known here{suggest(str(key), ('name', 'label', 'section', 'overrides'))}"
        if not isinstance(row["overrides"], list):
            return f"row {row['name']}: overrides must be a list, such as [method=basd, selector=uniform]."
        if not re.fullmatch(NAME, str(row["name"])):
            return f"the row name {row['name']} must be letters, digits, dots, dashes and underscores; say the rest in its label."
        if any(str(text).partition("=")[0] == "seed" for text in row["overrides"]):
            return f"row {row['name']} sets seed; seeds belong to the whole table, under seeds."
    return ""


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
    train_size: int


def prepare(config: Config, progress: Callable[[int, int], None] | None = None) -> Resources:
    """Load the data and make the teacher ready, fitting it on first use."""
    splits = load_data(config.data)
    teacher = prepare_teacher(config.teacher, config.data, splits, progress)
    return Resources(teacher, fingerprint(splits), len(splits.train))


class Preparer:
    """`prepare`, once per different (data, teacher)."""

    def __init__(self, progress: Callable[[int, int], None] | None = None) -> None:
        self._progress = progress
        self._known: dict[str, Resources] = {}

    def __call__(self, config: Config) -> Resources:
        key = digest([dataclasses.asdict(config.data), dataclasses.asdict(config.teacher)])
        if key not in self._known:
            self._known[key] = prepare(config, self._progress)
        return self._known[key]


def freeze(composed: Composed, setting: str, resources: Resources) -> FrozenArm:
    """The arm of a configuration: keys, name, parameters for the tracker."""
    config = composed.config
    steps_per_epoch = resources.train_size // config.recipe.batch_size
    if steps_per_epoch < 1:
        raise UserError(
            f"recipe.batch_size={config.recipe.batch_size} is more than the {resources.train_size} training images; lower it."
        )
    total_steps = parse_duration(config.recipe.duration, steps_per_epoch)
    if total_steps < 1:
        raise UserError(f"recipe.duration={config.recipe.duration} is less than one step; make it longer.")
    heads = attention_of(resources.teacher.model, 0).num_heads
    if "attn" in config.enabled and config.head_aligner.name == "none" and heads != config.student.heads:
        raise UserError(
            f"head_aligner=none needs equal head counts, but the student has {config.student.heads} and the teacher {heads}; "
            "choose head_aligner=conv."
        )
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
        name=difference_from_preset(composed),
        config=config.to_dict(),
        params=parameters(composed),
        version=code_version(),
        teacher_fingerprint=resources.teacher.fingerprint,
        data_fingerprint=resources.data_fingerprint,
        total_steps=total_steps,
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


def merge_overrides(base: Sequence[str], row: Sequence[str]) -> list[str]:
    """A row's overrides win over the command line's."""
    keys = set(overridden_keys(row))
    return [text for text in base if text.partition("=")[0] not in keys] + list(row)


def make_plan(name: str, overrides: Sequence[str] = (), progress: Callable[[int, int], None] | None = None) -> Plan:
    """Expand an ablation into frozen arms. Every row is composed and checked before the teacher is touched."""
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
    setting = setting_name(base)
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
    choose_device(composed[ablation.reference, seeds[0]].config.runtime.device)
    preparer = Preparer(progress)
    arms: dict[str, FrozenArm] = {}
    cells: dict[str, dict[int, str]] = {}
    rows: list[PlanRow] = []
    for row in chosen:
        for seed in seeds:
            arm = freeze(composed[row.name, seed], setting, preparer(composed[row.name, seed].config))
            # the first row that needs an arm gives it its name
            arms.setdefault(arm.arm_key, arm)
            cells.setdefault(row.name, {})[seed] = arm.arm_key
        rows.append(PlanRow(row.name, row.label, arm.configuration_key, row.overrides, row.section))
    identity = {"name": name, "setting": setting, "cells": {row: sorted(cell.items()) for row, cell in cells.items()}}
    return Plan(
        name=name,
        setting=setting,
        question=ablation.question,
        reference=ablation.reference,
        metric=ablation.metric,
        seeds=tuple(seeds),
        rows=tuple(rows),
        cells=cells,
        arms=arms,
        version=code_version(),
        hash=digest(identity)[:12],
        teacher_top1=preparer(composed[ablation.reference, seeds[0]].config).teacher.test_top1,
        notices=(*sorted(unused), *dict.fromkeys(notices)),
    )
