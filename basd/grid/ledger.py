"""The ledger: what became of each arm. One Optuna study per setting, one trial per arm (and per try of it).

Each arm is trained exactly once. A claim moves one trial from WAITING to RUNNING by compare-and-set; the claim records its owner
and a counter that a thread of the owner increments. A trial is stale when its owner is dead or the counter stood still for
`grace` seconds on the watcher's own clock. Stale and failed trials are enqueued again as new trials up to `retries` times.
Of several trials with one key the one with the lower number wins.

An arm whose result is of other code can be trained again: a trial of the next generation is enqueued, and from that moment on
trials of earlier generations count no more. It names the code version whose result it `replaces`; that code does not train it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from basd.errors import UserError
from basd.grid.processes import is_alive, this_process
from basd.grid.storage import Database
from basd.grid.trials import OF_ONE_TRY, ArmState, State, Trial, counting, fields_of, generation, read_trials

if TYPE_CHECKING:
    from basd.config import FrozenArm
    from basd.grid.options import GridOptions

log = logging.getLogger("basd.ledger")


class _Lives:
    """Which owners live, each looked at once: a worker owns many arms."""

    def __init__(self, one_machine: bool) -> None:
        self._one_machine, self._known = one_machine, dict[str, bool | None]()
        self.asked = time.monotonic()

    def of(self, owner: dict[str, Any]) -> bool | None:
        worker = str(owner.get("worker"))
        if worker not in self._known:
            self._known[worker] = is_alive(owner, self._one_machine)
        return self._known[worker]


class Ledger:
    """The ledger of one setting. Safe to use from several threads and processes."""

    def __init__(self, url: str, setting: str, *, retries: int = 2, grace: float = 60.0, timeout: float = 30.0) -> None:
        self.setting = setting
        self.retries = retries
        self.grace = grace
        self.owner = this_process()
        self._database = Database(url, timeout)
        self._study: int | None = None
        self._held: dict[str, int] = {}  # arm key -> trial that this ledger claimed
        self.replaces: dict[str, str] = {}  # claimed arm key -> code version whose result is to be replaced
        self._guard = threading.Lock()
        self._seen: dict[int, tuple[Any, float]] = {}  # trial -> (owner and beat, when we first saw them)
        self._beating: threading.Thread | None = None
        self._quit = threading.Event()

    @classmethod
    def of(cls, options: GridOptions, setting: str) -> Ledger:
        """The ledger of a setting that these options name."""
        return cls(
            options.ledger_url, setting, retries=options.retries, grace=options.grace, timeout=options.ledger_timeout
        )

    @property
    def database(self) -> Database:
        """Where the ledger is; what else is kept there changes under the same lock."""
        return self._database

    @property
    def exists(self) -> bool:
        """False when nothing was ever written (the database is a file that is not there)."""
        return self._database.exists

    def check(self) -> None:
        """Raise UserError unless the ledger can be opened and written."""
        with self._database.errors(), self._database.exclusive():
            self._study_id()

    # Planning

    def ensure(
        self, arms: Iterable[FrozenArm], labels: Mapping[str, Sequence[str]], ablation: str, *, again: bool = False
    ) -> list[str]:
        """Enqueue every arm that has no waiting, running or complete trial; returns the keys that were enqueued.

        `labels`: arm key -> rows of `ablation` that it serves. `again` also gives arms that used up their retries a new set,
        and takes up arms that a sweep has left.
        """
        arms = list(arms)
        added = []
        with self._database.errors(), self._database.exclusive():
            states = self._states()
            self._set_labels(ablation, {a.arm_key: list(labels[a.arm_key]) for a in arms if labels.get(a.arm_key)})
            for arm in arms:
                state = states.get(arm.arm_key)
                if state is not None and state.state in ("waiting", "failed") and state.closed_to(arm.version):
                    raise UserError(
                        f"{arm.name} seed={arm.seed} is to be trained again by other code than {arm.version}, which is installed "
                        f"here; install {state.version}, or keep to this code with `basd grid {ablation or 'NAME'} --retrain-stale`"
                    )
                over = state is not None and (state.permanent or state.state == "pruned")
                if state is not None and (state.state not in ("failed", "pruned") or (over and not again)):
                    continue
                retry = state.retries + 1 if state and not over else 0
                before = {"generation": state.generation, "replaces": state.replaces} if state else {}
                self._enqueue({**fields_of(arm, labels, ablation), "retry": retry, **before})
                added.append(arm.arm_key)
        return added

    def retrain(
        self,
        arms: Iterable[FrozenArm],
        labels: Mapping[str, Sequence[str]],
        ablation: str,
        trained_by: Callable[[ArmState], str],
    ) -> list[str]:
        """Enqueue anew every complete arm that other code than its arm's version trained; returns the keys.

        `trained_by` tells that of a complete arm. An arm that waits to be trained again by other code than this is kept for this one.
        """
        added = []
        with self._database.errors(), self._database.exclusive():
            states = self._states()
            for arm in arms:
                state = states.get(arm.arm_key)
                if state is None:
                    continue
                if state.state == "complete":
                    replaces = trained_by(state)
                    if replaces == arm.version:
                        continue
                elif state.state in ("waiting", "failed") and state.closed_to(arm.version):
                    replaces = state.version  # the code went back to what it was
                else:
                    continue
                # one write: before it the old result counts, after it the new trial
                again = {"retry": 0, "generation": state.generation + 1, "replaces": replaces}
                self._enqueue({**fields_of(arm, labels, ablation), **again})
                added.append(arm.arm_key)
        return added

    def arms(self, keys: Collection[str] | None = None) -> dict[str, ArmState]:
        """The state of every arm of the setting, or of these keys, by key."""
        with self._database.errors():
            states = self._states()
        return states if keys is None else {key: states[key] for key in keys if key in states}

    def completions(self) -> dict[str, dict[int, Mapping[str, float]]] | None:
        """Every complete trial that no later generation replaces: arm key -> number -> metrics.

        None: the ledger knows no such setting, and is not told of it.
        """
        from optuna.trial import TrialState

        found: dict[str, dict[int, Mapping[str, float]]] = {}
        with self._database.errors():
            storage = self._database.storage
            try:
                study = storage.get_study_id_from_name(self.setting)
            except KeyError:
                return None
            trials = read_trials(storage.engine, study)
            newest: dict[str, int] = {}
            for trial in trials:
                key = trial.user_attrs.get("arm_key", "")
                newest[key] = max(newest.get(key, 0), generation(trial))
            for trial in trials:
                key = trial.user_attrs.get("arm_key", "")
                if trial.state == TrialState.COMPLETE and generation(trial) == newest[key]:
                    found.setdefault(key, {})[trial.number] = trial.user_attrs.get("metrics", {})
        return found

    # Working

    def claim(self, keys: Sequence[str], limit: int, *, workers: int = 1, version: str = "") -> list[str]:
        """Claim waiting arms of one cohort key, that of the first of `keys` that waits.

        At most `limit`, and at most the share of one of `workers`. Returns the claimed keys; none means that nothing waits for
        code of this `version`.
        """
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        claimed: list[str] = []
        with self._database.errors(), self._database.exclusive():
            states = self._states()
            waiting = [states[key] for key in keys if key in states and states[key].open_to(version)]
            share = min(limit, math.ceil(len(waiting) / max(1, workers)))
            storage = self._database.storage
            for state in [s for s in waiting if s.cohort_key == waiting[0].cohort_key]:
                if len(claimed) >= share:
                    break
                try:
                    if not storage.set_trial_state_values(state.trial_id, TrialState.RUNNING):
                        continue  # somebody else was faster
                except UpdateFinishedTrialError:
                    continue
                storage.set_trial_user_attr(state.trial_id, "owner", self.owner.to_dict())
                with self._guard:
                    self._held[state.key] = state.trial_id
                    self.replaces[state.key] = state.replaces
                claimed.append(state.key)
        if not claimed:
            return []
        self._start_beating()
        with self._database.errors():
            states = self._states()
            return [key for key in claimed if states[key].trial_id == self._held[key] or self._drop(key)]

    def _drop(self, key: str) -> bool:
        """End a claim that another trial with the same key and a lower number beats."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        with self._guard:
            trial_id = self._held.pop(key)
        try:
            self._database.storage.set_trial_user_attr(trial_id, "reason", "another trial has the same arm")
            self._database.storage.set_trial_state_values(trial_id, TrialState.FAIL)
        except UpdateFinishedTrialError:
            pass
        return False

    def owned(self, key: str) -> bool:
        """Whether this ledger still owns an arm it claimed. When the database does not answer, the claim is taken to stand."""
        trial_id = self._held.get(key)
        if trial_id is None:
            return False
        try:
            with self._database.errors():
                state = self._states().get(key)
        except UserError as error:
            log.warning("ownership of %s not confirmed: %s", key, error)
            return True
        mine = state is not None and state.trial_id == trial_id and state.state in ("running", "stale")
        return mine and state is not None and (state.owner or {}).get("worker") == self.owner.worker

    def complete(self, key: str, metrics: Mapping[str, float], version: str = "") -> bool:
        """Mark an owned arm complete, trained by code `version`. Returns False when another process has taken it meanwhile."""
        from optuna.trial import TrialState

        stored = {name: v if math.isfinite(v) else str(v) for name, v in ((n, float(x)) for n, x in metrics.items())}
        names = [n for n in ("val/top1", "test/top1", *sorted(metrics)) if n in metrics and math.isfinite(metrics[n])]
        values = [float(metrics[names[0]])] if names else None
        return self._leave(key, TrialState.COMPLETE, {"metrics": stored, "trained_by": version}, values)

    def fail(self, key: str, reason: str, log_path: str = "") -> bool:
        """Mark an owned arm failed; returns whether it was enqueued again."""
        from optuna.trial import TrialState

        if not self._leave(key, TrialState.FAIL, {"reason": reason[:2000], "log": log_path}):
            return False
        return key in self._enqueue_failed([key])

    def prune(self, key: str, reason: str) -> bool:
        """Mark an owned arm left by a sweep. A table that needs it takes it up again, from its checkpoint."""
        from optuna.trial import TrialState

        return self._leave(key, TrialState.PRUNED, {"reason": reason[:2000]})

    def give_back(self, key: str) -> bool:
        """Put an owned arm back among the waiting ones; costs none of its retries."""
        from optuna.trial import TrialState

        return self._leave(key, TrialState.WAITING, {"owner": None})

    def _leave(
        self, key: str, state: Any, attributes: Mapping[str, Any], values: Sequence[float] | None = None
    ) -> bool:
        """Give up a claim: set attributes, then the state, unless somebody else owns the arm by now."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        trial_id = self._held.get(key)
        if trial_id is None:
            return False
        with self._database.errors(), self._database.exclusive():
            trial = self._database.storage.get_trial(trial_id)
            owner = trial.user_attrs.get("owner") or {}
            won = trial.state == TrialState.RUNNING and owner.get("worker") == self.owner.worker
            if won:
                storage = self._database.storage
                try:
                    for name, value in attributes.items():
                        storage.set_trial_user_attr(trial_id, name, value)
                    storage.set_trial_state_values(trial_id, state, values)
                except UpdateFinishedTrialError:
                    won = False
        with self._guard:  # only now: an error above keeps the claim, so that the caller can try again
            self._held.pop(key, None)
        return won

    # Watching

    def reap_stale(self, keys: Collection[str] | None = None) -> list[str]:
        """Fail arms whose owner is gone and enqueue them again while retries last; returns the keys of those that were stale."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        with self._database.errors():
            states = self._states()
        wanted = [s for s in states.values() if keys is None or s.key in keys]
        reaped = []
        if any(s.state == "stale" for s in wanted):
            with self._database.errors(), self._database.exclusive():
                fresh = self._states()
                for key in [s.key for s in wanted if s.state == "stale" and fresh[s.key].state == "stale"]:
                    state, storage = fresh[key], self._database.storage
                    try:
                        reason = (
                            "its process ended without a word" if state.owner else "its process ended while claiming it"
                        )
                        storage.set_trial_user_attr(state.trial_id, "reason", reason)
                        if storage.set_trial_state_values(state.trial_id, TrialState.FAIL):
                            reaped.append(key)
                    except UpdateFinishedTrialError:
                        continue
        lost = [s.key for s in wanted if s.state == "failed" and not s.permanent]
        if reaped or lost:  # `lost`: somebody failed between marking a trial and enqueueing the next
            self._enqueue_failed([*reaped, *lost])
        return reaped

    def close(self) -> None:
        """Stop the counter thread; arms still held become stale after `grace`. A later claim starts a new one."""
        with self._guard:
            thread, self._beating = self._beating, None
            self._quit.set()
            self._quit = threading.Event()
        if thread is not None:
            thread.join(timeout=5.0)

    # Inside

    def _study_id(self) -> int:
        if self._study is None:
            from optuna.exceptions import DuplicatedStudyError
            from optuna.study import StudyDirection

            with self._database.exclusive():
                storage = self._database.storage
                try:
                    self._study = storage.get_study_id_from_name(self.setting)
                except KeyError:
                    try:
                        self._study = storage.create_new_study([StudyDirection.MAXIMIZE], self.setting)
                    except DuplicatedStudyError:
                        self._study = storage.get_study_id_from_name(self.setting)
        return self._study

    def _trials(self) -> list[Trial]:
        return read_trials(self._database.storage.engine, self._study_id())

    def _states(self) -> dict[str, ArmState]:
        """One state per arm key, of its newest generation: complete, running, waiting, pruned, failed, then the lower number
        (failed: the last)."""
        by_key: dict[str, list[Trial]] = {}
        for trial in self._trials():
            if "arm_key" in trial.user_attrs:
                by_key.setdefault(trial.user_attrs["arm_key"], []).append(trial)
        labels = self._labels()
        lives = _Lives(self._database.one_machine)
        return {key: self._state(counting(trials), labels.get(key, {}), lives) for key, trials in by_key.items()}

    def _state(self, trial: Trial, labels: dict[str, list[str]], lives: _Lives) -> ArmState:
        from optuna.trial import TrialState

        names: dict[TrialState, State] = {
            TrialState.WAITING: "waiting",
            TrialState.RUNNING: "running",
            TrialState.COMPLETE: "complete",
            TrialState.PRUNED: "pruned",
        }
        attributes = trial.user_attrs
        state = names.get(trial.state, "failed")
        owner = attributes.get("owner")
        if state == "running" and self._is_stale(trial.trial_id, owner, attributes.get("beat"), lives):
            state = "stale"
        retries = int(attributes.get("retry", 0))
        return ArmState(
            key=attributes["arm_key"],
            state=state,
            number=trial.number,
            trial_id=trial.trial_id,
            seed=int(attributes.get("seed", 0)),
            name=str(attributes.get("name", "")),
            configuration_key=str(attributes.get("configuration_key", "")),
            cohort_key=str(attributes.get("cohort_key", "")),
            version=str(attributes.get("version", "")),
            trained_by=str(attributes.get("trained_by", "")) if state == "complete" else "",
            generation=generation(trial),
            replaces=str(attributes.get("replaces", "")),
            labels=labels,
            owner=owner,
            retries=retries,
            permanent=state == "failed" and retries >= self.retries,
            reason=str(attributes.get("reason", "")) if state in ("failed", "pruned") else "",
            log=str(attributes.get("log", "")) if state == "failed" else "",
            metrics={name: float(value) for name, value in attributes.get("metrics", {}).items()},
        )

    def _is_stale(self, trial_id: int, owner: dict[str, Any] | None, beat: Any, lives: _Lives) -> bool:
        if owner is not None and owner.get("worker") == self.owner.worker:
            return False
        if owner is not None and lives.of(owner) is False:
            return True
        now = lives.asked
        sign = ((owner or {}).get("worker"), beat)
        with self._guard:
            if self._seen.get(trial_id, (None, 0.0))[0] != sign:
                self._seen[trial_id] = (sign, now)
            return now - self._seen[trial_id][1] > self.grace

    def _enqueue(self, attributes: dict[str, Any]) -> None:
        from optuna.trial import TrialState, create_trial

        trial = create_trial(state=TrialState.WAITING, user_attrs=attributes)
        self._database.storage.create_new_trial(self._study_id(), trial)

    def _enqueue_failed(self, keys: Iterable[str]) -> list[str]:
        """Enqueue failed arms that have retries left and no other live trial."""
        added = []
        with self._database.errors(), self._database.exclusive():
            trials = {t.trial_id: t for t in self._trials()}
            states = self._states()
            for key in keys:
                state = states.get(key)
                if state is None or state.state != "failed" or state.permanent:
                    continue
                old = trials[state.trial_id].user_attrs
                kept = {name: value for name, value in old.items() if name not in OF_ONE_TRY}
                self._enqueue({**kept, "retry": state.retries + 1})
                added.append(key)
        return added

    def _labels(self) -> dict[str, dict[str, list[str]]]:
        """arm key -> ablation -> rows. Kept with the study, because a finished trial cannot be labelled for a second table."""
        labels: dict[str, dict[str, list[str]]] = {}
        for name, value in self._database.storage.get_study_user_attrs(self._study_id()).items():
            if name.startswith("rows/"):
                for key, rows in value.items():
                    labels.setdefault(key, {})[name.removeprefix("rows/")] = rows
        return labels

    def _set_labels(self, ablation: str, rows: Mapping[str, list[str]]) -> None:
        storage, name = self._database.storage, f"rows/{ablation}"
        known = storage.get_study_user_attrs(self._study_id()).get(name, {})
        if {**known, **rows} != known:
            storage.set_study_user_attr(self._study_id(), name, {**known, **rows})

    # The sign of life

    def _start_beating(self) -> None:
        with self._guard:
            if self._beating is None:
                self._beating = threading.Thread(target=self._beat, args=(self._quit,), name="basd-beat", daemon=True)
                self._beating.start()

    def _beat(self, quit_event: threading.Event) -> None:
        from optuna.exceptions import UpdateFinishedTrialError

        count = 0
        while not quit_event.wait(self.grace / 5):
            count += 1
            with self._guard:
                held = list(self._held.items())
            for key, trial_id in held:
                if self._held.get(key) != trial_id:
                    continue
                try:
                    with self._database.errors():
                        self._database.storage.set_trial_user_attr(trial_id, "beat", count)
                except UpdateFinishedTrialError:
                    pass  # taken away; training learns of it at its next checkpoint
                except (UserError, RuntimeError, KeyError) as error:  # a locked database must not end the thread
                    log.warning("no sign of life for %s: %s", key, error)
