"""What the ledger's trials say of an arm, and which of an arm's trials counts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import sqlalchemy
    from optuna.trial import TrialState

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


@dataclass(frozen=True)
class Trial:
    """A trial of the ledger's study: of what Optuna keeps of it, what the ledger uses."""

    trial_id: int
    number: int
    state: TrialState
    user_attrs: dict[str, Any]


def read_trials(engine: sqlalchemy.Engine, study_id: int) -> list[Trial]:
    """Every trial of a study, in the order of their ids, as they are at one moment.

    Reads Optuna's tables in one statement: `get_all_trials` makes objects of six tables, which costs six times as much, and a
    grid asks twice a second.
    """
    import sqlalchemy
    from optuna.trial import TrialState

    statement = sqlalchemy.text(
        "SELECT trials.trial_id, trials.number, trials.state, attributes.key, attributes.value_json "
        "FROM trials LEFT JOIN trial_user_attributes AS attributes ON attributes.trial_id = trials.trial_id "
        "WHERE trials.study_id = :study ORDER BY trials.trial_id"
    )
    found: dict[int, Trial] = {}
    with engine.connect() as connection:
        for trial_id, number, state, key, value in connection.execute(statement, {"study": study_id}):
            trial = found.get(trial_id)
            if trial is None:
                trial = found[trial_id] = Trial(trial_id, number, TrialState[state], {})
            if key is not None:
                trial.user_attrs[key] = json.loads(value)
    return list(found.values())


def generation(trial: Trial) -> int:
    """How often the arm's result had been replaced when this trial was enqueued."""
    return int(trial.user_attrs.get("generation", 0))


def counting(trials: Sequence[Trial]) -> Trial:
    """Of several trials of one arm the one that counts."""
    from optuna.trial import TrialState

    newest = max(map(generation, trials))
    trials = [trial for trial in trials if generation(trial) == newest]
    for state in (TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING, TrialState.PRUNED):
        for trial in sorted(trials, key=lambda t: t.number):
            if trial.state == state:
                return trial
    return max(trials, key=lambda t: t.number)
