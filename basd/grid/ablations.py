"""Ablations: the files of experiments/, checked, with their factors expanded into rows.

A file names its rows, or the factors that they are combined from, or both:

    overrides: [method=basd]                # every row starts from these
    factors:                                # one row for every combination of levels
      rsd: {on: [losses.rsd.enabled=true], off: [losses.rsd.enabled=false]}
      rel: {on: [losses.rel.enabled=true], off: [losses.rel.enabled=false]}
    section: "{on} losses"                  # of the combinations; {on}: how many factors are on
    rows:
      - {name: basd, label: complete, factors: {rsd: on, rel: on}}
      - {name: ce, factors: {rsd: off, rel: off}, overrides: [method=ce]}
      - {name: kd, overrides: [method=kd]}  # stands beside the combinations

`rows_of: NAME` takes over the rows of another file; this file's overrides come after theirs. `metric` is one final metric or a list.
`marks`, `reported`, `notes` and `figures` lay out the table: see `basd.grid.layout`.

A row with `factors` takes the place of that combination, under its own name. A row's overrides are the file's, then those of
its levels, then its own; of two for one key the later counts.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

import basd
from basd.config import suggest
from basd.errors import UserError
from basd.grid.layout import (
    OFF,
    ON,
    FileError,
    Reported,
    check_keys,
    read_figures,
    read_marks,
    read_notes,
    read_reported,
)

FINAL = ("test/top1", "test/top5", "test/nll", "test/ece", "val/top1")
# of the last epoch, or of the arm
COSTS = (
    *("time/step_milliseconds", "time/images_per_second", "time/data_wait_share", "system/peak_megabytes"),
    *("cost/student_parameters", "cost/distillation_parameters"),
)
# what the bias probes describe at the end of an arm
PROBES = (
    *(f"probe/attention_distance{which}" for which in ("", "_first", "_last", "_teacher")),
    *("probe/cka", "probe/attention_kl", "probe/relation_cosine", "probe/shift_consistency"),
    *("probe/sensitivity_low", "probe/sensitivity_mid", "probe/sensitivity_high"),
    *("probe/overconfidence", "probe/ece_scaled"),
)
METRICS = (*FINAL, *COSTS, *PROBES)
FILE_KEYS = (
    *("question", "reference", "metric", "seeds", "overrides", "factors", "section", "rows", "rows_of"),
    *("marks", "reported", "notes", "figures"),
)
ROW_KEYS = ("name", "label", "section", "factors", "overrides")
FILE_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
# combinations are named after what is on, rsd+rel, and after levels, T=2+scale=none
ROW_NAME = r"[A-Za-z0-9][A-Za-z0-9_.=+-]*"


@dataclass(frozen=True)
class Row:
    """A named configuration of an ablation. `factors`: the level of each factor, empty for a row beside the combinations."""

    name: str
    label: str
    overrides: tuple[str, ...]
    section: str = ""
    factors: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ablation:
    """A file of experiments/. `factors`: names and levels, in the file's order; `marks`: settings by column title.

    `figures`: the rows that get figures of their own.
    """

    name: str
    question: str
    reference: str
    metrics: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    factors: dict[str, tuple[str, ...]] = field(default_factory=dict)
    marks: dict[str, tuple[str, ...]] = field(default_factory=dict)
    reported: tuple[Reported, ...] = ()
    notes: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()


def ablation_files() -> dict[str, Path]:
    """Ablations by name."""
    return named_files("experiments")


def named_files(folder: str) -> dict[str, Path]:
    """YAML files by name: those of a folder of the working directory before those that came with BASD."""
    found: dict[str, Path] = {}
    # beside the package, in a checkout and in a wheel; by import a folder of that name in the working directory could hide it
    packaged = Path(basd.__file__).resolve().parent.parent / folder
    for place in (packaged, Path(folder)):
        if place.is_dir():
            found.update({file.stem: file for file in place.glob("*.yaml")})
    return found


def load_ablation(name: str, *, may_take_over: bool = True) -> Ablation:
    """Read and check an ablation's file; `UserError` names the first thing that is wrong with it.

    Without `may_take_over` a file with `rows_of` is refused, so that files cannot name each other in a circle.
    """
    files = ablation_files()
    if name not in files:
        hint = f"; it is a sweep: basd sweep {name}." if name in named_files("sweeps") else suggest(name, files)
        raise UserError(f"{name} is not an ablation{hint}")
    values = read_yaml(files[name], f"experiments/{name}.yaml")
    try:
        return _read(name, values, may_take_over)
    except FileError as error:
        raise UserError(f"experiments/{name}.yaml: {error}") from error


def read_yaml(path: Path, shown: str) -> Any:
    """What a file of experiments/ or sweeps/ holds; `shown` names it in errors."""
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise UserError(f"{shown} is not readable as YAML{line}; correct it and run again.") from error


def merge_overrides(*groups: Iterable[str]) -> list[str]:
    """Overrides of all groups; of several for one key the last counts and stands in its own place."""
    texts = [text for group in groups for text in group]
    last = {text.partition("=")[0]: place for place, text in enumerate(texts)}
    return [text for place, text in enumerate(texts) if last[text.partition("=")[0]] == place]


def _read(name: str, values: Any, may_take_over: bool) -> Ablation:
    if not isinstance(values, Mapping):
        raise FileError("it is empty; write question, reference, seeds, and rows or factors.")
    check_keys("", values, FILE_KEYS)
    if "rows_of" in values and not may_take_over:
        raise FileError("it takes its own rows from another file; name that one in rows_of.")
    lacking = [key for key in ("question", "reference", "seeds") if key not in values]
    if not {"rows", "factors", "rows_of"} & set(values):
        lacking.append("rows")
    if lacking:
        raise FileError(f"it lacks {', '.join(lacking)}; it needs question, reference, seeds, and rows or factors.")
    if not re.fullmatch(FILE_NAME, name):
        raise FileError(f"the name {name} must be letters, digits, dots, dashes and underscores; rename the file.")
    given = values.get("metric", "test/top1")
    metrics = tuple(str(one) for one in given) if isinstance(given, list) else (str(given),)
    for metric in metrics:
        if metric not in METRICS:
            raise FileError(f"metric: {metric} is not a final metric{suggest(metric, METRICS)}")
    if not metrics or len(set(metrics)) < len(metrics):
        raise FileError("metric must name at least one metric, each once.")
    seeds = values["seeds"]
    whole = isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
    if not whole or len(set(seeds)) < len(seeds):
        raise FileError(f"seeds {seeds} must be different whole numbers from 0 on, such as [0, 1, 2].")
    common = _overrides("overrides", values.get("overrides", []))
    levels = _factors(values["factors"]) if "factors" in values else {}
    listed = values.get("rows") or []
    if not isinstance(listed, list):
        raise FileError("rows must be a list, each row with name and overrides.")
    rows = [*_taken_over(values, common), *(_row(row, common, levels) for row in listed)]
    taken: dict[tuple[tuple[str, str], ...], str] = {}
    for row in rows:
        if row.factors:
            other = taken.setdefault(tuple(row.factors.items()), row.name)
            if other != row.name:
                raise FileError(f"the rows {other} and {row.name} are the same combination of factors; keep one.")
    section = str(values.get("section", ""))
    rows += [
        _combination(one, section, common, levels) for one in _combinations(levels) if tuple(one.items()) not in taken
    ]
    names, labels = [row.name for row in rows], [row.label for row in rows]
    for row in rows:
        if names.count(row.name) > 1:
            raise FileError(f"two rows are named {row.name}; give each row its own name.")
        if labels.count(row.label) > 1:
            raise FileError(f'two rows are labelled "{row.label}"; give each row its own label.')
    reference = str(values["reference"])
    if reference not in names:
        raise FileError(f"the reference {reference} is not a row{suggest(reference, names)}")
    return Ablation(
        name=name,
        question=str(values["question"]),
        reference=reference,
        metrics=metrics,
        seeds=tuple(seeds),
        rows=tuple(rows),
        factors={factor: tuple(choices) for factor, choices in levels.items()},
        marks=read_marks(values["marks"], levels) if "marks" in values else {},
        reported=read_reported(values["reported"], metrics) if "reported" in values else (),
        notes=read_notes(values["notes"]) if "notes" in values else (),
        figures=read_figures(values.get("figures", [reference]), names),
    )


def _taken_over(values: Mapping[str, Any], common: Sequence[str]) -> list[Row]:
    """The rows of the ablation that `rows_of` names, with this file's overrides after their own."""
    if "rows_of" not in values:
        return []
    if "factors" in values:
        raise FileError("rows_of and factors do not go together; keep one.")
    name = str(values["rows_of"])
    files = ablation_files()
    if name not in files:
        raise FileError(f"rows_of: {name} is not an ablation{suggest(name, files)}")
    rows = load_ablation(name, may_take_over=False).rows
    return [replace(row, overrides=tuple(merge_overrides(row.overrides, common)), factors={}) for row in rows]


def _overrides(where: str, given: Any) -> list[str]:
    """A list of overrides; none of them sets the seed."""
    if not isinstance(given, list):
        raise FileError(f"{where} must be a list, such as [method=basd, selector=uniform].")
    texts = [str(text) for text in given]
    if any(text.partition("=")[0] == "seed" for text in texts):
        raise FileError(f"{where} sets seed; seeds belong to the whole table, under seeds.")
    return texts


def _row(values: Any, common: Sequence[str], levels: Mapping[str, Mapping[str, list[str]]]) -> Row:
    if not isinstance(values, Mapping) or "name" not in values:
        raise FileError(f"the row {values!r} lacks a name; write {{name: …, overrides: […]}}.")
    name = str(values["name"])
    check_keys(f"row {name}: ", values, ROW_KEYS)
    if not re.fullmatch(ROW_NAME, name):
        raise FileError(
            f"the row name {name} must be letters, digits, dots, dashes, underscores, plus and equals signs; "
            "say the rest in its label."
        )
    if "overrides" not in values and "factors" not in values:
        raise FileError(f"row {name} lacks overrides; write them as a list, such as [method=basd].")
    chosen = _levels_of(name, values["factors"], levels) if "factors" in values else {}
    own = _overrides(f"row {name}: overrides", values.get("overrides", []))
    return Row(
        name=name,
        label=str(values.get("label", name)),
        overrides=tuple(merge_overrides(common, *_of_levels(chosen, levels), own)),
        section=str(values.get("section", "")),
        factors=chosen,
    )


def _levels_of(row: str, given: Any, levels: Mapping[str, Mapping[str, list[str]]]) -> dict[str, str]:
    """The combination that a row names, in the order of the factors."""
    if not levels:
        raise FileError(f"row {row} names factors, but the file has none; write factors above the rows.")
    if not isinstance(given, Mapping):
        raise FileError(f"row {row}: factors must name a level of each factor, such as {{{next(iter(levels))}: …}}.")
    chosen = {str(factor): _level(level) for factor, level in given.items()}
    for factor, level in chosen.items():
        if factor not in levels:
            raise FileError(f"row {row}: {factor} is not a factor{suggest(factor, levels)}")
        if level not in levels[factor]:
            raise FileError(f"row {row}: {level} is not a level of {factor}{suggest(level, levels[factor])}")
    lacking = [factor for factor in levels if factor not in chosen]
    if lacking:
        raise FileError(f"row {row}: factors lacks {', '.join(lacking)}; name a level of each factor.")
    return {factor: chosen[factor] for factor in levels}


def _factors(given: Any) -> dict[str, dict[str, list[str]]]:
    """factor → level → overrides."""
    if not isinstance(given, Mapping) or not given:
        raise FileError("factors is empty; name at least one with its levels, such as rsd: {on: […], off: […]}.")
    levels: dict[str, dict[str, list[str]]] = {}
    owners: dict[str, str] = {}
    for factor, choices in ((str(factor), choices) for factor, choices in given.items()):
        if not isinstance(choices, Mapping) or len(choices) < 2:
            raise FileError(f"factor {factor} needs at least two levels, such as {{on: […], off: […]}}.")
        levels[factor] = {}
        for level, overrides in ((_level(level), overrides) for level, overrides in choices.items()):
            for word in (factor, level):
                if not re.fullmatch(FILE_NAME, word):
                    raise FileError(
                        f"factor {factor}: the name {word} must be letters, digits, dots, dashes and underscores."
                    )
            levels[factor][level] = _overrides(f"factor {factor}, level {level}: overrides", overrides)
            for key in (text.partition("=")[0] for text in levels[factor][level]):
                if owners.setdefault(key, factor) != factor:
                    raise FileError(
                        f"the factors {owners[key]} and {factor} both set {key}; a key belongs to one factor."
                    )
    return levels


def _level(name: Any) -> str:
    """YAML reads a bare on and off as true and false."""
    return (ON if name else OFF) if isinstance(name, bool) else str(name)


def _of_levels(chosen: Mapping[str, str], levels: Mapping[str, Mapping[str, list[str]]]) -> list[list[str]]:
    return [levels[factor][level] for factor, level in chosen.items()]


def _is_switch(levels: Iterable[str]) -> bool:
    return set(levels) == {ON, OFF}


def _count_on(combination: Mapping[str, str]) -> int:
    return sum(level == ON for level in combination.values())


def _combinations(levels: Mapping[str, Mapping[str, list[str]]]) -> list[dict[str, str]]:
    """Every combination of levels, those with most factors on first, otherwise in the file's order."""
    if not levels:
        return []
    combinations = [dict(zip(levels, chosen, strict=True)) for chosen in itertools.product(*levels.values())]
    return sorted(combinations, key=_count_on, reverse=True)


def _combination(
    chosen: dict[str, str], section: str, common: Sequence[str], levels: Mapping[str, Mapping[str, list[str]]]
) -> Row:
    """The row of a combination that no row of the file has taken."""
    switches = [factor for factor in chosen if _is_switch(levels[factor])]
    on = [factor for factor in switches if chosen[factor] == ON]
    others = [f"{factor}={level}" for factor, level in chosen.items() if factor not in switches]
    # all switches off, and nothing else to be named after
    label = ", ".join(part for part in (" + ".join(on), ", ".join(others)) if part) or "none"
    return Row(
        name="+".join([*on, *others]) or "none",
        label=label,
        overrides=tuple(merge_overrides(common, *_of_levels(chosen, levels))),
        section=section.replace("{on}", str(_count_on(chosen))),
        factors=chosen,
    )
