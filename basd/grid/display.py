"""What a person sees while a grid runs: one bar with the time left, or a line now and then where nobody draws bars."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basd.tracking.files import read_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from basd.grid.ledger import ArmState
    from basd.grid.options import GridOptions
    from basd.grid.plan import Plan
    from basd.grid.probe import Probe


# Characters that a table may take where the output is no terminal.
LOG_WIDTH = 200


def make_console(quiet: bool = False) -> Console:
    """Where commands print; quiet never draws. Into a file or a pipe tables are as wide as they need, unless COLUMNS says otherwise."""
    from rich.console import Console as RichConsole

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else LOG_WIDTH
    return RichConsole(highlight=False, soft_wrap=True, force_terminal=False if quiet else None, width=width)


def steps_done(directory: Path) -> int:
    """The step that an arm in training last reported."""
    return int((read_json(directory / "progress.json") or {}).get("step", 0))


def data_wait(directories: Iterable[Path]) -> float | None:
    """Share of the last epochs that arms in training waited for images; None while none of them has told."""
    told = [(read_json(directory / "progress.json") or {}).get("data_wait_share") for directory in directories]
    shares = [float(share) for share in told if share is not None]
    return sum(shares) / len(shares) if shares else None


def said_of(wait: float | None) -> str:
    """The share as the end of a line about progress; "" for None."""
    return "" if wait is None else f", {100 * wait:.0f} % of the time waits for data"


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

    def update(self, steps: int, complete: int, failed: int, wait: float | None = None) -> None:
        """Tell the current state; prints a line at most every 30 s or when an arm has ended.

        wait: share of the time that the arms in training wait for images.
        """
        now = time.monotonic()
        if self._first_steps is None:
            self._first_steps = steps
        elif steps > self._steps and steps > self._first_steps:
            self.first_progress = self.first_progress or now
            self.last_progress = now
        self._steps = max(steps, self._steps)
        arms = f"{complete} of {self.total_arms} arms complete" + (f", {failed} failed" if failed else "")
        left = self.seconds_left(now)
        shown = (f"about {duration(left)} left" if left is not None else "time left: estimating") + said_of(wait)
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


SHOWN_DIFFERENCES = 4


def steps_left(plan: Plan, states: Mapping[str, ArmState], options: GridOptions) -> dict[str, int]:
    """Steps that every arm of a plan still needs; 0 for those that are complete."""

    def left(key: str, total: int) -> int:
        if key in states and states[key].state == "complete":
            return 0
        # trained to its last step, an arm is still to be evaluated
        return max(1, total - steps_done(options.arm_directory(plan.setting, key)))

    return {key: left(key, arm.total_steps) for key, arm in plan.arms.items()}


def print_plan(console: Console, plan: Plan, states: Mapping[str, ArmState], probe: Probe | None) -> None:
    """The rows of a plan: what differs from the reference, seeds, what became of the arms, an arm's own time per step.

    Columns that would stay empty are left out; without a probe that is the time.
    """
    from rich.table import Table
    from rich.text import Text

    from basd.config import from_dict
    from basd.grid.plan import effective_differences

    console.print(f"{plan.name} in {plan.setting}: {plan.question}", markup=False)
    reference = from_dict(plan.arms_of(plan.reference)[0].config)
    lines: list[dict[str, str]] = []
    for row in plan.rows:
        arms = plan.arms_of(row.name)
        words = effective_differences(reference, from_dict(arms[0].config))
        known = [states[arm.arm_key].state for arm in arms if arm.arm_key in states]
        queued = sum(state in ("waiting", "running", "stale") for state in known)
        seconds = probe.of_step(arms[0]) if probe else None
        lines.append(
            {
                "row": row.label,
                "differs from the reference by": "(the reference)" if row.name == plan.reference else _listed(words),
                "seeds": ",".join(str(arm.seed) for arm in arms),
                "done": f"{known.count('complete')} of {len(arms)}",
                "queued": str(queued or ""),
                "same arms as": ", ".join(plan.same_arms(row.name)),
                "ms a step": "" if seconds is None else f"{1000 * seconds:.0f}",
            }
        )
    shown = [column for column in lines[0] if any(line[column] for line in lines)]
    table = Table(*shown)
    section = ""
    for row, line in zip(plan.rows, lines, strict=True):
        if row.section != section:
            section = row.section
            table.add_section()
            table.add_row(Text(section, style="italic"))
        # as Text: a label is not rich's markup
        table.add_row(*(Text(line[column]) for column in shown))
    console.print(table)


def _listed(words: Sequence[str]) -> str:
    """The first few of a list of differences, and how many more there are."""
    if not words:
        return "nothing"
    more = len(words) - SHOWN_DIFFERENCES
    return "; ".join([*words[:SHOWN_DIFFERENCES], *([f"and {more} more"] if more > 0 else [])])


def plan_summary(plan: Plan, states: Mapping[str, ArmState], left: Mapping[str, int]) -> str:
    """What is left to train, in a sentence."""
    count = [states[key].state if key in states else "" for key in plan.arms]
    said = f"{len(plan.arms)} arms, {count.count('complete')} done"
    failed = sum(state.permanent for state in states.values())
    said += f", {failed} failed" if failed else ""
    waiting = [plan.arms[key] for key, steps in left.items() if steps]
    if not waiting:
        return f"{said}; nothing to train."
    cohorts = len({arm.cohort_key for arm in waiting})
    return f"{said}; {len(waiting)} to train in {cohorts} cohorts: {sum(left.values()):,} arm-steps."


def print_prediction(console: Console, plan: Plan, left: Mapping[str, int], probe: Probe, options: GridOptions) -> None:
    """How long `basd grid` will take, from a probe; and what failed in it."""
    from basd.grid.probe import predict, predict_memory, worker_count

    for row in plan.rows:
        reason = probe.failed.get(row.configuration_key)
        if reason is not None:
            console.print(f"Note: row {row.name} failed in its first steps: {reason}", markup=False)
    seconds = predict(left, plan.arms, probe, options)
    if seconds is None:
        console.print("No time can be predicted: the rows above failed in their first steps.", markup=False)
        return
    workers = min(worker_count(options), sum(steps > 0 for steps in left.values()))
    shared = _milliseconds([costs.shared for costs in probe.costs.values()])
    own = _milliseconds([step for costs in probe.costs.values() for step in costs.step.values()])
    console.print(
        f"Predicted: {duration(seconds)} on {workers} {'process' if workers == 1 else 'processes'}, besides starting them. "
        f"Measured in {duration(probe.seconds)}, every loss counting: {shared} a step for what a cohort shares (views, "
        f"teacher), {own} a step for an arm.",
        markup=False,
    )
    needed = predict_memory(left, plan.arms, probe, options)
    if needed is not None:
        console.print(_memory(*needed, processes=workers, device=options.device), markup=False)


def _memory(count: int, arms: int, *, processes: int, device: str) -> str:
    """What a process will hold, in a sentence; on CUDA of the device's memory, else of this machine's."""
    from basd.training.device import choose_device
    from basd.training.memory import gibibytes, total_bytes

    used = choose_device(device)
    total = total_bytes(used)
    cohort = "with one arm" if arms == 1 else f"with a cohort of {arms} arms"
    each = " each" if processes > 1 else ""
    said = f"Memory: about {gibibytes(count)} {cohort}{each}"
    said += f", at the peak of {used}" if used.type == "cuda" else ", resident"
    said += f", of {gibibytes(total)}." if total else "."
    # processes on one CPU share its memory
    together = count if used.type == "cuda" else count * processes
    if total and together > total:
        said += " That is too much: lower runtime.cohort_size, runtime.processes or recipe.batch_size."
    return said


def _milliseconds(seconds: Sequence[float]) -> str:
    """One number, or the least and the most."""
    low, high = f"{1000 * min(seconds):.0f}", f"{1000 * max(seconds):.0f}"
    return f"{low} ms" if low == high else f"{low}–{high} ms"


class TeacherProgress:
    """A bar, or a line now and then, while a teacher is fitted on first use."""

    def __init__(self, screen: Console, quiet: bool) -> None:
        self._screen, self._quiet = screen, quiet
        self._bar: Any = None
        self._task: Any = None
        self._said = -1

    def __call__(self, step: int, total: int) -> None:
        if self._said < 0:
            self._screen.print("Fitting the teacher (once; it is cached afterwards).")
            self._said = 0
            if self._screen.is_terminal and not self._quiet:
                from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

                columns = (TextColumn("teacher"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
                self._bar = Progress(*columns, console=self._screen)
                self._task = self._bar.add_task("teacher", total=total)
                self._bar.start()
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        elif step * 4 // total > self._said:
            self._said = step * 4 // total
            self._screen.print(f"teacher: {100 * step // total} % of the steps")
        if step == total:
            self.close()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
