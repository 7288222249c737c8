"""What `basd audit` compares: an arm's journal with what is wrong in it, and the runs of an MLflow experiment. Reads only."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from basd.errors import UserError
from basd.tracking.journal import Event, read_events
from basd.tracking.runs import NONFINITE, Run, open_runs, reading

# clocks and system load: a stretch that was trained twice measures them anew, and MLflow keeps the first
MEASURED = ("time/", "system/")


def few(items: Iterable[str], shown: int = 3) -> str:
    """The first of many, and how many more there are."""
    every = list(items)
    more = f" and {len(every) - shown} more" if len(every) > shown else ""
    return ", ".join(every[:shown]) + more


def same(one: float, other: float) -> bool:
    """Equal to the last bit, NaN to NaN."""
    return one == other or (math.isnan(one) and math.isnan(other))


# -- the journal -------------------------------------------------------------------------------------------------------


@dataclass
class JournalRecord:
    """What a journal holds, and what is wrong with it."""

    points: dict[str, dict[int, float]] = field(default_factory=dict)
    closing: Event | None = None
    defects: list[str] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        return max((step for steps in self.points.values() for step in steps), default=0)

    def sent(self) -> tuple[dict[str, dict[int, float]], dict[str, str]]:
        """What the mirror makes of it: the finite points, and metric -> "nan at step 40" for the last that is not finite."""
        points = {name: dict(steps) for name, steps in self.points.items()}
        for name, value in (self.closing.metrics if self.closing else {}).items():
            points.setdefault(name, {self.last_step: value})  # training reported the others already
        finite = {name: {s: v for s, v in steps.items() if math.isfinite(v)} for name, steps in points.items()}
        marks = {}
        for name, steps in points.items():
            odd = [step for step, value in steps.items() if not math.isfinite(value)]
            if odd:
                marks[name] = f"{steps[max(odd)]} at step {max(odd)}"
        return {name: steps for name, steps in finite.items() if steps}, marks


def read_journal(path: Path, total_steps: int, config: Mapping[str, Any]) -> JournalRecord:
    """Read the journal of an arm that is said to be complete. `config`: as it was trained, for the steps to expect."""
    record = JournalRecord()
    again: list[str] = []
    back: list[str] = []
    step = lines = end = 0
    for event in read_events(path):
        if event.index != lines:
            record.defects.append(f"its journal lacks lines before line {event.index}")
        if record.closing is not None:
            record.defects.append(f"its journal goes on after its end (line {event.index})")
        lines, end = event.index + 1, event.next
        record.closing = event if event.end else None
        if event.end:
            continue
        if event.step < step:
            back.append(f"{step} to {event.step}")
        step = event.step
        for name, value in event.metrics.items():
            steps = record.points.setdefault(name, {})
            if event.step in steps:
                again.append(f"{name} at step {event.step}")
            steps[event.step] = value
    if path.stat().st_size != end:
        record.defects.append(f"its journal cannot be read after line {lines}")
    if back:
        record.defects.append(f"its journal goes back from step {few(back)}")
    if again:
        record.defects.append(f"its journal has twice: {few(again)}")
    if record.closing is None or record.closing.end != "complete":
        how = f'"{record.closing.end}"' if record.closing else f"step {record.last_step} of {total_steps}"
        record.defects.append(f'its journal ends with {how}, not with "complete"')
    elif record.last_step != total_steps:
        record.defects.append(f"its journal ends at step {record.last_step}, the plan has {total_steps} steps")
    if not record.defects:
        for name, wanted in expected_steps(total_steps, config).items():
            lacking = sorted(wanted - set(record.points.get(name, ())))
            if lacking:
                record.defects.append(f"its journal lacks {name} at step {few(map(str, lacking))}")
    if record.closing is not None and not record.defects:
        if not record.closing.metrics:
            record.defects.append("its journal ends without final metrics")
        for name, value in record.closing.metrics.items():
            steps = record.points.get(name, {})
            if steps and not same(steps[max(steps)], value):
                record.defects.append(f"its journal closes with {name} {value}, its last point is {steps[max(steps)]}")
    return record


def expected_steps(total_steps: int, config: Mapping[str, Any]) -> dict[str, set[int]]:
    """The steps at which training must have recorded some metrics, as far as the configuration tells.

    Losses are recorded at other steps besides, where one begins to count. Ends of epochs follow from a length in epochs.
    """
    every = int((config.get("runtime") or {}).get("log_every", 0))
    if every < 1:
        return {}
    recipe = config.get("recipe") or {}
    ends = {total_steps}
    validated = {total_steps}
    epochs = re.fullmatch(r"\s*(\d+)(\.0*)?\s*(epochs?|ep)\s*", str(recipe.get("duration", "")))
    if epochs and int(epochs[1]) > 0 and total_steps % int(epochs[1]) == 0:
        length = total_steps // int(epochs[1])
        ends |= set(range(length, total_steps + 1, length))
        validated |= set(range(0, total_steps + 1, length * int(recipe.get("validate_every", 1)))) - {0}
    return {
        "train/loss": {1, *ends, *range(every, total_steps + 1, every)},
        "time/images_per_second": ends,
        "val/top1": validated,
    }


# -- MLflow ------------------------------------------------------------------------------------------------------------


Points = dict[str, dict[int, list[float]]]  # metric -> step -> values


class Tracked:
    """The runs of one experiment, by start; none where it does not exist. UserError when the store cannot be read."""

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri = uri
        self._reader = open_runs(uri)
        try:
            with reading(uri):
                self.runs = self._read(experiment)
        except UserError:
            self.close()
            raise

    def _read(self, experiment: str) -> list[Run]:
        found = next((one for one in self._reader.experiments() if one.name == experiment), None)
        if found is not None and found.stage != "active":
            raise UserError(
                f"The MLflow experiment {experiment} is deleted; run `mlflow experiments restore -x {found.number}`"
            )
        return self._reader.runs(found.number) if found is not None else []

    def points(self, run: Run) -> Points:
        """Every point of every metric of a run."""
        found: Points = {}
        with reading(self.uri):
            for point in self._reader.points([run]):
                found.setdefault(point.metric, {}).setdefault(point.step, []).append(point.value)
        return found

    def close(self) -> None:
        self._reader.close()


def compare_points(record: JournalRecord, run: Run, points: Points, mirrored: bool) -> tuple[int, list[str]]:
    """How many points of a journal the run lacks only because they were not sent yet, and sentences about all other differences."""
    expected, marks = record.sent()
    late = 0
    lacking: list[str] = []
    twice: list[str] = []
    extra: list[str] = []
    other: list[str] = []
    for name in sorted({*expected, *points}):
        journal, server = expected.get(name, {}), points.get(name, {})
        last = max(server, default=-1)  # the mirror sends what comes after the last point of each metric
        for step, value in sorted(journal.items()):
            if step in server:
                if value not in server[step] and not name.startswith(MEASURED):
                    other.append(f"{name} at step {step} is {server[step][0]}, in the journal {value}")
            elif mirrored or step < last:
                lacking.append(f"{name} at step {step}")
            else:
                late += 1
        twice += [f"{name} at step {step}" for step in sorted(server) if len(server[step]) > 1]
        extra += [f"{name} at step {step}" for step in sorted(server) if step not in journal]
    marked = {tag.removeprefix(NONFINITE): text for tag, text in run.tags.items() if tag.startswith(NONFINITE)}
    for name in sorted({*marks, *marked}):
        if name in marks and name not in marked and not mirrored:
            late += 1
        elif marks.get(name) != marked.get(name):
            other.append(f"{name} is marked {marked.get(name, 'finite')}, in the journal {marks.get(name, 'finite')}")
    found = {"lacks": lacking, "has twice": twice, "has, and the journal has not:": extra, "differs:": other}
    return late, [f"its MLflow run {words} {few(items)}" for words, items in found.items() if items]
