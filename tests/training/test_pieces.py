"""Random streams, recipe, checkpoints, teachers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch

from basd.config import FrozenArm, from_dict
from basd.data import DATASETS, load
from basd.errors import UserError
from basd.models.teacher import DigitsViTConfig, TeacherShape
from basd.training import random_streams as streams
from basd.training.arm import TrainingArm
from basd.training.checkpoint import CURRENT, load_checkpoint, save_checkpoint
from basd.training.recipe import learning_rate, parse_duration
from basd.training.teachers import cached_teacher, prepare_teacher


def test_streams_differ_in_every_part_of_their_key() -> None:
    base = (0, streams.ORDER, 0, 0)
    others = [(1, streams.ORDER, 0, 0), (0, streams.MIXING, 0, 0), (0, streams.ORDER, 1, 0), (0, streams.ORDER, 0, 1)]
    seeds = [streams.stream_seed(*key) for key in (base, *others, (0, streams.ORDER, 10, 1), (0, streams.ORDER, 1, 10))]
    assert len(set(seeds)) == len(seeds)
    assert torch.equal(
        torch.rand(3, generator=streams.generator(*base)), torch.rand(3, generator=streams.generator(*base))
    )


def test_isolated_seeds_and_restores_every_global_generator() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(numpy.random.rand()), float(torch.rand(()))

    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    expected = draw()
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    with streams.isolated(3, "test"):
        inside = draw()
    with pytest.raises(RuntimeError), streams.isolated(4, "test"):
        draw()
        raise RuntimeError
    assert draw() == expected
    with streams.isolated(3, "test"):
        assert draw() == inside


def test_rows_start_from_the_same_student_and_the_same_components(tiny_arm: Callable[..., FrozenArm]) -> None:
    def build(*overrides: str) -> TrainingArm:
        config = from_dict(tiny_arm(*overrides).config)
        return TrainingArm(config, TeacherShape(2, 16, 2, (8, 8)), 10, 5, torch.device("cpu"))

    basd, without, ce = build(), build("losses.rsd.enabled=false", "selector=uniform"), build("method=ce")
    for other in (without, ce):
        assert all(
            torch.equal(a, b) for a, b in zip(basd.student.parameters(), other.student.parameters(), strict=True)
        )
    shared = dict(without.objective.named_parameters())
    assert shared
    own = dict(basd.objective.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in shared.items())
    assert not list(ce.objective.parameters())


def test_every_distillation_parameter_is_in_the_optimizer_and_none_in_the_student(
    tiny_arm: Callable[..., FrozenArm],
) -> None:
    config = from_dict(tiny_arm().config)
    arm = TrainingArm(config, TeacherShape(2, 16, 2, (8, 8)), 10, 5, torch.device("cpu"))
    optimized = {id(parameter) for parameter in arm.parameters}
    assert {id(p) for p in arm.objective.parameters()} <= optimized
    assert {id(p) for p in arm.student.parameters()} <= optimized
    assert len(optimized) == len(list(arm.objective.parameters())) + len(list(arm.student.parameters()))
    assert not {id(p) for p in arm.objective.parameters()} & {id(p) for p in arm.student.parameters()}


def test_durations() -> None:
    told = {"20 epochs": 360, "1 epoch": 18, "7 steps": 7, "10%": 100, "2.5 epochs": 45}
    assert {text: parse_duration(text, 18, 1000) for text in told} == told
    for text in ("20", "epochs", "-3 steps", "3 weeks", ""):
        with pytest.raises(ValueError, match="is not a length"):
            parse_duration(text, 18, 1000)


def test_learning_rate_rises_linearly_then_falls_as_a_cosine() -> None:
    rates = [learning_rate(step, 100, 10, 1.0, 0.1) for step in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_checkpoint_is_replaced_only_by_a_readable_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, {"step": 1, "x": torch.arange(3)})
    monkeypatch.setattr(torch, "save", lambda state, file: file.write(b"half a checkpo"))
    with pytest.raises(Exception):  # noqa: B017 - whatever torch says of a broken file
        save_checkpoint(tmp_path, {"step": 2})
    state, notice = load_checkpoint(tmp_path)
    assert state is not None
    assert state["step"] == 1
    assert notice is None


def test_no_checkpoint_is_no_notice(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) == (None, None)
    (tmp_path / CURRENT).write_bytes(b"")
    state, notice = load_checkpoint(tmp_path)
    assert state is None
    assert notice is not None
    assert "first step" in notice


@pytest.fixture
def tiny_teacher() -> DigitsViTConfig:
    return DigitsViTConfig(epochs=1, width=12, depth=1, heads=2, batch_size=400)


def test_teacher_is_fitted_once_and_cached(
    tiny_teacher: DigitsViTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BASD_CACHE", str(tmp_path))
    data = DATASETS["digits"]()
    splits = load(data)
    assert cached_teacher(tiny_teacher, data, splits) is None
    steps: list[int] = []
    first = prepare_teacher(tiny_teacher, data, splits, lambda step, _total: steps.append(step))
    again = prepare_teacher(tiny_teacher, data, splits, lambda step, _total: steps.append(step))
    assert steps == [1, 2]
    assert (first.fitted_now, again.fitted_now) == (True, False)
    assert first.fingerprint == again.fingerprint
    assert first.test_top1 == again.test_top1
    assert not first.model.training
    assert first.path is not None
    damaged = first.path.read_bytes()[:100]
    first.path.write_bytes(damaged)
    with pytest.raises(UserError, match="does not hold the weights"):
        prepare_teacher(tiny_teacher, data, splits)


def test_unwritable_cache_is_one_sentence(
    tiny_teacher: DigitsViTConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("BASD_CACHE", str(tmp_path / "file"))
    data = DATASETS["digits"]()
    with pytest.raises(UserError, match="set BASD_CACHE"):
        prepare_teacher(tiny_teacher, data, load(data))
