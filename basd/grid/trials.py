"""What the ledger's trials say of an arm, and which of an arm's trials counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from basd.config import FrozenArm

State = Literal["waiting", "running", "stale", "complete", "pruned", "failed"]
# Attributes of a trial that the next try of its arm does not take over.
OF_ONE_TRY = ("owner", "beat", "reason", "log", "metrics", "trained_by")


@dataclass(frozen=True)
class ArmState:
    """What the ledger says of one arm."""

    key: str
    state: State
    number: int  # of the trial that counts
    trial_id: int
    seed: int
    name: str
    configuration_key: str
    cohort_key: str
    version: str  # of the code that enqueued it
    trained_by: str  # version of the code that trained it, once it is complete; "" where an older BASD completed it
    generation: int  # how often its result was replaced
    replaces: str  # code version whose result it is trained again to replace; "" in the first generation
    labels: dict[str, list[str]]  # ablation -> rows
    owner: dict[str, Any] | None
    retries: int  # how often it was enqueued again
    permanent: bool  # failed, and not enqueued again by itself
    reason: str
    log: str
    metrics: dict[str, float]
    started: datetime | None
    ended: datetime | None

    def closed_to(self, version: str) -> bool:
        """Whether it is trained again to replace the result of this code version, which therefore must not train it."""
        return bool(version) and self.replaces == version

    def open_to(self, version: str) -> bool:
        """Whether it waits and code of this version may train it."""
        return self.state == "waiting" and not self.closed_to(version)


def fields_of(arm: FrozenArm, labels: Mapping[str, Sequence[str]], ablation: str) -> dict[str, Any]:
    """What a new trial says of its arm."""
    fields = {
        "arm_key": arm.arm_key,
        "configuration_key": arm.configuration_key,
        "cohort_key": arm.cohort_key,
        "seed": arm.seed,
        "name": arm.name,
        "version": arm.version,
    }
    rows = labels.get(arm.arm_key)
    return {**fields, f"row/{ablation}": ", ".join(rows)} if rows else fields


def generation(trial: FrozenTrial) -> int:
    """How often the arm's result had been replaced when this trial was enqueued."""
    return int(trial.user_attrs.get("generation", 0))


def counting(trials: Sequence[FrozenTrial]) -> FrozenTrial:
    """Of several trials of one arm the one that counts."""
    from optuna.trial import TrialState

    newest = max(map(generation, trials))
    trials = [trial for trial in trials if generation(trial) == newest]
    for state in (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING, TrialState.PRUNED):
        for trial in sorted(trials, key=lambda t: t.number):
            if trial.state == state:
                return trial
    return max(trials, key=lambda t: t.number)
