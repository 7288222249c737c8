"""One arm's activations at a time, and what is said where memory was not enough."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import MemoryRecorder, same_bits, state_of

from basd.config import FrozenArm
from basd.errors import TOO_MANY_ARMS, UserError
from basd.grid.ledger import Ledger
from basd.grid.options import GridOptions
from basd.grid.worker import Worker
from basd.models.student import TappedStudent
from basd.models.teacher import Teacher
from basd.tracking.journal import read_events
from basd.training import memory
from basd.training.arm import TrainingArm
from basd.training.batches import StepBatch
from basd.training.cohort import train_cohort
from basd.training.memory import asked_bytes, bytes_of, gibibytes, is_out_of_memory, out_of_memory

MakeArm = Callable[..., FrozenArm]
ROWS = [(), ("selector=uniform",), ("weighting=uncertainty",), ("method=vrm",), ("method=ce",)]
CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4294967296 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA_MESSAGE = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 8.00 GiB of which 0 is free."
)


def train(arms: list[FrozenArm], folder: Path) -> tuple[list[MemoryRecorder], list]:
    recorders = [MemoryRecorder() for _ in arms]
    return recorders, train_cohort(arms, [folder / arm.arm_key for arm in arms], recorders)


# -- what stays --------------------------------------------------------------------------------------------------------


def test_no_graph_of_an_arm_is_alive_in_the_next_ones_step(
    tiny_arm: MakeArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the garbage collector: what only a cycle keeps would fill a device before it runs."""
    alive: list[weakref.ref] = []
    left: list[int] = []
    forward, step = TappedStudent.__call__, TrainingArm.train_step

    def seen_forward(self, images):
        out = forward(self, images)
        alive.extend(weakref.ref(t) for t in (out.logits, out.tokens, out.scores, out.features) if t is not None)
        return out

    def seen_step(self, batch, teacher):
        left.append(sum(reference() is not None for reference in alive))
        if len(left) in (3, 9):
            # of anything: losses, mixtures, weights
            left.append(graphs() - before)
        return step(self, batch, teacher)

    def graphs() -> int:
        return sum(isinstance(o, torch.Tensor) and o.grad_fn is not None for o in gc.get_objects())

    monkeypatch.setattr(TappedStudent, "__call__", seen_forward)
    monkeypatch.setattr(TrainingArm, "train_step", seen_step)
    gc.collect()
    # what earlier tests of this process have left
    before = graphs()
    gc.disable()
    try:
        _, results = train([tiny_arm(*row, "recipe.duration=2 steps", "warmup=none") for row in ROWS], tmp_path)
    finally:
        gc.enable()
    assert {result.status for result in results} == {"complete"}
    assert len(alive) > 20
    assert left == [0] * len(left)


def test_the_teachers_output_of_a_step_is_gone_in_the_next(
    tiny_arm: MakeArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref] = []
    left: list[int] = []
    call = Teacher.__call__

    def seen(self, images):
        left.append(sum(reference() is not None for reference in alive))
        out = call(self, images)
        alive.append(weakref.ref(out))
        return out

    monkeypatch.setattr(Teacher, "__call__", seen)
    gc.collect()
    gc.disable()
    try:
        train([tiny_arm("recipe.duration=3 steps", "warmup=none", *row) for row in ROWS[:2]], tmp_path)
    finally:
        gc.enable()
    assert left == [0, 0, 0]


def test_an_arm_that_failed_leaves_its_memory_to_the_others(
    tiny_arm: MakeArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    students: dict[str, weakref.ref] = {}
    gone: list[bool] = []
    step = TrainingArm.train_step

    def failing(self, batch, teacher):
        name = self.config.method
        students.setdefault(name, weakref.ref(self.student))
        if name == "basd" and self.step == 1:
            raise torch.OutOfMemoryError(CUDA_MESSAGE)
        if name == "ce" and self.step == 1:
            gone.append(students["basd"]() is None)
        return step(self, batch, teacher)

    monkeypatch.setattr(TrainingArm, "train_step", failing)
    monkeypatch.setattr("basd.training.cohort.WORTH_COLLECTING", 0)
    # a record that is kept, as pytest does, keeps the frames of its error
    monkeypatch.setattr(logging.getLogger("basd.training"), "disabled", True)
    train([tiny_arm("recipe.duration=3 steps"), tiny_arm("method=ce", "recipe.duration=3 steps")], tmp_path)
    assert gone == [True]


def test_bytes_are_counted_once() -> None:
    weight = torch.zeros(10, 3)
    assert bytes_of([weight, weight, torch.zeros(4, dtype=torch.float16)]) == 128


# -- not enough --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError(CUDA_MESSAGE), RuntimeError(CPU_MESSAGE)], ids=["cuda", "cpu"]
)
def test_an_arm_that_finds_no_room_beside_others_is_left_and_they_go_on(
    error: Exception, tiny_arm: MakeArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = [tiny_arm("recipe.duration=3 steps"), tiny_arm("method=ce", "recipe.duration=3 steps")]
    (expected,), _ = train(arms[1:], tmp_path / "alone")
    step = TrainingArm.train_step

    def failing(self, batch, teacher):
        if self.config.method == "basd" and self.step == 1:
            raise error
        return step(self, batch, teacher)

    monkeypatch.setattr(TrainingArm, "train_step", failing)
    (_, other), results = train(arms, tmp_path / "both")
    assert [(result.status, result.arm_key, result.reason) for result in results] == [
        ("stopped", arms[0].arm_key, TOO_MANY_ARMS),
        ("complete", arms[1].arm_key, ""),
    ]
    assert other.results == expected.results
    key = arms[1].arm_key
    assert same_bits(state_of(tmp_path / "both" / key), state_of(tmp_path / "alone" / key))


def test_an_arm_that_does_not_fit_alone_says_what_to_change(
    tiny_arm: MakeArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self, batch, teacher):
        raise RuntimeError(CPU_MESSAGE)

    monkeypatch.setattr(TrainingArm, "train_step", failing)
    arms = [tiny_arm("method=ce", "recipe.accumulation=2", f"recipe.lr=0.00{n}") for n in (1, 2, 3)]
    _, results = train(arms, tmp_path)
    # each leaves the memory to the next; the last one has it all
    assert [result.status for result in results] == ["stopped", "stopped", "failed"]
    reason = results[-1].reason
    assert reason.startswith("out of memory (")
    assert "\n" not in reason
    assert "recipe.batch_size=100 (now 200" in reason
    assert "recipe.accumulation=4" in reason


def test_where_nothing_else_is_held_the_first_arm_that_cannot_be_built_has_failed(
    tiny_arm: MakeArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = [tiny_arm("method=ce", f"recipe.lr=0.00{n}", "recipe.duration=1 steps") for n in (1, 2, 3)]
    build = TrainingArm.__init__

    def failing(self, config, *arguments):
        if config.recipe.lr != 0.002:
            raise torch.OutOfMemoryError(CUDA_MESSAGE)
        build(self, config, *arguments)

    monkeypatch.setattr(TrainingArm, "__init__", failing)
    _, results = train(arms, tmp_path)
    assert [result.status for result in results] == ["failed", "stopped", "complete"]
    assert results[1].reason == TOO_MANY_ARMS


def test_what_a_step_shares_and_finds_no_room_stops_several_arms_and_fails_one(
    tiny_arm: MakeArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self, size):
        raise torch.OutOfMemoryError(CUDA_MESSAGE)

    monkeypatch.setattr(StepBatch, "clean", failing)
    arms = [tiny_arm("method=ce", f"recipe.lr=0.00{n}") for n in (1, 2)]
    _, results = train(arms, tmp_path)
    assert [(result.status, result.reason) for result in results] == [("stopped", TOO_MANY_ARMS)] * 2
    with pytest.raises(UserError, match="out of memory outside of any arm"):
        train(arms[:1], tmp_path)


def test_a_worker_trains_the_arms_of_a_cohort_that_did_not_fit(
    tiny_arm: MakeArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three arms, room for two: none fails, and what is trained has the bits that it has alone."""
    arms = [tiny_arm("method=ce", "recipe.duration=2 epochs", f"recipe.lr=0.00{n}") for n in (1, 2, 3)]
    _, expected = train(arms, tmp_path / "whole")
    assert {result.status for result in expected} == {"complete"}
    options = GridOptions(directory=str(tmp_path / "runs"), ledger_url=f"sqlite:///{tmp_path}/ledger.db", retries=0)
    ledger = Ledger(options.ledger_url, "tiny", retries=0)
    ledger.ensure(arms, {}, "table")
    alive: weakref.WeakSet[TrainingArm] = weakref.WeakSet()
    sizes: list[int] = []
    step = TrainingArm.train_step

    def limited(self, batch, teacher):
        alive.add(self)
        sizes.append(len(alive))
        if len(alive) > 2:
            raise RuntimeError(CPU_MESSAGE)
        return step(self, batch, teacher)

    monkeypatch.setattr(TrainingArm, "train_step", limited)
    monkeypatch.setattr("basd.training.cohort.WORTH_COLLECTING", 0)
    worker = Worker({arm.arm_key: arm for arm in arms}, ledger, options)
    assert worker.work() == 3
    states = ledger.arms([arm.arm_key for arm in arms]).values()
    assert [(state.state, state.retries) for state in states] == [("complete", 0)] * 3
    assert sizes.count(3) == 1
    for arm in arms:
        directory = options.arm_directory("tiny", arm.arm_key)
        assert same_bits(state_of(directory), state_of(tmp_path / "whole" / arm.arm_key))
        events = [
            event for event in read_events(directory / "journal.jsonl") if "system/held_megabytes" in event.metrics
        ]
        assert len(events) == 2


def test_a_teacher_that_does_not_fit_is_one_sentence(
    tiny_arm: MakeArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self, *arguments):
        raise torch.OutOfMemoryError(CUDA_MESSAGE)

    monkeypatch.setattr(Teacher, "__init__", failing)
    with pytest.raises(UserError, match="out of memory outside of any arm"):
        train([tiny_arm()], tmp_path)


def test_other_errors_are_none_of_memory() -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(None)
    wrapped = ValueError("compiling failed")
    wrapped.__cause__ = torch.OutOfMemoryError(CUDA_MESSAGE)
    assert is_out_of_memory(wrapped)
    assert asked_bytes(wrapped) == 3 * 2**29
    assert asked_bytes(RuntimeError(CPU_MESSAGE)) == 2**32
    own = MemoryError()
    own.__cause__ = own
    assert asked_bytes(own) == 0
    assert asked_bytes(MemoryError()) == 0


def test_figures_follow_from_what_was_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "peak_bytes", lambda device: 7 * 2**30)
    monkeypatch.setattr(memory, "total_bytes", lambda device: 8 * 2**30)
    said = out_of_memory(
        torch.OutOfMemoryError("Tried to allocate 3.00 GiB"),
        torch.device("cuda"),
        precision="fp32",
        batch_size=64,
        accumulation=1,
        fixed=5 * 2**30,
    )
    assert said == (
        "out of memory (10.0 GiB or more are needed, cuda has 8.0 GiB): set runtime.precision=bf16, or recipe.batch_size=32 "
        "(now 64; it would need about 7.5 GiB), or recipe.accumulation=2, which halves what a step holds of the batch."
    )
    assert gibibytes(2**28) == "256 MiB"
