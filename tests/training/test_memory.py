"""One arm's activations at a time, and what is said where memory was not enough."""

from __future__ import annotations

import gc
import itertools
import logging
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from tiny import MemoryRecorder, same_bits, state_of
from watching import TEACHER, forwards, student_steps

from basd.config import FrozenArm
from basd.errors import TOO_MANY_ARMS, UserError
from basd.grid.ledger import Ledger
from basd.grid.options import GridOptions
from basd.grid.worker import Worker
from basd.models.student import StudentOutput
from basd.models.teacher import TeacherOutput
from basd.tracking.journal import read_events
from basd.training.cohort import train_cohort
from basd.training.memory import WORTH_COLLECTING, asked_bytes, bytes_of, gibibytes, is_out_of_memory, out_of_memory

MakeArm = Callable[..., FrozenArm]
ROWS = [(), ("selector=uniform",), ("weighting=uncertainty",), ("method=vrm",), ("method=ce",)]
CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4294967296 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA_MESSAGE = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 8.00 GiB of which 0 is free."
)
# two tokens an image, and from the second step on a state that is worth a collection at the arm's end
WIDE = ("student.width=120", "student.depth=4", "student.patch_size=20")


def train(arms: list[FrozenArm], folder: Path) -> tuple[list[MemoryRecorder], list]:
    recorders = [MemoryRecorder() for _ in arms]
    return recorders, train_cohort(arms, [folder / arm.arm_key for arm in arms], recorders)


# -- what stays --------------------------------------------------------------------------------------------------------


def test_no_graph_of_an_arm_is_alive_in_the_next_ones_step(few_arm: MakeArm, tmp_path: Path) -> None:
    """Without the garbage collector: what only a cycle keeps would fill a device before it runs."""
    alive: list[weakref.ref] = []
    left: list[int] = []

    def outputs(module: torch.nn.Module, _inputs: tuple, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.grad_fn is not None:
            alive.append(weakref.ref(output))

    def begins(_student: VisionTransformer, arm: int, step: int) -> None:
        # vrm's student sees two views a step, the second while the graph of the first is needed
        if arm == 3 and step % 2:
            return
        left.append(sum(reference() is not None for reference in alive))
        if len(left) in (3, 9):
            # of anything: losses, mixtures, weights
            left.append(graphs() - before)

    def graphs() -> int:
        return sum(
            isinstance(o, StudentOutput) or (isinstance(o, torch.Tensor) and o.grad_fn is not None)
            for o in gc.get_objects()
        )

    gc.collect()
    # what earlier tests of this process have left
    before = graphs()
    gc.disable()
    handle = torch.nn.modules.module.register_module_forward_hook(outputs)
    try:
        with student_steps(begins):
            _, results = train([few_arm(*row, "recipe.duration=2 steps", "warmup=none") for row in ROWS], tmp_path)
    finally:
        handle.remove()
        gc.enable()
    assert {result.status for result in results} == {"complete"}
    assert len(alive) > 200
    assert left == [0] * len(left)


def test_the_teachers_output_of_a_step_is_gone_in_the_next(few_arm: MakeArm, tmp_path: Path) -> None:
    def outputs() -> int:
        return sum(isinstance(o, TeacherOutput) for o in gc.get_objects())

    left: list[int] = []
    gc.collect()
    before = outputs()
    gc.disable()
    try:
        with forwards(lambda width, _images: left.append(outputs() - before) if width == TEACHER else None):
            train([few_arm("recipe.duration=3 steps", "warmup=none", *row) for row in ROWS[:2]], tmp_path)
    finally:
        gc.enable()
    assert left == [0, 0, 0]


def test_an_arm_that_failed_leaves_its_memory_to_the_others(
    few_arm: MakeArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    students: list[weakref.ref] = []
    gone: list[bool] = []

    def failing(student: VisionTransformer, arm: int, step: int) -> None:
        if step == 0:
            students.append(weakref.ref(student))
            assert 16 * sum(p.numel() for p in student.parameters()) > WORTH_COLLECTING
        if (arm, step) == (0, 1):
            raise torch.OutOfMemoryError(CUDA_MESSAGE)
        if (arm, step) == (1, 1):
            gone.append(students[0]() is None)

    # a record that is kept, as pytest does, keeps the frames of its error
    monkeypatch.setattr(logging.getLogger("basd.training"), "disabled", True)
    arms = [few_arm(f"method={name}", "recipe.duration=3 steps", *WIDE) for name in ("kd", "ce")]
    with student_steps(failing):
        train(arms, tmp_path)
    assert gone == [True]


def test_bytes_are_counted_once() -> None:
    weight = torch.zeros(10, 3)
    assert bytes_of([weight, weight, torch.zeros(4, dtype=torch.float16)]) == 128


# -- not enough --------------------------------------------------------------------------------------------------------


def test_an_arm_that_finds_no_room_beside_others_is_left_and_they_go_on(few_arm: MakeArm, tmp_path: Path) -> None:
    arms = [few_arm("recipe.duration=3 steps"), few_arm("method=ce", "recipe.duration=3 steps")]
    (expected,), _ = train(arms[1:], tmp_path / "alone")
    key = arms[1].arm_key
    for error in (torch.OutOfMemoryError(CUDA_MESSAGE), RuntimeError(CPU_MESSAGE)):

        def failing(_student: VisionTransformer, arm: int, step: int, error: Exception = error) -> None:
            if (arm, step) == (0, 1):
                raise error

        folder = tmp_path / type(error).__name__
        with student_steps(failing):
            (_, other), results = train(arms, folder)
        assert [(result.status, result.arm_key, result.reason) for result in results] == [
            ("stopped", arms[0].arm_key, TOO_MANY_ARMS),
            ("complete", arms[1].arm_key, ""),
        ], error
        assert other.results == expected.results, error
        assert same_bits(state_of(folder / key), state_of(tmp_path / "alone" / key)), error


def test_an_arm_that_does_not_fit_alone_says_what_to_change(few_arm: MakeArm, tmp_path: Path) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError(CPU_MESSAGE)

    arms = [few_arm("method=ce", "recipe.accumulation=2", f"recipe.lr=0.00{n}") for n in (1, 2, 3)]
    with student_steps(failing):
        _, results = train(arms, tmp_path)
    # each leaves the memory to the next; the last one has it all
    assert [result.status for result in results] == ["stopped", "stopped", "failed"]
    reason = results[-1].reason
    assert reason.startswith("out of memory (")
    assert "\n" not in reason
    assert "recipe.batch_size=20 (now 40" in reason
    assert "recipe.accumulation=4" in reason


def test_where_nothing_else_is_held_the_first_arm_that_cannot_be_built_has_failed(
    few_arm: MakeArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arms = [few_arm("method=ce", f"recipe.lr=0.00{n}", "recipe.duration=1 steps") for n in (1, 2, 3)]
    optimizer, built = torch.optim.AdamW, itertools.count()

    def failing(*arguments: object, **options: object) -> torch.optim.Optimizer:
        if next(built) != 1:
            raise torch.OutOfMemoryError(CUDA_MESSAGE)
        return optimizer(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.optim, "AdamW", failing)
    _, results = train(arms, tmp_path)
    assert [result.status for result in results] == ["failed", "stopped", "complete"]
    assert results[1].reason == TOO_MANY_ARMS


def no_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError(CUDA_MESSAGE)


def test_what_a_step_shares_and_finds_no_room_stops_several_arms_and_fails_one(
    few_arm: MakeArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # crops are products of images with matrices
    monkeypatch.setattr(torch, "bmm", no_memory)
    arms = [few_arm("method=ce", f"recipe.lr=0.00{n}") for n in (1, 2)]
    _, results = train(arms, tmp_path)
    assert [(result.status, result.reason) for result in results] == [("stopped", TOO_MANY_ARMS)] * 2
    with pytest.raises(UserError, match="out of memory outside of any arm"):
        train(arms[:1], tmp_path)


def test_a_worker_trains_the_arms_of_a_cohort_that_did_not_fit(few_arm: MakeArm, tmp_path: Path) -> None:
    """Three arms, room for two: none fails, and what is trained has the bits that it has alone."""
    arms = [
        few_arm("method=ce", "recipe.duration=2 epochs", "recipe.batch_size=100", f"recipe.lr=0.00{n}", *WIDE)
        for n in (1, 2, 3)
    ]
    _, expected = train(arms, tmp_path / "whole")
    assert {result.status for result in expected} == {"complete"}
    options = GridOptions(directory=str(tmp_path / "runs"), ledger_url=f"sqlite:///{tmp_path}/ledger.db", retries=0)
    ledger = Ledger(options.ledger_url, "tiny", retries=0)
    ledger.ensure(arms, {}, "table")
    gc.collect()
    alive: weakref.WeakSet[VisionTransformer] = weakref.WeakSet()
    failed: list[int] = []

    def limited(student: VisionTransformer, _arm: int, step: int) -> None:
        alive.add(student)
        if step and len(alive) > 2:
            failed.append(step)
            raise RuntimeError(CPU_MESSAGE)

    worker = Worker({arm.arm_key: arm for arm in arms}, ledger, options)
    with student_steps(limited):
        assert worker.work() == 3
    states = ledger.arms([arm.arm_key for arm in arms]).values()
    assert [(state.state, state.retries) for state in states] == [("complete", 0)] * 3
    assert failed == [1]
    for arm in arms:
        directory = options.arm_directory("tiny", arm.arm_key)
        assert same_bits(state_of(directory), state_of(tmp_path / "whole" / arm.arm_key))
        events = [
            event for event in read_events(directory / "journal.jsonl") if "system/held_megabytes" in event.metrics
        ]
        assert len(events) == 2


def test_a_teacher_that_does_not_fit_is_one_sentence(
    few_arm: MakeArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arm = few_arm()
    monkeypatch.setattr(torch.nn.Module, "to", no_memory)
    with pytest.raises(UserError, match="out of memory outside of any arm"):
        train([arm], tmp_path)


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
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 8 * 2**30))
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
