"""`basd bench step`: a complete step of one arm beside the least it could cost, a teacher's and a student's plain passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from basd.benchmarks.setup import Setup
from basd.benchmarks.timing import Ratio, Report, Times, alternate, device_name
from basd.models.student import build_student
from basd.models.teacher import teacher_title
from basd.training.precision import autocast, choose_precision, compiler, half_type

# Dense bfloat16 and float16 peaks in FLOP/s, from the makers' data sheets.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "V100": 125e12, "T4": 65e12}


def run(overrides: Sequence[str], repeats: int) -> Report:
    """One arm's step of the real loop, its plain parts, and on CUDA the same step eager in float32."""
    setup = Setup(overrides)
    config, device = setup.config, setup.device
    teacher, student = plain_passes(setup)
    actions: dict[str, Any] = {"plain teacher forward": teacher, "plain student forward and backward": student}
    with setup.running() as start:
        arm = setup.arm()
        actions["complete step"] = start([arm])
        if device.type == "cuda":
            actions["complete step, eager float32"] = start(
                [setup.arm("runtime.precision=fp32", "runtime.compile=off")]
            )
        with FlopCounterMode(display=False) as counted:
            teacher()
            student()
        flops = counted.get_total_flops()
        times = alternate(actions, repeats, device, warm=3 if device.type == "cuda" else 1)
        used = device_name(device)
    return Report(
        "step",
        used,
        {
            "teacher": teacher_title(config.teacher),
            "method": config.method,
            "batch": config.recipe.batch_size,
            "precision": choose_precision(config.runtime.precision, device),
            "compile": config.runtime.compile,
            "overrides": setup.overrides,
        },
        times.measures(),
        ratios_of(times),
        figures_of(times, config.recipe.batch_size, flops, used),
    )


def plain_passes(setup: Setup) -> tuple[Callable[[], None], Callable[[], None]]:
    """The teacher's forward pass, and the student's forward and backward pass, on random images; nothing else."""
    config, device = setup.config, setup.device
    half, wrap = half_type(config.runtime.precision, device), compiler(config.runtime.compile, device)
    # models of their own: those of a cohort have hooks
    model = setup.resources.teacher.model.to(device).requires_grad_(False)
    student = build_student(config.student, setup.classes).to(device).train()
    batch = config.recipe.batch_size
    seen = torch.randn(batch, 3, config.teacher.image_size, config.teacher.image_size, device=device)
    images = torch.randn(batch, 3, config.student.image_size, config.student.image_size, device=device)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    forward, learn = wrap(model.forward_features), wrap(student.forward)

    @torch.no_grad()
    def teacher_pass() -> None:
        with autocast(device, half):
            forward(seen)

    def student_pass() -> None:
        student.zero_grad(set_to_none=True)
        with autocast(device, half):
            logits = learn(images)
        F.cross_entropy(logits.float(), labels).backward()

    return teacher_pass, student_pass


def ratios_of(times: Times) -> tuple[Ratio, ...]:
    """The complete step beside its plain parts, and beside its eager float32 form where that was measured."""

    def over_plain(at: Any) -> float:
        return at["complete step"] / (at["plain teacher forward"] + at["plain student forward and backward"])

    ratios = [Ratio("complete step ÷ (plain teacher + plain student)", times.ratio(over_plain), "≤ 1.25")]
    eager = "complete step, eager float32"
    if eager in times.seconds:
        ratios.append(
            Ratio("eager float32 ÷ complete step", times.ratio(lambda at: at[eager] / at["complete step"]), "≥ 3")
        )
    return tuple(ratios)


def figures_of(times: Times, batch: int, flops: int, device: str) -> dict[str, tuple[float, str]]:
    """Images a second, and the arithmetic of the plain passes over the time of the complete step."""
    seconds = times["complete step"]
    figures = {"throughput": (batch / seconds, "images/s"), "arithmetic": (flops / seconds / 1e12, "TFLOP/s")}
    peak = next((value for name, value in PEAKS.items() if name in device), None)
    if peak is not None:
        figures["share of peak"] = (100 * flops / seconds / peak, "%")
    return figures
