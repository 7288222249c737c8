"""The training loop: one for one arm or many. Arms of one cohort key share the order of samples and the teacher's forward.

batch → (clean view, strong view, labels) → one teacher forward → for each arm: mix its student view → student → losses →
step → record. The result of an arm is the same bits alone and in any cohort.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from basd import distributed
from basd.config import Config, FrozenArm, from_dict
from basd.data import load as load_data
from basd.data.disk import DiskImages
from basd.data.feed import worker_count
from basd.data.images import Splits, epoch_order, fingerprint
from basd.distributed import local_rows, rank, world
from basd.errors import DISK_FULL, TOO_MANY_ARMS, UserError, is_disk_full, reason_of
from basd.models.teacher import Teacher
from basd.objective import demands
from basd.training import random_streams as streams
from basd.training.arm import NonFiniteLossError, TrainingArm
from basd.training.batches import CropFeed, StepBatch, TeacherViews
from basd.training.bias import BiasProbes
from basd.training.checkpoint import load_checkpoint, remove_checkpoints, save_checkpoint
from basd.training.clock import EpochClock
from basd.training.device import check_device, cpu_threads
from basd.training.memory import (
    WORTH_COLLECTING,
    begin_peak,
    bytes_of,
    is_out_of_memory,
    keep_freed_memory,
    out_of_memory,
    peak_bytes,
)
from basd.training.precision import choose_precision, compiler, half_type
from basd.training.recorder import Recorder
from basd.training.teachers import check_fingerprint, prepare_head, prepare_teacher, statistics_of
from basd.training.team import announce

log = logging.getLogger("basd.training")

Status = Literal["complete", "failed", "stopped", "pruned"]


@dataclass
class ArmResult:
    arm_key: str
    status: Status
    metrics: dict[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(eq=False)
class _Member:
    """An arm with where it lies and where it reports."""

    frozen: FrozenArm
    config: Config
    directory: Path
    recorder: Recorder
    arm: TrainingArm
    saved_at: float = 0.0
    # images of this epoch that another stood for, where data on disk may be skipped
    corrupt: int = 0


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
        prune: Callable[[str, int, Mapping[str, float]], str] = lambda _key, _epoch, _values: "",
    ) -> None:
        assert arms and len({arm.cohort_key for arm in arms}) == 1, "arms of one cohort key train side by side"
        self.stop, self.owned, self.progress, self.on_finished = stop, owned, progress, finished
        # told the validation metrics after so many epochs; says why the arm is left, "" where it goes on
        self.prune = prune
        configs = [from_dict(arm.config) for arm in arms]
        first = configs[0]
        self.seed = first.seed
        self.data = first.data
        self.device = check_device(first)
        if world() > 1 and self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        splits = distributed.first_then_all(lambda: load_data(first.data))
        check_data(splits, arms[0])
        self.splits = Splits(*(part.to(self.device) for part in splits))
        self.may_skip = isinstance(splits.train, DiskImages) and splits.train.skip
        self.view_size = first.student.image_size
        self.steps_per_epoch = len(splits.train) // first.recipe.batch_size
        self.batch_size = first.recipe.batch_size
        self.accumulation = first.recipe.accumulation
        if self.device.type == "cpu":
            keep_freed_memory()
        begin_peak(self.device)
        self.teacher_config = first.teacher
        self.teacher: Teacher | None = None
        if any(config.enabled for config in configs):
            wanted = [demands(config.losses, config.head_aligner) for config in configs]
            logits = any(want.logits for want in wanted)
            prepared = distributed.first_then_all(
                lambda: prepare_teacher(first.teacher, first.data, splits, logits=logits)
            )
            check_fingerprint(prepared, arms[0])
            head = None
            if logits:
                make = partial(prepare_head, prepared, first.teacher, first.data, splits)
                head = distributed.first_then_all(make).to(self.device)
                distributed.copy_from_first(head.parameters())
            half = half_type(first.runtime.precision, self.device)
            wrap = compiler(first.runtime.compile, self.device)
            maps = any(want.maps for want in wanted)
            self.teacher = Teacher(prepared.model.to(self.device), maps, head, half, wrap)
        self.probes = BiasProbes(arms[0], first, self.splits, self.device, self.teacher)
        # whole pairs of mixing partners: each process has its share of the batch, in parts
        shares = self.accumulation * world()
        self.rows: list[Tensor | None] = [None]
        if shares > 1:
            self.rows = [local_rows(self.batch_size, part, shares) for part in range(rank(), shares, world())]
        self.feed = CropFeed(
            self.splits.train,
            self.batch_size,
            self.seed,
            max(arm.total_steps for arm in arms),
            parts=self.rows,
            own=any(getattr(config.views, "geometry", "") == "independent" for config in configs),
            workers=worker_count(first.runtime.workers, self.device),
        )
        self.unreadable: set[str] = set()
        self.results: list[ArmResult] = []
        self.members: list[_Member] = []
        for frozen, config, directory, recorder in zip(arms, configs, directories, recorders, strict=True):
            try:
                start = partial(self._start, frozen, config, directory, recorder)
                self.members.append(distributed.attempt(start))
            except distributed.PeerLostError:
                raise
            except Exception as error:
                self._finish(self._failure(error, frozen.arm_key, config, len(self.members) + 1))

    def _start(self, frozen: FrozenArm, config: Config, directory: Path, recorder: Recorder) -> _Member:
        shape = self.teacher.shape if self.teacher else None
        arm = TrainingArm(config, shape, self.splits.train.classes, self.steps_per_epoch, self.device)
        state = distributed.by_first(partial(self._begin, frozen, directory, recorder))
        if state is None:
            # equal seeds give equal weights on machines of one kind; here they must be the same bits
            distributed.copy_from_first(arm.weights)
        else:
            arm.load(state["arm"])
            now = (config.runtime.threads, arm.precision, str(torch.__version__))
            before = (state["threads"], state.get("precision", "fp32"), state["torch"])
            if now != before:
                log.warning(
                    "arm %s goes on with %d threads, %s and torch %s, its start had %d, %s and %s: its numbers may differ",
                    *(frozen.arm_key, *now, *before),
                )
        corrupt = int(state.get("corrupt", 0)) if state is not None else 0
        return _Member(frozen, config, directory, recorder, arm, saved_at=time.monotonic(), corrupt=corrupt)

    def _begin(self, frozen: FrozenArm, directory: Path, recorder: Recorder) -> dict[str, Any] | None:
        """The checkpoint that an arm goes on from, its record cut to what the checkpoint knows; None: the first step."""
        directory.mkdir(parents=True, exist_ok=True)
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
        return state

    def run(self) -> list[ArmResult]:
        """Train until no arm is left; returns the results in the order in which the arms ended."""
        try:
            for _ in self.steps():
                pass
        except Exception as error:
            # what a step shares found no room beside the arms; processes of torchrun must not part here
            if world() > 1 or len(self.members) < 2 or not is_out_of_memory(error):
                raise
            left, self.members = self.members, []
            for member in left:
                self._finish(self._failure(error, member.frozen.arm_key, member.config, len(left)))
        return self.results

    def steps(self) -> Generator[int, None, None]:
        """As `run`, handing over after each step, with its number from 0."""
        for member in list(self.members):
            # killed after its last step but before its end was written
            if member.arm.step >= member.arm.total_steps:
                self._attempt(member, partial(self._complete, member))
        try:
            while self.members:
                step = min(member.arm.step for member in self.members)
                epoch = step // self.steps_per_epoch
                yield from self._epoch(epoch, step - epoch * self.steps_per_epoch)
        finally:
            self.feed.close()

    def _epoch(self, epoch: int, first: int) -> Iterator[int]:
        """From batch `first` of an epoch to its end."""
        order = epoch_order(len(self.splits.train), self.batch_size, streams.generator(self.seed, streams.ORDER, epoch))
        clock = EpochClock(time.perf_counter())
        for position in range(first, self.steps_per_epoch):
            asked = self.stop()
            if distributed.any_rank(asked):
                if not asked and hasattr(self.stop, "ask"):
                    # another process was: what is trained after this cohort must not start either
                    self.stop.ask()
                for member in list(self.members):
                    self._attempt(member, partial(self._leave, member))
                return
            step = epoch * self.steps_per_epoch + position
            # members further along wait for the others; those that are through have left
            due = [member for member in self.members if member.arm.step == step]
            if not due:
                continue
            for batch in self._batches(order[position], epoch, step, clock):
                teacher = None
                if self.teacher is not None:
                    mean, std = statistics_of(self.teacher_config, self.data)
                    teacher = TeacherViews(self.teacher, batch, self.teacher_config.image_size, mean, std)
                for member in due:
                    if member in self.members:
                        self._attempt(member, partial(self._train, member, batch, teacher))
                # before the next batch and before evaluations: the teacher's tokens and maps are the most that a step holds
                del batch, teacher
            clock.images += self.batch_size
            clock.steps += 1
            clock.arms = len(due)
            last = position == self.steps_per_epoch - 1
            # one that was an epoch ahead stands here too, but has ended its epoch before
            ending = [m for m in due if m in self.members and (last or m.arm.step == m.arm.total_steps)]
            # before the first of them is evaluated, which is no part of the others' epoch
            costs = self._costs(clock) if ending else {}
            for member in ending:
                self._attempt(member, partial(self._end_epoch, member, epoch, costs))
            yield step

    def _batches(self, indices: Tensor, epoch: int, step: int, clock: EpochClock) -> Iterator[StepBatch]:
        """The parts of a step's batch, one after the other, with their clean views made."""
        for part, rows in enumerate(self.rows):
            began = time.perf_counter()
            crops = self.feed.crops(step, part)
            batch = StepBatch(self.splits.train, indices, self.data, self.seed, epoch, step, rows, crops)
            # the views that every arm starts from are input, and counted as such
            batch.clean(self.members[0].config.student.image_size if self.members else self.view_size)
            clock.data += time.perf_counter() - began
            for said in batch.unreadable:
                if said not in self.unreadable:
                    self.unreadable.add(said)
                    log.warning("%s cannot be decoded; another image of the split stands for it", said)
            yield batch
            del batch

    def _attempt(self, member: _Member, action: Callable[[], ArmResult | None]) -> None:
        """A failure of one arm never stops the others. An action that returns a result ends the arm."""
        try:
            result = distributed.attempt(action)
        except distributed.PeerLostError:
            raise
        except Exception as error:
            result = self._failure(error, member.frozen.arm_key, member.config, len(self.members))
        if result is not None:
            self.members.remove(member)
            self._finish(result)
            # what the arm held goes to those that stay; a model with hooks is a cycle that only the collector frees
            large = member.arm.held_bytes() >= WORTH_COLLECTING
            del member.arm, action
            if large:
                gc.collect()
            if result.status == "complete" and rank() == 0:
                remove_checkpoints(member.directory)

    def _failure(self, error: Exception, key: str, config: Config, arms: int) -> ArmResult:
        """The end of an arm by an error, `arms` being held in memory. What is none of its own stops it only: a full disk, or
        memory that others have; it goes on from its checkpoint where there is room."""
        room = DISK_FULL if is_disk_full(error) else TOO_MANY_ARMS if arms > 1 and is_out_of_memory(error) else None
        if room is not None:
            log.warning("arm %s is left: %s", key, room)
            return ArmResult(key, "stopped", reason=room)
        reason = self._reason(error, config)
        expected = isinstance(error, UserError | NonFiniteLossError) or is_out_of_memory(error)
        log.error("arm %s failed: %s", key, reason, exc_info=None if expected else error)
        return ArmResult(key, "failed", reason=reason)

    def _reason(self, error: BaseException, config: Config) -> str:
        """One sentence about what ended an arm."""
        if not is_out_of_memory(error):
            return reason_of(error)
        held = sum(member.arm.held_bytes() for member in self.members)
        fixed = held + (bytes_of(self.teacher.model.parameters()) if self.teacher else 0)
        return out_of_memory(
            error,
            self.device,
            precision=choose_precision(config.runtime.precision, self.device),
            batch_size=self.batch_size,
            accumulation=self.accumulation,
            fixed=fixed,
        )

    def _train(self, member: _Member, batch: StepBatch, teacher: TeacherViews | None) -> None:
        parts = member.arm.train_step(batch, teacher)
        member.corrupt += len(batch.unreadable)
        step = member.arm.step
        if parts is None:
            self.progress(member.frozen.arm_key, step, member.arm.total_steps)
            return
        ends = step % self.steps_per_epoch == 0 or step == member.arm.total_steps
        begins = step == 1 or member.arm.objective.begins(step - 1)
        if begins or step % member.config.runtime.log_every == 0 or ends:
            self._record(member, parts)
        self.progress(member.frozen.arm_key, step, member.arm.total_steps)

    def _record(self, member: _Member, values: Mapping[str, Tensor | float]) -> None:
        def write() -> None:
            member.recorder.metrics(member.arm.step, {name: float(value) for name, value in values.items()})

        distributed.by_first(write)

    def _owned(self, member: _Member) -> bool:
        return distributed.by_first(lambda: self.owned(member.frozen.arm_key))

    def _costs(self, clock: EpochClock) -> dict[str, float]:
        """What the epoch took of time and memory."""
        values, peak = clock.metrics(), peak_bytes(self.device)
        return values if peak is None else {**values, "system/peak_megabytes": peak / 1e6}

    def _end_epoch(self, member: _Member, epoch: int, costs: Mapping[str, float]) -> ArmResult | None:
        arm = member.arm
        final = arm.step == arm.total_steps
        values = dict(costs)
        values["system/held_megabytes"] = arm.held_bytes() / 1e6
        if self.may_skip:
            values["data/corrupt"] = distributed.total(float(member.corrupt))
            member.corrupt = 0
        if (epoch + 1) % member.config.recipe.validate_every == 0 or final:
            values.update(arm.evaluate(self.splits.validation, "val"))
        self._record(member, values)
        if not final and "val/top1" in values:
            reason = distributed.by_first(lambda: self.prune(member.frozen.arm_key, epoch + 1, values))
            if reason:
                return self._pruned(member, reason)
        if final:
            if not self._owned(member):
                return self._lost(member)
            self._save(member)
            return self._complete(member)
        interval = member.config.runtime.checkpoint_interval
        if distributed.by_first(lambda: time.monotonic() - member.saved_at >= interval):
            if not self._owned(member):
                return self._lost(member)
            self._save(member)
        return None

    def _pruned(self, member: _Member, reason: str) -> ArmResult:
        """The end of an arm that others have overtaken; its checkpoint stays, for whoever wants the rest of it."""
        if not self._owned(member):
            return self._lost(member)
        self._save(member)
        return ArmResult(member.frozen.arm_key, "pruned", reason=reason)

    def _lost(self, member: _Member) -> ArmResult:
        """The arm is another worker's now, whose checkpoint must not be overwritten."""
        log.warning("arm %s is now another worker's; leaving it", member.frozen.arm_key)
        return ArmResult(member.frozen.arm_key, "stopped", reason="taken over by another worker")

    def _complete(self, member: _Member) -> ArmResult:
        """The test set is read here, once, after the last step."""
        arm = member.arm
        test, validation = arm.answer(self.splits.test, "test"), arm.answer(self.splits.validation, "val")
        distributed.by_first(lambda: arm.export(member.directory))
        ends = test.metrics("test")
        metrics = {**ends, **validation.metrics("val")}
        probes: dict[str, float] = {}
        if member.config.runtime.probes:
            probes = self.probes(arm, test, validation)
        self._record(member, {**ends, **probes, **arm.parameter_counts()})
        distributed.by_first(member.recorder.flush)
        return ArmResult(member.frozen.arm_key, "complete", metrics)

    def _save(self, member: _Member) -> None:
        distributed.by_first(partial(self._write, member))

    def _write(self, member: _Member) -> None:
        state = {
            "arm_key": member.frozen.arm_key,
            "arm": member.arm.state(),
            "recorded": member.recorder.flush(),
            "threads": member.config.runtime.threads,
            "precision": member.arm.precision,
            "corrupt": member.corrupt,
            "torch": str(torch.__version__),
        }
        save_checkpoint(member.directory, state)
        member.saved_at = time.monotonic()

    def _leave(self, member: _Member) -> ArmResult:
        # another worker's checkpoint must not be overwritten
        if self._owned(member):
            self._save(member)
        return ArmResult(member.frozen.arm_key, "stopped", reason="asked to stop")

    def _finish(self, result: ArmResult) -> None:
        self.results.append(result)
        self.on_finished(result)


def check_data(splits: Splits, arm: FrozenArm) -> None:
    """`UserError` where the data of this process is not what was planned: another copy, or files that changed since."""
    found = fingerprint(splits)
    if found != arm.data_fingerprint:
        raise UserError(
            f"the data here ({found}) is not that of the plan ({arm.data_fingerprint}); restore it, or plan again."
        )


def train_cohort(
    arms: Sequence[FrozenArm], directories: Sequence[Path], recorders: Sequence[Recorder], **callbacks: Any
) -> list[ArmResult]:
    """Train arms of one cohort key; see `Cohort` for the callbacks stop, owned, progress, finished, prune.

    An arm whose directory holds a checkpoint goes on from there. `UserError` where the cohort as a whole cannot start.
    """
    if world() > 1:
        announce(arms)
    return train_announced(arms, directories, recorders, **callbacks)


def train_announced(
    arms: Sequence[FrozenArm], directories: Sequence[Path], recorders: Sequence[Recorder], **callbacks: Any
) -> list[ArmResult]:
    """`train_cohort` on a process that has been told of the arms, as all others of the run have."""
    threads = int(arms[0].config["runtime"]["threads"])
    with cpu_threads(threads):
        try:
            return distributed.attempt(lambda: Cohort(arms, directories, recorders, **callbacks).run())
        except distributed.PeerLostError:
            raise  # whatever ended the other process, this one has to leave
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            # the failure of an arm does not come here
            raise UserError(
                "out of memory outside of any arm: the data, the teacher and the views of a batch do not fit; choose a smaller "
                "teacher or recipe.batch_size, or end other programs that use the device."
            ) from error


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
