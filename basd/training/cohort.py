"""The training loop: one for one arm or many. Arms of one cohort key share the order of samples and the teacher's forward.

batch → (clean view, strong view, labels) → one teacher forward → for each arm: mix its student view → student → losses →
step → record. The result of an arm is the same bits alone and in any cohort.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from basd.config import Config, FrozenArm, from_dict
from basd.data import load as load_data
from basd.data.images import Splits, epoch_order
from basd.errors import UserError
from basd.models.teacher import Teacher
from basd.objective import demands
from basd.training import random_streams as streams
from basd.training.arm import TrainingArm
from basd.training.batches import StepBatch, TeacherViews
from basd.training.checkpoint import load_checkpoint, remove_checkpoints, save_checkpoint
from basd.training.recorder import Recorder
from basd.training.teachers import PreparedTeacher, prepare_head, prepare_teacher, statistics_of

log = logging.getLogger("basd.training")

Status = Literal["complete", "failed", "stopped"]


@dataclass
class ArmResult:
    arm_key: str
    status: Status
    metrics: dict[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass
class _Member:
    """An arm with where it lies and where it reports."""

    frozen: FrozenArm
    config: Config
    directory: Path
    recorder: Recorder
    arm: TrainingArm
    saved_at: float = 0.0


class Cohort:
    """Trains arms of one cohort key side by side until each is complete, failed or stopped."""

    def __init__(
        self,
        arms: Sequence[FrozenArm],
        directories: Sequence[Path],
        recorders: Sequence[Recorder],
        *,
        stop: Callable[[], bool] = lambda: False,
        owned: Callable[[str], bool] = lambda _key: True,
        progress: Callable[[str, int, int], None] = lambda _key, _step, _total: None,
        finished: Callable[[ArmResult], None] = lambda _result: None,
    ) -> None:
        assert arms and len({arm.cohort_key for arm in arms}) == 1, "arms of one cohort key train side by side"
        self.stop, self.owned, self.progress, self.on_finished = stop, owned, progress, finished
        configs = [from_dict(arm.config) for arm in arms]
        first = configs[0]
        self.seed = first.seed
        self.data = first.data
        self.device = choose_device(first.runtime.device)
        splits = load_data(first.data)
        self.splits = Splits(*(part.to(self.device) for part in splits))
        self.steps_per_epoch = len(splits.train) // first.recipe.batch_size
        self.batch_size = first.recipe.batch_size
        self.teacher_config = first.teacher
        self.teacher: Teacher | None = None
        if any(config.enabled for config in configs):
            prepared = prepare_teacher(first.teacher, first.data, splits)
            check_fingerprint(prepared, arms[0])
            wanted = [demands(config.losses, config.head_aligner) for config in configs]
            head = None
            if any(want.logits for want in wanted):
                head = prepare_head(prepared, first.teacher, first.data, splits).to(self.device)
            self.teacher = Teacher(prepared.model.to(self.device), any(want.maps for want in wanted), head)
        self.results: list[ArmResult] = []
        self.members: list[_Member] = []
        for frozen, config, directory, recorder in zip(arms, configs, directories, recorders, strict=True):
            try:
                self.members.append(self._start(frozen, config, directory, recorder))
            except Exception as error:
                log.exception("arm %s could not start", frozen.arm_key)
                self._finish(ArmResult(frozen.arm_key, "failed", reason=reason_of(error)))

    def _start(self, frozen: FrozenArm, config: Config, directory: Path, recorder: Recorder) -> _Member:
        directory.mkdir(parents=True, exist_ok=True)
        shape = self.teacher.shape if self.teacher else None
        arm = TrainingArm(config, shape, self.splits.train.classes, self.steps_per_epoch, self.device)
        state, notice = load_checkpoint(directory)
        if notice:
            log.warning("arm %s: %s", frozen.arm_key, notice)
        if state is not None and state["arm_key"] != frozen.arm_key:
            raise UserError(f"{directory} holds the checkpoint of another arm; move it away and run again.")
        if state is not None:
            try:
                recorder.rewind(state["recorded"])
            except ValueError as error:
                # repeating the steps gives the same numbers; a checkpoint without its record would lose some
                log.warning("arm %s: %s; starting again from the first step", frozen.arm_key, error)
                state = None
        if state is None:
            recorder.rewind(0)
        else:
            arm.load(state["arm"])
            if state["threads"] != config.runtime.threads or state["torch"] != str(torch.__version__):
                log.warning(
                    "arm %s goes on with %d threads and torch %s, its start had %d and %s: the last bits may differ",
                    *(frozen.arm_key, config.runtime.threads, torch.__version__, state["threads"], state["torch"]),
                )
        return _Member(frozen, config, directory, recorder, arm, saved_at=time.monotonic())

    def run(self) -> list[ArmResult]:
        """Train until no arm is left; returns the results in the order in which the arms ended."""
        for member in list(self.members):
            # killed after its last step but before its end was written
            if member.arm.step >= member.arm.total_steps:
                self._attempt(member, partial(self._complete, member))
        while self.members:
            step = min(member.arm.step for member in self.members)
            epoch = step // self.steps_per_epoch
            self._epoch(epoch, step - epoch * self.steps_per_epoch)
        return self.results

    def _epoch(self, epoch: int, first: int) -> None:
        """From batch `first` of an epoch to its end."""
        order = epoch_order(len(self.splits.train), self.batch_size, streams.generator(self.seed, streams.ORDER, epoch))
        clock = _Clock(time.perf_counter())
        for position in range(first, self.steps_per_epoch):
            if self.stop():
                for member in list(self.members):
                    self._attempt(member, partial(self._leave, member))
                return
            step = epoch * self.steps_per_epoch + position
            # members further along wait for the others; those that are through have left
            due = [member for member in self.members if member.arm.step == step]
            if not due:
                continue
            began = time.perf_counter()
            batch = StepBatch(self.splits.train, order[position], self.data, self.seed, epoch, step)
            # the views that every arm starts from are input, and counted as such
            batch.clean(self.data.image_size)
            clock.data += time.perf_counter() - began
            teacher = None
            if self.teacher is not None:
                mean, std = statistics_of(self.teacher_config, self.data)
                teacher = TeacherViews(self.teacher, batch, self.teacher_config.image_size, mean, std)
            for member in due:
                self._attempt(member, partial(self._train, member, batch, teacher))
            clock.images += self.batch_size
            clock.arms = len(due)
            last = position == self.steps_per_epoch - 1
            for member in list(self.members):
                if member.arm.step == step + 1 and (last or member.arm.step == member.arm.total_steps):
                    self._attempt(member, partial(self._end_epoch, member, epoch, clock))

    def _attempt(self, member: _Member, action: Callable[[], ArmResult | None]) -> None:
        """A failure of one arm never stops the others. An action that returns a result ends the arm."""
        try:
            result = action()
        except Exception as error:
            log.exception("arm %s failed", member.frozen.arm_key)
            result = ArmResult(member.frozen.arm_key, "failed", reason=reason_of(error))
        if result is not None:
            self.members.remove(member)
            self._finish(result)
            if result.status == "complete":
                remove_checkpoints(member.directory)

    def _train(self, member: _Member, batch: StepBatch, teacher: TeacherViews | None) -> None:
        parts = member.arm.train_step(batch, teacher)
        step = member.arm.step
        ends = step % self.steps_per_epoch == 0 or step == member.arm.total_steps
        begins = step == 1 or member.arm.objective.begins(step - 1)
        if begins or step % member.config.runtime.log_every == 0 or ends:
            member.recorder.metrics(step, {name: _number(value) for name, value in parts.items()})
        self.progress(member.frozen.arm_key, step, member.arm.total_steps)

    def _end_epoch(self, member: _Member, epoch: int, clock: _Clock) -> ArmResult | None:
        arm = member.arm
        final = arm.step == arm.total_steps
        values = clock.metrics()
        if (epoch + 1) % member.config.recipe.validate_every == 0 or final:
            values.update(arm.evaluate(self.splits.validation, "val"))
        member.recorder.metrics(arm.step, values)
        if final:
            if not self.owned(member.frozen.arm_key):
                return self._lost(member)
            self._save(member)
            return self._complete(member)
        if time.monotonic() - member.saved_at >= member.config.runtime.checkpoint_interval:
            if not self.owned(member.frozen.arm_key):
                return self._lost(member)
            self._save(member)
        return None

    def _lost(self, member: _Member) -> ArmResult:
        """The arm is another worker's now, whose checkpoint must not be overwritten."""
        log.warning("arm %s is now another worker's; leaving it", member.frozen.arm_key)
        return ArmResult(member.frozen.arm_key, "stopped", reason="taken over by another worker")

    def _complete(self, member: _Member) -> ArmResult:
        """The test set is read here, once, after the last step."""
        arm = member.arm
        metrics = arm.evaluate(self.splits.test, "test")
        metrics["val/top1"] = arm.evaluate(self.splits.validation, "val")["val/top1"]
        arm.export(member.directory)
        member.recorder.metrics(arm.step, {name: value for name, value in metrics.items() if name.startswith("test/")})
        member.recorder.flush()
        return ArmResult(member.frozen.arm_key, "complete", metrics)

    def _save(self, member: _Member) -> None:
        state = {
            "arm_key": member.frozen.arm_key,
            "arm": member.arm.state(),
            "recorded": member.recorder.flush(),
            "threads": member.config.runtime.threads,
            "torch": str(torch.__version__),
        }
        save_checkpoint(member.directory, state)
        member.saved_at = time.monotonic()

    def _leave(self, member: _Member) -> ArmResult:
        # another worker's checkpoint must not be overwritten
        if self.owned(member.frozen.arm_key):
            self._save(member)
        return ArmResult(member.frozen.arm_key, "stopped", reason="asked to stop")

    def _finish(self, result: ArmResult) -> None:
        self.results.append(result)
        self.on_finished(result)


@dataclass
class _Clock:
    """Throughput of an epoch, for the log only."""

    start: float
    data: float = 0.0
    images: int = 0
    arms: int = 1

    def metrics(self) -> dict[str, float]:
        elapsed = max(1e-9, time.perf_counter() - self.start)
        values = {"time/images_per_second": self.images / elapsed, "time/data_wait_share": self.data / elapsed}
        values["time/arms_in_cohort"] = float(self.arms)
        values.update(system_metrics())
        return values


def system_metrics() -> dict[str, float]:
    """CPU share and resident memory of this process, where psutil is installed."""
    try:
        import psutil
    except ImportError:
        return {}
    process = psutil.Process(os.getpid())
    return {
        "system/cpu_percent": psutil.cpu_percent(),
        "system/memory_rss_megabytes": process.memory_info().rss / 1e6,
    }


def _number(value: Tensor | float) -> float:
    return float(value)


def reason_of(error: BaseException) -> str:
    """One line for people: the message, and the kind of error where that is not BASD's own."""
    text = " ".join(str(error).split())
    own = type(error).__module__.startswith("basd.")
    return text if own and text else f"{type(error).__name__}: {text}" if text else type(error).__name__


def choose_device(wanted: str) -> torch.device:
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UserError(f"runtime.device={wanted} is not a device; write auto, cpu, cuda or cuda:0.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"runtime.device={wanted}, but no CUDA device is usable here; choose runtime.device=cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"runtime.device={wanted}, but there are {torch.cuda.device_count()} CUDA devices, numbered from 0."
        )
    return device


def check_fingerprint(prepared: PreparedTeacher, arm: FrozenArm) -> None:
    if prepared.fingerprint != arm.teacher_fingerprint:
        raise UserError(
            f"the teacher's weights here ({prepared.fingerprint}) are not those of the plan ({arm.teacher_fingerprint}); "
            "plan again, or restore the teacher with BASD_CACHE or teacher.weights."
        )


@contextmanager
def cpu_threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_cohort(
    arms: Sequence[FrozenArm], directories: Sequence[Path], recorders: Sequence[Recorder], **callbacks: Any
) -> list[ArmResult]:
    """Train arms of one cohort key; see `Cohort` for the callbacks stop, owned, progress, finished.

    An arm whose directory holds a checkpoint goes on from there. `UserError` where the cohort as a whole cannot start.
    """
    threads = int(arms[0].config["runtime"]["threads"])
    with cpu_threads(threads):
        return Cohort(arms, directories, recorders, **callbacks).run()


def write_arm(directory: Path, arm: FrozenArm) -> None:
    """`arm.json` in the arm's directory: what `python -m basd.training` runs."""
    directory.mkdir(parents=True, exist_ok=True)
    fresh = directory / f"arm.json.{os.getpid()}.tmp"
    fresh.write_text(json.dumps(arm.to_dict(), indent=1, sort_keys=True) + "\n")
    os.replace(fresh, directory / "arm.json")


def read_arm(path: Path) -> FrozenArm:
    try:
        values: Mapping[str, Any] = json.loads(path.read_text())
        return FrozenArm.from_dict(values)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist.") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is not a frozen arm (arm.json as a plan writes it).") from error
