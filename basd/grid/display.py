"""What a person sees while a grid runs: one bar with the time left, or a line now and then where nobody draws bars."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from basd.tracking.files import read_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


def make_console(quiet: bool = False) -> Console:
    """Where commands print; quiet never draws."""
    from rich.console import Console as RichConsole

    return RichConsole(highlight=False, soft_wrap=True, force_terminal=False if quiet else None)


def steps_done(directory: Path) -> int:
    """The step that an arm in training last reported."""
    return int((read_json(directory / "progress.json") or {}).get("step", 0))


def duration(seconds: float | None) -> str:
    """A time span for people: "40 s", "12 min", "3 h 05 min"; "unknown" for None."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{max(0.0, seconds):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Display:
    """Shows how far a grid is; `steps` are arm-steps: the steps of all arms together."""

    def __init__(
        self, console: Console, name: str, total_steps: int, total_arms: int, *, quiet: bool, every: float = 30.0
    ) -> None:
        self.console = console
        self.name = name
        self.total_steps = total_steps
        self.total_arms = total_arms
        self.every = every
        self.first_progress: float | None = None  # monotonic time of the first step seen
        self.last_progress: float | None = None
        self._first_steps: int | None = None
        self._steps = -1
        self._said = (-1, time.monotonic())
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if console.is_terminal and not quiet:
            self._draw()

    def _draw(self) -> None:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[arms]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
        )
        self._task = self._bar.add_task(self.name, total=self.total_steps, arms="", left="")
        self._bar.start()

    def update(self, steps: int, complete: int, failed: int) -> None:
        """Tell the current state; prints a line at most every 30 s or when an arm has ended."""
        now = time.monotonic()
        if self._first_steps is None:
            self._first_steps = steps
        elif steps > self._steps and steps > self._first_steps:
            self.first_progress = self.first_progress or now
            self.last_progress = now
        self._steps = max(steps, self._steps)
        arms = f"{complete} of {self.total_arms} arms complete" + (f", {failed} failed" if failed else "")
        left = self.seconds_left(now)
        shown = f"about {duration(left)} left" if left is not None else "time left: estimating"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=steps, arms=arms, left=shown if steps < self.total_steps else "")
            return
        ended, said = self._said
        if ended != complete + failed or now - said >= self.every:
            self._said = (complete + failed, now)
            share = 100 * steps / max(1, self.total_steps)
            self.say(
                f"{self.name}: {arms}, {share:.0f} % of the steps" + (f", {shown}" if steps < self.total_steps else "")
            )

    def seconds_left(self, now: float) -> float | None:
        """From the mean rate since the first step; None before there is one."""
        if self.first_progress is None or self._first_steps is None or now - self.first_progress < 2.0:
            return None
        rate = (self._steps - self._first_steps) / (now - self.first_progress)
        return (self.total_steps - self._steps) / rate if rate > 0 else None

    def say(self, line: str) -> None:
        """Print a line of its own, above the bar if there is one."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the bar's live drawing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
