"""The moving average of the weights: its formula, its checkpoint, and that it is what is evaluated and exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import MemoryRecorder, same_bits, state_of
from torch import Tensor
from watching import trained_weights

from basd.config import FrozenArm, from_dict
from basd.models.student import build_student
from basd.models.teacher import TeacherShape
from basd.training.arm import TrainingArm
from basd.training.cohort import train_cohort
from basd.training.ema import WeightAverage

MakeArm = Callable[..., FrozenArm]
ARM = ("method=ce", "recipe.duration=2 epochs", "recipe.ema_decay=0.7")


def train(arm: FrozenArm, folder: Path, recorder: MemoryRecorder | None = None, **callbacks):
    recorder = recorder or MemoryRecorder()
    (result,) = train_cohort([arm], [folder], [recorder], **callbacks)
    return recorder, result


def averaged(weights: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """d_t = min(decay, 1 − t^(−2/3)), t from 1, in float64."""
    average = {name: value.double() for name, value in weights[0].items()}
    for t, now in enumerate(weights, 1):
        d = min(decay, 1 - t ** (-2 / 3))
        average = {name: d * average[name] + (1 - d) * now[name].double() for name in now}
    return average


def test_the_average_is_exported_and_training_does_not_notice_it(few_arm: MakeArm, tmp_path: Path) -> None:
    runs = []
    for decay in (0.7, 0.2, 0):
        with trained_weights() as weights:
            train(few_arm(*ARM[:2], f"recipe.ema_decay={decay}"), tmp_path / str(decay))
        runs.append(weights)
        exported = state_of(tmp_path / str(decay))
        if not decay:
            assert same_bits(exported, weights[-1])
            continue
        expected = averaged(weights, decay)
        assert exported.keys() == expected.keys()
        for name, value in exported.items():
            torch.testing.assert_close(
                value.double(), expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
        assert not torch.allclose(exported["head.weight"], weights[-1]["head.weight"], rtol=1e-3)
    assert [len(weights) for weights in runs] == [10] * 3
    for step in zip(*runs, strict=True):
        assert same_bits(step[0], step[2]) and same_bits(step[1], step[2])


def test_the_average_is_what_is_evaluated(few_arm: MakeArm, tmp_path: Path) -> None:
    from basd.data import load
    from basd.data.views import eval_view, normalize

    arm = few_arm(*ARM)
    _, result = train(arm, tmp_path)
    config = from_dict(arm.config)
    student = build_student(config.student, 10).eval()
    student.load_state_dict(state_of(tmp_path))
    test = load(config.data).test
    with torch.no_grad():
        images = normalize(eval_view(test.images, config.student.image_size), config.data.mean, config.data.std)
        right = (student(images).argmax(-1) == test.labels).float().mean()
    assert result.metrics["test/top1"] == pytest.approx(float(right), abs=1e-6)


def test_stopped_and_started_again_is_bit_equal(few_arm: MakeArm, tmp_path: Path) -> None:
    arm = few_arm(*ARM)
    whole, _ = train(arm, tmp_path / "whole")
    calls = iter(range(100))
    recorder, stopped = train(arm, tmp_path / "cut", stop=lambda: next(calls) >= 4)
    assert stopped.status == "stopped"
    recorder, _ = train(arm, tmp_path / "cut", recorder)
    assert recorder.results == whole.results
    assert same_bits(state_of(tmp_path / "cut"), state_of(tmp_path / "whole"))


def test_the_average_is_apart_from_the_student(few_arm: MakeArm) -> None:
    """No hook of the taps, no gradient, no place in the optimizer."""
    config = from_dict(few_arm("recipe.ema_decay=0.9").config)
    arm = TrainingArm(config, TeacherShape(2, 16, 2, (8, 8)), 10, 5, torch.device("cpu"))
    average = arm.exported
    assert average is not arm.student
    assert not any(module._forward_hooks for module in average.modules())
    assert any(module._forward_hooks for module in arm.student.modules())
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert not {id(p) for p in average.parameters()} & {id(p) for p in arm.parameters}
    assert arm.held_bytes() > 0


def test_off_is_the_arm_that_it_was(few_arm: MakeArm) -> None:
    plain, off, on = few_arm("method=ce"), few_arm("method=ce", "recipe.ema_decay=0"), few_arm(*ARM)
    assert plain.arm_key == off.arm_key != on.arm_key


def test_first_step_replaces_the_random_start(few_arm: MakeArm) -> None:
    config = from_dict(few_arm("method=ce").config)
    student = build_student(config.student, 10)
    average = WeightAverage(student, 0.999)
    with torch.no_grad():
        student.head.weight.add_(1.0)
    average.update(student, 1)
    assert torch.equal(average.student.head.weight, student.head.weight)
