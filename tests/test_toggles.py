"""What holds for every toggle: complete coverage, gradients, movement, bfloat16, resume, cohort = solo.

`pytest` tries arms of several toggles, which together contain all of them; `pytest --rare` tries each toggle alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, MemoryRecorder, same_bits, state_of
from toggles import PACKED, TOGGLES, overrides_of

from basd.compose import compose
from basd.config import GROUPS, Config, FrozenArm, flatten, from_dict, without_effect
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
    for names in PACKED:
        config = compose([*TINY, *overrides_of(*names)]).config
        seen |= {pair for pair in flatten(config.to_dict()) if not isinstance(pair[1], list)}
    wanted: set[tuple[str, Any]] = set()
    for group, members in GROUPS.items():
        if group in ("data", "teacher"):
            continue
        for choice, kind in members.items():
            wanted |= {(f"{group}.name", choice), *choices_of(kind(), group)}
    wanted |= set(choices_of(compose(TINY).config.losses, "losses"))
    assert wanted <= seen, sorted(map(str, wanted - seen))


def test_the_packed_arms_contain_every_toggle_and_each_has_an_effect() -> None:
    packed = {name for names in PACKED for name in names}
    # golden traces hold the presets; without the token that one of them has, deit_soft is kd
    alone = {name for name in TOGGLES if name.startswith("method=")} | {"losses.logit.kind=deit_soft"}
    assert TOGGLES.keys() - alone <= packed
    for names in PACKED:
        given = [text for name in names for text in TOGGLES[name]]
        config = compose([*TINY, *overrides_of(*names)]).config
        assert without_effect(config, [text.partition("=")[0] for text in given]) == [], names


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


Toggles = tuple[str, ...]
ALONE: tuple[Toggles, ...] = tuple((name,) for name in TOGGLES)
# daily, and with --rare
SETS = [pytest.param(PACKED, id="packed"), pytest.param(ALONE, id="alone", marks=pytest.mark.rare)]


@pytest.fixture
def bench(few_arm: MakeArm, preparer: Preparer) -> Callable[..., Bench]:
    return lambda names, *more: Bench(few_arm(*overrides_of(*names), SMALL_BATCH, *more), preparer)


# Distillation parameters that a toggle never trains, by the start of their names.
NEVER: dict[str, Toggles] = {
    "token_aligner.gradient=detached": ("token_aligner.",),
    "token_aligner.values=projected,detached": ("token_aligner.",),
}
# Parameters without a gradient at the first step: their loss starts later, or is at the value that they start for.
LATER: dict[str, Toggles] = {
    "warmup=staggered": ("projections.", "head_aligner."),
    # e^s·L/L_first − s with s = 0
    "weighting=imtl_l,scale=first": ("weighting.s.",),
}
# Behind W_q, which starts at zero: no gradient at the first step, but at the second.
ZERO_START = ("selector.key.", "selector.student_norm.", "selector.teacher_norm.")


def starting_with(names: Iterable[str], starts: tuple[str, ...]) -> set[str]:
    return {name for name in names if name.startswith(starts)}


def listed(table: dict[str, Toggles], names: Toggles) -> Toggles:
    return tuple(start for name in names for start in table.get(name, ()))


@pytest.mark.parametrize("arms", SETS)
def test_gradients_reach_what_they_should_and_everything_moves(
    arms: tuple[Toggles, ...], bench: Callable[..., Bench]
) -> None:
    plain = ["recipe.weight_decay=0.0", "recipe.lr_warmup=0 steps", "recipe.clip_grad=0.0", "recipe.duration=15 steps"]
    for names in arms:
        # the preset that is staggered by itself
        ramps = ["warmup=none"] if names == ("method=basd_literal",) else []
        made = bench(names, *ramps, *plain)
        objective, student = made.arm.objective, made.arm.student
        before = {key: value.detach().clone() for key, value in objective.named_parameters()}
        made.step()
        resting = {key for key, p in objective.named_parameters() if p.grad is None or not bool((p.grad != 0).any())}
        idle = (*listed(NEVER, names), *listed(LATER, names), *ZERO_START)
        assert resting == starting_with(before, idle), names
        for module in (student, objective):
            for key, parameter in module.named_parameters():
                assert parameter.grad is None or torch.isfinite(parameter.grad).all(), (names, key)
        for key, parameter in student.named_parameters():
            assert parameter.grad is not None and bool((parameter.grad != 0).any()), (names, key)
        made.step()
        made.step()
        still = {key for key, p in objective.named_parameters() if torch.equal(p, before[key])}
        assert still == starting_with(before, listed(NEVER, names)), names
        assert all(parameter.grad is None for parameter in made.teacher.model.parameters()), names


@pytest.mark.parametrize("arms", SETS)
def test_bfloat16_autocast_gives_finite_gradients(arms: tuple[Toggles, ...], bench: Callable[..., Bench]) -> None:
    for names in arms:
        made = bench(names)
        with torch.autocast("cpu", torch.bfloat16):
            parts = made.step()
        assert all(torch.isfinite(torch.as_tensor(value)) for value in parts.values()), names
        for module in (made.arm.student, made.arm.objective):
            for key, parameter in module.named_parameters():
                assert parameter.grad is None or torch.isfinite(parameter.grad).all(), (names, key)


# -- whole runs -------------------------------------------------------------------------------------------------------

STEPS, KILLED_AFTER = 4, 2


@dataclasses.dataclass
class Runs:
    """Arms by the toggles that they contain, each in its folder below `root`."""

    arms: dict[Toggles, FrozenArm]
    root: Path

    def folder(self, names: Toggles) -> Path:
        return self.root / str(list(self.arms).index(names))

    def train(self, recorders: dict[Toggles, MemoryRecorder], stop_after: int | None = None) -> None:
        """Train the recorders' arms in one cohort, from their checkpoints where they have one."""
        done = 0

        def stop() -> bool:
            nonlocal done
            done += 1
            return stop_after is not None and done > stop_after

        arms, folders = [self.arms[names] for names in recorders], [self.folder(names) for names in recorders]
        results = train_cohort(arms, folders, list(recorders.values()), stop=stop)
        wanted = "complete" if stop_after is None else "stopped"
        assert [(r.status, r.reason) for r in results if r.status != wanted] == []

    def end_of(self, names: Toggles) -> tuple[dict[str, torch.Tensor], str | None]:
        """The student, and the selector's history as it was exported; None for an arm without a selector."""
        history = self.folder(names) / "artifacts" / "selector_history.csv"
        return state_of(self.folder(names)), history.read_text() if history.exists() else None


def assert_same(one: Runs, other: Runs, names: Toggles) -> None:
    (student, history), (expected, expected_history) = one.end_of(names), other.end_of(names)
    assert same_bits(student, expected), names
    assert history == expected_history, names


@pytest.mark.parametrize("toggles", SETS)
def test_resume_and_cohort_are_bit_for_bit_the_arm_alone(
    toggles: tuple[Toggles, ...], few_arm: MakeArm, tmp_path: Path
) -> None:
    """One cohort of all, and each arm alone, stopped on the way and resumed. The export is the student alone."""
    arms = {names: few_arm(*overrides_of(*names), SMALL_BATCH, f"recipe.duration={STEPS} steps") for names in toggles}
    runs = {how: Runs(arms, tmp_path / how) for how in ("cohort", "alone")}
    together = {names: MemoryRecorder() for names in arms}
    runs["cohort"].train(together)
    for names in arms:
        alone = MemoryRecorder()
        runs["alone"].train({names: alone}, stop_after=KILLED_AFTER)
        assert len(alone.events) < len(together[names].events), names
        runs["alone"].train({names: alone})
        assert alone.results == together[names].results, names
        assert_same(runs["alone"], runs["cohort"], names)
        exported, _ = runs["cohort"].end_of(names)
        build_student(from_dict(arms[names].config).student, 10).load_state_dict(exported, strict=True)


def test_rows_start_from_the_same_student(bench: Callable[..., Bench]) -> None:
    """Every toggle that keeps the student's sizes starts from the same weights."""
    plain = bench(("basd",)).arm.student.state_dict()
    for name in ("method=ce", "method=kd", "selector=alp", "method=a2d", "weighting=uncertainty"):
        assert same_bits(plain, bench((name,)).arm.student.state_dict()), name
    token = bench(("method=deit_hard",)).arm.student.state_dict()
    for key, value in plain.items():
        if key == "pos_embed":
            torch.testing.assert_close(token[key][:, [0, *range(2, token[key].shape[1])]], value, rtol=0, atol=0)
        else:
            assert torch.equal(token[key], value), key
