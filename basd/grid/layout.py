"""What an ablation's file says of its table beside rows and metrics: marks, figures that others have reported, notes, figures.

    marks:                                  # a column each
      rsd: losses.rsd.enabled               # ✓ where it is on
      uniform: selector=uniform             # ✓ where the setting has this value; a list: where all of them hold
      T: weighting.temperature              # the value itself
    reported:                               # italic, with their source; in no mean and no test
      - label: DeiT-Ti, distilled (ImageNet-1k)
        source: arXiv 2012.12877            # free text
        section: Reported for DeiT-Ti
        values: {test/top1: 74.5}           # as the source writes them; accuracies in percent
    notes: [The student was not tuned.]     # printed below the table
    figures: [basd, ce]                     # rows that get figures of their own, or all; the reference without it

`marks: factors` makes a column of every factor. Marks are read from each row's resolved configuration, not from what the file
says of the row; a setting without effect in a row has no mark there.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from basd.config import GROUPS, NOT_SEMANTIC, Config, flatten, suggest, without_effect
from basd.errors import UserError

REPORTED_KEYS = ("label", "source", "section", "values")
REPORTED_SECTION = "Reported by others, of other settings"
SHARES = ("top1", "top5", "ece")  # metrics in percent, by the last part of their name
ON, OFF = "on", "off"
CHECK, NO_CHECK = "✓", "–"

# Levels of factors: factor → level → overrides.
Levels = Mapping[str, Mapping[str, Sequence[str]]]


class FileError(Exception):
    """What is wrong with an ablation's file, in one sentence that follows its name."""


@dataclass(frozen=True)
class Reported:
    """Figures that others have reported. `values`: by metric, as the source writes them."""

    label: str
    source: str
    values: dict[str, str]
    section: str = REPORTED_SECTION


def check_keys(where: str, values: Mapping[Any, Any], known: Sequence[str]) -> None:
    """Refuse a key that a file does not have."""
    for key in values:
        if key not in known:
            raise FileError(f"{where}{key} is not known here{suggest(str(key), known)}")


# -- reading -----------------------------------------------------------------------------------------------------------


def read_marks(given: Any, levels: Levels) -> dict[str, tuple[str, ...]]:
    """Title of each column → the settings that it shows."""
    if given == "factors":
        if not levels:
            raise FileError("marks: factors needs factors, and the file has none; write marks: {title: setting}.")
        return {factor: _of_factor(factor, choices) for factor, choices in levels.items()}
    if not isinstance(given, Mapping):
        raise FileError("marks must name settings by column title, such as {rsd: losses.rsd.enabled}, or be factors.")
    marks = {}
    for title, settings in given.items():
        texts = tuple(str(text) for text in settings) if isinstance(settings, list) else (str(settings),)
        if not texts or (len(texts) > 1 and not all("=" in text for text in texts)):
            raise FileError(f"marks: {title} must be one setting, or a list of KEY=VALUE that all have to hold.")
        marks[str(title)] = texts
    return marks


def _of_factor(factor: str, choices: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """A switch shows what its level on sets, any other factor the value of the one setting that its levels choose."""
    if set(choices) == {ON, OFF}:
        if choices[ON]:
            return tuple(choices[ON])
        raise FileError(
            f"marks: factors cannot show {factor}, whose level on sets nothing; write marks: {{title: setting}}."
        )
    keys = {text.partition("=")[0] for texts in choices.values() for text in texts}
    if len(keys) != 1 or not all(choices.values()):
        raise FileError(
            f"marks: factors cannot show {factor}, whose levels do not choose one setting; write marks: {{title: setting}}."
        )
    return tuple(keys)


def read_reported(given: Any, metrics: Sequence[str]) -> tuple[Reported, ...]:
    """The list of figures that others have reported, checked against the table's metrics."""
    if not isinstance(given, list):
        raise FileError("reported must be a list, each entry with label, source and values.")
    found: list[Reported] = []
    for values in given:
        if not isinstance(values, Mapping) or {"label", "source", "values"} - set(values):
            label = values.get("label", values) if isinstance(values, Mapping) else values
            raise FileError(f"reported: {label!r} needs label, source and values; a figure without its source is none.")
        label, source = values["label"], values["source"]
        check_keys(f"reported {label}: ", values, REPORTED_KEYS)
        if not isinstance(source, str) or not source.strip():
            raise FileError(
                f"reported {label}: source {source} must be text; put a number such as '2012.12877' in quotes."
            )
        if any(other.label == str(label) for other in found):
            raise FileError(f'reported: two entries are labelled "{label}"; give each its own label.')
        figures = _figures(str(label), values["values"], metrics)
        found.append(Reported(str(label), source, figures, str(values.get("section", REPORTED_SECTION))))
    return tuple(found)


def _figures(label: str, given: Any, metrics: Sequence[str]) -> dict[str, str]:
    if not isinstance(given, Mapping) or not given:
        raise FileError(f"reported {label}: values must name a figure for each metric, such as {{{metrics[0]}: 74.5}}.")
    figures = {}
    for metric, value in given.items():
        if metric not in metrics:
            raise FileError(f"reported {label}: {metric} is not a metric of this table{suggest(str(metric), metrics)}")
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise FileError(f"reported {label}: {metric}: {value} is not a number.")
        last = str(metric).rpartition("/")[2]
        if last in SHARES and not (0 <= number <= 100 and (number > 1 or last == "ece")):
            raise FileError(f"reported {label}: {metric}: {value} must be in percent, such as 74.5.")
        figures[str(metric)] = str(value).strip()
    return figures


def read_notes(given: Any) -> tuple[str, ...]:
    """Sentences for below the table."""
    if not isinstance(given, list) or not all(isinstance(note, str) and note.strip() for note in given):
        raise FileError("notes must be a list of sentences.")
    return tuple(given)


def read_figures(given: Any, rows: Sequence[str]) -> tuple[str, ...]:
    """The rows that get figures of their own."""
    if given == "all":
        return tuple(rows)
    if not isinstance(given, list):
        raise FileError("figures must be a list of rows, such as [basd, ce], or all.")
    for row in given:
        if row not in rows:
            raise FileError(f"figures: {row} is not a row{suggest(str(row), rows)}")
    return tuple(dict.fromkeys(given))


# -- marks of configurations -------------------------------------------------------------------------------------------


def marks_of(marks: Mapping[str, Sequence[str]], configs: Mapping[str, Config]) -> dict[str, tuple[str, ...]]:
    """What each row shows in each column of marks, from its resolved configuration.

    UserError: a setting that there is not (with the nearest names), or a value that it cannot have.
    """
    values = {row: _values(config) for row, config in configs.items()}
    known = _known(configs.values()) if marks else {}
    shown: dict[str, tuple[str, ...]] = dict.fromkeys(configs, ())
    for title, settings in marks.items():
        conditions = [_condition(title, setting, known) for setting in settings]
        for row, config in configs.items():
            shown[row] += (_mark(conditions, values[row], config),)
    return shown


def _values(config: Config) -> dict[str, Any]:
    """Every setting that can change a result, by its key; of a group also its choice, by the group's name."""
    sections = {key: value for key, value in config.to_dict().items() if key not in (*NOT_SEMANTIC, "seed")}
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in flatten(sections)}
    return values | {group: values[f"{group}.name"] for group in GROUPS}


def _known(configs: Iterable[Config]) -> dict[str, tuple[Any, ...]]:
    """Every setting, of these configurations and of every choice of a group, with the values it may have; () where it is free."""
    known: dict[str, tuple[Any, ...]] = {}
    for config in configs:
        for section in vars(config).keys() - {*NOT_SEMANTIC, "seed"}:
            known |= _settings(getattr(config, section), f"{section}.")
    for group, choices in GROUPS.items():
        for choice in choices.values():
            known |= _settings(choice(), f"{group}.")
        known[group] = tuple(choices)
    return known


def _settings(section: Any, prefix: str) -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {}
    for spec in dataclasses.fields(section):
        value = getattr(section, spec.name)
        if dataclasses.is_dataclass(value):
            found |= _settings(value, f"{prefix}{spec.name}.")
        elif isinstance(value, Mapping):
            found |= {f"{prefix}{spec.name}.{key}": () for key, _ in flatten(value)}
        else:
            found[f"{prefix}{spec.name}"] = tuple(spec.metadata.get("choices", ()))
    return found


def _condition(title: str, setting: str, known: Mapping[str, tuple[Any, ...]]) -> tuple[str, Any]:
    """A setting's key and the value that it must have; `...` where the value itself is shown."""
    key, given, text = setting.partition("=")
    if key not in known:
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.6)
        hint = (
            f"the nearest: {', '.join(near)}" if near else "write a key of the command line, such as losses.rsd.enabled"
        )
        raise UserError(f"marks: {title}: {key} is not a setting that changes a result; {hint}.")
    if not given:
        return key, ...
    try:
        value = OverridesParser.create().parse_override(setting).value()
    except HydraException as error:
        raise UserError(f"marks: {title}: {setting} is not KEY=VALUE as on the command line.") from error
    if known[key] and not any(_equal(choice, value) for choice in known[key]):
        raise UserError(f"marks: {title}: {text} is not a choice of {key}{suggest(text, map(str, known[key]))}")
    return key, value


def _mark(conditions: Sequence[tuple[str, Any]], values: Mapping[str, Any], config: Config) -> str:
    held = []
    for key, wanted in conditions:
        if key not in values or without_effect(config, [key]):
            return NO_CHECK
        value = values[key]
        if wanted is ... and not isinstance(value, bool):
            return shown_value(value)
        held.append(value is True if wanted is ... else _equal(value, wanted))
    return CHECK if all(held) else NO_CHECK


def _equal(value: Any, wanted: Any) -> bool:
    """Equal as settings: 1 is 1.0, and true is not 1."""
    return isinstance(value, bool) == isinstance(wanted, bool) and bool(value == wanted)


def shown_value(value: Any) -> str:
    """A value as the command line writes it, cut when long."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")
    return text if len(text) <= 24 else f"{text[:23]}…"
