"""Descriptions that MLflow shows above an experiment, a configuration's run and an arm's run, in Markdown."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from basd.errors import without_passwords

NOTE = "mlflow.note.content"
# Digest of the description that was written here last, by which one that a person has changed is known.
# Like everything of MLflow's own, its pages do not list it among the tags.
NOTED = "mlflow.basd.note"
LONGEST = 5000
ABLATION = "basd.ablation."


def noted(tags: Mapping[str, str], text: str) -> dict[str, str]:
    """The tags that describe a run or an experiment as `text`; none where it says so already, or a person has changed it."""
    text = shortened(without_passwords(text.strip()))
    before = tags.get(NOTE)
    if before == text or (before is not None and _digest(before) != tags.get(NOTED)):
        return {}
    return {NOTE: text, NOTED: _digest(text)}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shortened(text: str) -> str:
    """A text as long as every store of MLflow takes it, cut between lines."""
    if len(text) <= LONGEST:
        return text
    kept = text[: LONGEST - 2]
    return (kept[: kept.rfind("\n")] if "\n" in kept else kept) + "\n…"


def experiment_note(spec: Mapping[str, Any]) -> str:
    """What a setting is, from the arm.json of its first arm, and how to train it again."""
    setting, config = str(spec["setting"]), spec.get("config", {})
    chosen = dict(zip(("data", "teacher", "student", "recipe"), setting.split("-"), strict=False))
    facts = {
        "data": _data(spec, config.get("data", {})),
        "teacher": _fingerprint("weights", spec.get("teacher_fingerprint")),
        "student": _named(
            config.get("student", {}), width="wide", depth="blocks", heads="heads", patch_size="px patches"
        ),
        "recipe": _named(config.get("recipe", {}), duration="", batch_size="images a batch", lr="learning rate"),
    }
    lines = [f"- {group.capitalize()}: `{choice}`{facts[group]}" for group, choice in chosen.items()]
    words = [str(word) for word in spec.get("setting_words", [])]
    changed = [word for word in words if "." in word.partition("=")[0] and not word.startswith("data.root=")]
    command = shlex.join(["basd", "grid", "NAME", *words])
    if len(setting.split("-")) > len(chosen) and not words:
        command = (
            f"{command} …` with the settings that `config.yaml` of a run names, `basd report NAME setting={setting}"
        )
    return "\n".join(
        [
            # MLflow shows the first line alone until the reader opens the rest
            f"Students distilled under one setting: {', '.join(f'{group} `{choice}`' for group, choice in chosen.items())}"
            f"{', changed: `' + shlex.join(changed) + '`' if changed else ''}.",
            "",
            *lines,
            "",
            "These are the values of the first run here; a row of a table may change any (`config.yaml` of a run has them all).",
            "",
            "A run at the top is a configuration, with means over its seeds; below it lies a run for each seed. "
            "Runs named `table: …` hold the reports.",
            "",
            f"To train a table again: `{command}`.",
        ]
    )


def _data(spec: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    sizes = spec.get("data_sizes", {})
    words = [f"{data['dataset']}"] if data.get("dataset") else []
    words += [f"{data['image_size']} px"] if "image_size" in data else []
    splits = {"train": "training", "validation": "validation", "test": "test"}
    words += [f"{sizes[split]:,} {name} images" for split, name in splits.items() if split in sizes]
    words += [f"{sizes['classes']:,} classes"] if "classes" in sizes else []
    return (f", {', '.join(words)}" if words else "") + _fingerprint("fingerprint", spec.get("data_fingerprint"))


def _fingerprint(what: str, value: Any) -> str:
    return f" ({what} `{value}`)" if value else ""


def _named(values: Mapping[str, Any], **names: str) -> str:
    """As in ", width 48, 6 blocks": the values that there are, with their names behind."""
    words = [f"{values[key]} {name}".strip() for key, name in names.items() if values.get(key) is not None]
    return f", {', '.join(words)}" if words else ""


def configuration_note(name: str, tags: Mapping[str, str], seeds: Iterable[str] = ()) -> str:
    """What the run of a configuration is. `name`: preset and differences; `seeds`: those that are finished."""
    preset, _, changes = name.partition(" ")
    finished = sorted(seeds, key=lambda seed: (len(seed), seed))
    served = {tag.removeprefix(ABLATION): label for tag, label in sorted(tags.items()) if tag.startswith(ABLATION)}
    lines = [f"The preset `{preset}`{f', changed: `{changes}`' if changes else ' as it is'}.", ""]
    if finished:
        lines.append(
            f"- Seeds finished: {', '.join(finished)}. Metrics here are means over them"
            f"{', `…_std` their standard deviations' if len(finished) > 1 else ''}; each lies below as a run."
        )
    else:
        lines.append("- No seed is finished yet.")
    lines += [f"- Table `{table}`: {'rows' if ', ' in label else 'row'} {label}" for table, label in served.items()]
    return "\n".join([*lines, "- Every setting: `config.yaml` of a run below"])


def arm_note(name: str, seed: Any, reference: str) -> str:
    """What the run of an arm is. `reference`: what `basd export` calls it."""
    return "\n".join(
        [
            f"One trained student: `{name}`, seed {seed}.",
            "",
            f"- As a model for timm: `basd export {reference}` (`--register` adds it to the model registry)",
            "- Its weights are the artifact `student.safetensors`, every setting stands in `config.yaml`",
        ]
    )
