"""Made-up arms, a plan of them, and a trainer that takes milliseconds. Worker processes import this file too."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from basd.config import FrozenArm
from basd.grid.plan import Plan, PlanRow

SETTING = "digits-fake-fake-tiny"


def make_arm(row: int, seed: int, version: str = "v1", **fake: Any) -> FrozenArm:
    """An arm of row `row`; `fake` steers the trainer below."""
    fake = {"steps": 4, **fake}
    return FrozenArm(
        arm_key=f"{row * 100 + seed:016x}",
        configuration_key=f"{row:016x}",
        cohort_key=f"{seed:016x}",
        seed=seed,
        setting=SETTING,
        name=f"row{row}",
        config={"seed": seed, "runtime": {"threads": 1}, "fake": fake},
        params={"selector": "uniform", "seed": str(seed)},
        version=version,
        teacher_fingerprint="t",
        data_fingerprint="d",
        total_steps=fake["steps"],
    )


def make_plan(
    rows: int,
    seeds: int,
    special: dict[tuple[int, int], dict[str, Any]] | None = None,
    version: str = "v1",
    **fake: Any,
) -> Plan:
    """`rows` × `seeds` arms; `special` steers single arms (row, seed)."""
    arms = {
        (r, s): make_arm(r, s, version, **{**fake, **(special or {}).get((r, s), {})})
        for s in range(seeds)
        for r in range(rows)
    }
    return Plan(
        name="fake_table",
        setting=SETTING,
        question="?",
        reference="row0",
        metrics=("test/top1",),
        seeds=tuple(range(seeds)),
        rows=tuple(PlanRow(f"row{r}", f"Row {r}", f"{r:016x}", ()) for r in range(rows)),
        cells={f"row{r}": {s: arms[r, s].arm_key for s in range(seeds)} for r in range(rows)},
        arms={arm.arm_key: arm for arm in arms.values()},
        version=version,
        hash="abc123",
    )


def train_cohort(
    arms: Any, directories: Any, recorders: Any, *, stop: Any, owned: Any, progress: Any, finished: Any
) -> list[Any]:
    """Keeps the promises of the real one: resumes from a checkpoint, isolates failures, stops when asked."""
    members = []
    for arm, directory, recorder in zip(arms, directories, recorders, strict=True):
        checkpoint = directory / "checkpoint.pt"
        state = json.loads(checkpoint.read_text()) if checkpoint.exists() else {"step": 0, "position": 0}
        recorder.rewind(state["position"])
        members.append(SimpleNamespace(arm=arm, directory=directory, recorder=recorder, step=state["step"]))
        with open(directory / "trainings.txt", "a") as file:  # how often an arm was begun, and where
            file.write(f"{state['step']}\n")
    results: list[Any] = []

    def end(member: Any, status: str, metrics: Any = None, reason: str = "") -> None:
        members.remove(member)
        results.append(SimpleNamespace(arm_key=member.arm.arm_key, status=status, metrics=metrics or {}, reason=reason))
        finished(results[-1])

    def save(member: Any) -> None:
        state = {"step": member.step, "position": member.recorder.flush()}
        temporary = member.directory / "checkpoint.tmp"
        temporary.write_text(json.dumps(state))
        os.replace(temporary, member.directory / "checkpoint.pt")

    if any(member.arm.config["fake"].get("cohort_error") for member in members):
        raise RuntimeError("no memory left on the device")
    while members:
        for member in members.copy():
            fake, arm = member.arm.config["fake"], member.arm
            if stop() and not fake.get("deaf"):
                save(member)
                end(member, "stopped")
                continue
            time.sleep(fake.get("sleep", 0.0))
            member.step += 1
            _trouble(fake, member)
            if fake.get("fail_at") == member.step and not _once(member.directory, fake):
                end(member, "failed", reason=f"loss is not finite at step {member.step}")
                continue
            member.recorder.metrics(member.step, {"train/loss": 1.0 / member.step, "val/top1": 0.1 * member.step})
            progress(arm.arm_key, member.step, arm.total_steps)
            if member.step == arm.total_steps:
                final = {"test/top1": 0.5 + 0.01 * arm.seed, "val/top1": 0.1 * member.step}
                member.recorder.metrics(member.step, {"test/top1": final["test/top1"]})
                (member.directory / "student.safetensors").write_bytes(b"weights")
                (member.directory / "checkpoint.pt").unlink(missing_ok=True)
                end(member, "complete", final)
            elif member.step % 2 == 0:
                save(member)
                if not owned(arm.arm_key):
                    end(member, "stopped")
    return results


def _once(directory: Path, fake: dict[str, Any]) -> bool:
    """Whether trouble that happens once has happened already."""
    mark = directory / "trouble.txt"
    if fake.get("once") and mark.exists():
        return True
    mark.touch()
    return False


def _trouble(fake: dict[str, Any], member: Any) -> None:
    """Once in the life of an arm, its process gets a signal."""
    signals = {"kill_at": signal.SIGKILL, "interrupt_at": signal.SIGINT, "terminate_at": signal.SIGTERM}
    for name, number in signals.items():
        if fake.get(name) == member.step and not _once(member.directory, {"once": True}):
            os.kill(os.getpid(), number)
