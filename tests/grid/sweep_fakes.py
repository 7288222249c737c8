"""A trainer that ends arms at once with a value of their configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

# functions that the trainer calls before each cohort
before: list[Any] = []


def train(arms: Any, directories: Any, recorders: Any, *, progress: Any, finished: Any, **_: Any) -> list[Any]:
    for action in before:
        action()
    results = []
    for arm, directory, recorder in zip(arms, directories, recorders, strict=True):
        reached = 1.0 / (1.0 + arm.config["weighting"]["temperature"]) + 0.001 * arm.seed
        recorder.metrics(arm.total_steps, {"val/top1": reached})
        (directory / "student.safetensors").write_bytes(b"weights")
        progress(arm.arm_key, arm.total_steps, arm.total_steps)
        results.append(
            SimpleNamespace(arm_key=arm.arm_key, status="complete", metrics={"val/top1": reached}, reason="")
        )
        finished(results[-1])
    return results
