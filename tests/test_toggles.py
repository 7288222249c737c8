"""What holds for every toggle: complete coverage, gradients, movement, bfloat16, resume, cohort = solo."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, MemoryRecorder, same_bits, state_of
from toggles import TOGGLES, overrides_of

from basd.compose import compose
from basd.config import GROUPS, Config, FrozenArm, flatten, from_dict
from basd.data import load
from basd.data.images import epoch_order
from basd.grid.plan import Preparer
from basd.models.student import build_student
from basd.models.teacher import Teacher
from basd.training import random_streams as streams
from basd.training.arm import TrainingArm
from basd.training.batches import StepBatch, TeacherViews
from basd.training.cohort import train_cohort
from basd.training.teachers import prepare_head

MakeArm = Callable[..., FrozenArm]
SMALL_BATCH = "recipe.batch_size=32"

# -- coverage ---------------------------------------------------------------------------------------------------------


def choices_of(config: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(key, choice) of every setting at or below a configuration that names its choices."""
    for spec in dataclasses.fields(config):
        value, where = getattr(config, spec.name), f"{path}.{spec.name}"
        if dataclasses.is_dataclass(value):
            yield from choices_of(value, where)
        for choice in spec.metadata.get("choices", ()):
            yield where, choice


def test_every_choice_is_a_toggle() -> None:
    seen: set[tuple[str, Any]] = set()
    for name in TOGGLES:
        seen |= {
            pair
            for pair in flatten(compose([*TINY, *overrides_of(name)]).config.to_dict())
            if not isinstance(pair[1], list)
        }
    wanted: set[tuple[str, Any]] = set()
    for group, members in GROUPS.items():
        if group in ("data", "teacher"):
            continue
        for choice, kind in members.items():
            wanted |= {(f"{group}.name", choice), *choices_of(kind(), group)}
    wanted |= set(choices_of(compose(TINY).config.losses, "losses"))
    assert wanted <= seen, sorted(map(str, wanted - seen))


# -- one arm, step by step --------------------------------------------------------------------------------------------


class Bench:
    """A tiny arm with its teacher, outside of any loop."""

    def __init__(self, frozen: FrozenArm, preparer: Preparer) -> None:
        self.config: Config = from_dict(frozen.config)
        self.splits = load(self.config.data)
        prepared = preparer(self.config).teacher
        self.head = None
        if self.config.demands.logits:
            self.head = prepare_head(prepared, self.config.teacher, self.config.data, self.splits)
        self.teacher = Teacher(prepared.model, self.config.demands.maps, self.head)
        classes, size = self.splits.train.classes, self.config.recipe.batch_size
        self.steps_per_epoch = len(self.splits.train) // size
        device = torch.device("cpu")
        self.arm = TrainingArm(self.config, self.teacher.shape, classes, self.steps_per_epoch, device)
        self.order = epoch_order(len(self.splits.train), size, streams.generator(0, streams.ORDER, 0))

    def step(self) -> dict[str, Any]:
        data = self.config.data
        batch = StepBatch(self.splits.train, self.order[self.arm.step], data, 0, 0, self.arm.step)
        views = TeacherViews(self.teacher, batch, self.config.teacher.image_size, data.mean, data.std)
        return self.arm.train_step(batch, views)


@pytest.fixture
def bench(tiny_arm: MakeArm, preparer: Preparer) -> Callable[..., Bench]:
    return lambda name, *more: Bench(tiny_arm(*overrides_of(name), SMALL_BATCH, *more), preparer)


# Distillation parameters that a toggle never trains, by the start of their names.
NEVER: dict[str, tuple[str, ...]] = {
    "token_aligner.gradient=detached": ("token_aligner.",),
    "token_aligner.values=projected,detached": ("token_aligner.",),
}
# Parameters without a gradient at the first step: their loss starts later, or is at the value that they start for.
LATER: dict[str, tuple[str, ...]] = {
    "warmup=staggered": ("projections.", "head_aligner."),
    # e^s·L/L_first − s with s = 0
    "weighting=imtl_l,scale=first": ("weighting.s.",),
}
# Behind W_q, which starts at zero: no gradient at the first step, but at the second.
ZERO_START = ("selector.key.", "selector.student_norm.", "selector.teacher_norm.")


def starting_with(names: Iterable[str], starts: tuple[str, ...]) -> set[str]:
    return {name for name in names if name.startswith(starts)}


@pytest.mark.parametrize("name", TOGGLES)
def test_gradients_reach_what_they_should_and_everything_moves(name: str, bench: Callable[..., Bench]) -> None:
    # the preset that is staggered by itself
    ramps = ["warmup=none"] if name == "method=basd_literal" else []
    plain = ["recipe.weight_decay=0.0", "recipe.lr_warmup=0 steps", "recipe.clip_grad=0.0", "recipe.duration=15 steps"]
    made = bench(name, *ramps, *plain)
    objective, student = made.arm.objective, made.arm.student
    before = {key: value.detach().clone() for key, value in objective.named_parameters()}
    made.step()
    resting = {key for key, p in objective.named_parameters() if p.grad is None or not bool((p.grad != 0).any())}
    assert resting == starting_with(before, (*NEVER.get(name, ()), *LATER.get(name, ()), *ZERO_START))
    for module in (student, objective):
        for key, parameter in module.named_parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), key
    for key, parameter in student.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), key
    made.step()
    made.step()
    still = {key for key, p in objective.named_parameters() if torch.equal(p, before[key])}
    assert still == starting_with(before, NEVER.get(name, ()))
    assert all(parameter.grad is None for parameter in made.teacher.model.parameters())


@pytest.mark.parametrize("name", TOGGLES)
def test_bfloat16_autocast_gives_finite_gradients(name: str, bench: Callable[..., Bench]) -> None:
    made = bench(name)
    with torch.autocast("cpu", torch.bfloat16):
        parts = made.step()
    assert all(torch.isfinite(torch.as_tensor(value)) for value in parts.values())
    for module in (made.arm.student, made.arm.objective):
        for key, parameter in module.named_parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), key


# -- whole runs -------------------------------------------------------------------------------------------------------

STEPS, KILLED_AFTER = 4, 2


def train(arms: dict[str, FrozenArm], root: Path, stop_after: int | None = None) -> dict[str, MemoryRecorder]:
    recorders = {name: MemoryRecorder() for name in arms}
    return resume(arms, root, recorders, stop_after)


def resume(
    arms: dict[str, FrozenArm], root: Path, recorders: dict[str, MemoryRecorder], stop_after: int | None = None
) -> dict[str, MemoryRecorder]:
    done = 0

    def stop() -> bool:
        nonlocal done
        done += 1
        return stop_after is not None and done > stop_after

    directories = [root / folder(name) for name in arms]
    results = train_cohort(list(arms.values()), directories, [recorders[name] for name in arms], stop=stop)
    wanted = "complete" if stop_after is None else "stopped"
    assert [(r.status, r.reason) for r in results if r.status != wanted] == []
    return recorders


def history_of(directory: Path) -> str | None:
    """The selector's history as it was exported; None for an arm without a selector."""
    path = directory / "artifacts" / "selector_history.csv"
    return path.read_text() if path.exists() else None


def folder(name: str) -> str:
    return str(list(TOGGLES).index(name))


@dataclasses.dataclass
class Runs:
    arms: dict[str, FrozenArm]
    root: Path
    cohort: dict[str, MemoryRecorder]


@pytest.fixture(scope="module")
def runs(tiny_arm: MakeArm, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Every toggle in one cohort: the reference of the next two tests."""
    arms = {name: tiny_arm(*overrides_of(name), SMALL_BATCH, f"recipe.duration={STEPS} steps") for name in TOGGLES}
    root = tmp_path_factory.mktemp("toggles")
    return Runs(arms, root, train(arms, root / "cohort"))


@pytest.fixture(scope="module")
def resumed(runs: Runs) -> dict[str, MemoryRecorder]:
    root = runs.root / "resumed"
    return resume(runs.arms, root, train(runs.arms, root, stop_after=KILLED_AFTER))


@pytest.mark.slow
@pytest.mark.parametrize("name", TOGGLES)
def test_resume_bit_for_bit(name: str, runs: Runs, resumed: dict[str, MemoryRecorder]) -> None:
    assert resumed[name].results == runs.cohort[name].results
    assert same_bits(state_of(runs.root / "resumed" / folder(name)), state_of(runs.root / "cohort" / folder(name)))
    assert history_of(runs.root / "resumed" / folder(name)) == history_of(runs.root / "cohort" / folder(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", TOGGLES)
def test_cohort_equals_solo(name: str, runs: Runs) -> None:
    solo = train({name: runs.arms[name]}, runs.root / "solo")
    assert solo[name].results == runs.cohort[name].results
    assert same_bits(state_of(runs.root / "solo" / folder(name)), state_of(runs.root / "cohort" / folder(name)))
    assert history_of(runs.root / "solo" / folder(name)) == history_of(runs.root / "cohort" / folder(name))


def test_rows_start_from_the_same_student_and_export_nothing_else(runs: Runs, bench: Callable[..., Bench]) -> None:
    """Every toggle that keeps the student's sizes starts from the same weights; the export is the student alone."""
    plain = bench("basd").arm.student.state_dict()
    for name in ("method=ce", "method=kd", "selector=alp", "method=a2d", "weighting=uncertainty"):
        assert same_bits(plain, bench(name).arm.student.state_dict()), name
    token = bench("method=deit_hard").arm.student.state_dict()
    for key, value in plain.items():
        if key == "pos_embed":
            torch.testing.assert_close(token[key][:, [0, *range(2, token[key].shape[1])]], value, rtol=0, atol=0)
        else:
            assert torch.equal(token[key], value), key
    for name in TOGGLES:
        exported = state_of(runs.root / "cohort" / folder(name))
        build_student(from_dict(runs.arms[name].config).student, 10).load_state_dict(exported, strict=True)
