"""Times that are comparable: actions alternate, each ratio is of neighbours, and the median over the repeats counts."""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Measure:
    """Seconds of an action: median, least and most over the repeats."""

    name: str
    seconds: float
    least: float
    most: float


@dataclass(frozen=True)
class Ratio:
    """A figure without unit; `reach` says what it should be, such as "≤ 1.20", "" where nothing is asked."""

    name: str
    value: float
    reach: str = ""


@dataclass(frozen=True)
class Report:
    """What a benchmark found."""

    what: str
    device: str
    settings: dict[str, Any]
    measures: tuple[Measure, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    # figures with a unit: name → (value, unit)
    figures: dict[str, tuple[float, str]] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Times:
    """Seconds of named actions, one entry a repeat."""

    def __init__(self, seconds: Mapping[str, Sequence[float]]) -> None:
        self.seconds = {name: list(values) for name, values in seconds.items()}

    def __getitem__(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def measures(self) -> tuple[Measure, ...]:
        found = self.seconds.items()
        return tuple(Measure(name, self[name], min(values), max(values)) for name, values in found)

    def ratio(self, of: Callable[[Mapping[str, float]], float]) -> float:
        """The median of `of(seconds of one repeat by name)`: what drifts while a benchmark runs falls out of each ratio."""
        repeats = range(min(len(values) for values in self.seconds.values()))
        return statistics.median(of({name: values[i] for name, values in self.seconds.items()}) for i in repeats)


def alternate(actions: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, warm: int = 1) -> Times:
    """Run every action in turn, `warm` times without the clock and then `repeats` times with it."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(warm + repeats):
        for name, action in actions.items():
            began = now(device)
            action()
            if repeat >= warm:
                seconds[name].append(now(device) - began)
            else:
                now(device)
    return Times(seconds)


def now(device: torch.device) -> float:
    """The clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_name(device: torch.device) -> str:
    """For people: the GPU's name, or the processor and the threads that are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
