"""The ledger: every arm claimed once, whatever dies."""

from __future__ import annotations

import dataclasses
import os
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from forked import at_once, kill_this_process, killed_in, start
from ledgers import empty_ledger
from optuna.trial import TrialState, create_trial

from basd.errors import UserError
from basd.grid.ledger import Ledger
from basd.grid.storage import Database
from basd.grid.trials import read_trials


def arm(number: int, cohort: int = 0, version: str = "v") -> Any:
    return SimpleNamespace(
        arm_key=f"{number:016x}",
        configuration_key="c",
        cohort_key=f"s{cohort}",
        seed=cohort,
        name=f"n{number}",
        version=version,
    )


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.full)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database; both kinds must pass every test that takes it."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres").database())
    return empty_ledger(tmp_path / "ledger.db")


def filled(url: str, arms: list[Any], **options: Any) -> tuple[Ledger, list[str]]:
    ledger = Ledger(url, "setting", **options)
    ledger.ensure(arms, {a.arm_key: ["row"] for a in arms}, "table")
    return ledger, [a.arm_key for a in arms]


def in_optuna(ledger: Ledger) -> list[Any]:
    """The ledger's trials as Optuna reads them."""
    storage = ledger.database.storage
    return storage.get_all_trials(storage.get_study_id_from_name("setting"))


def sign_of_life(ledger: Ledger, key: str, count: int) -> None:
    """What the ledger's thread writes from time to time."""
    ledger.database.storage.set_trial_user_attr(ledger.arms()[key].trial_id, "beat", count)


def on(ledger: Ledger, host: str) -> Ledger:
    """The ledger of a process on another machine: nobody can see from here whether it lives."""
    ledger.owner = dataclasses.replace(ledger.owner, host=host)
    return ledger


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the steady clock of this process."""
    real, ahead = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: real() + ahead[0])

    def forward(seconds: float) -> None:
        ahead[0] += seconds

    return forward


def test_life_of_an_arm(url: str) -> None:
    ledger, keys = filled(url, [arm(0), arm(1), arm(2)])
    assert ledger.claim(keys, 2) == keys[:2]
    assert ledger.owned(keys[0]) and not ledger.owned(keys[2])
    assert ledger.complete(keys[0], {"val/top1": 0.5, "test/nll": float("inf")})
    assert ledger.give_back(keys[1])
    states = ledger.arms()
    assert [states[key].state for key in keys] == ["complete", "waiting", "waiting"]
    assert states[keys[0]].metrics == {"val/top1": 0.5, "test/nll": float("inf")}
    assert states[keys[0]].labels == {"table": ["row"]}
    assert states[keys[1]].retries == 0
    ledger.close()


def test_ensure_twice_adds_nothing_and_second_table_labels_finished_arms(url: str) -> None:
    ledger, keys = filled(url, [arm(0)])
    ledger.claim(keys, 1)
    ledger.complete(keys[0], {"val/top1": 1.0})
    assert ledger.ensure([arm(0)], {keys[0]: ["other"]}, "second", again=True) == []
    assert ledger.arms()[keys[0]].labels == {"table": ["row"], "second": ["other"]}
    ledger.close()


def test_the_ledger_reads_what_optuna_reads(url: str) -> None:
    ledger, keys = filled(url, [arm(i) for i in range(5)], retries=0)
    other = Ledger(url, "another setting")
    other.ensure([arm(9)], {}, "table")
    ledger.claim(keys, 4)
    ledger.complete(keys[0], {"val/top1": 0.5, "test/nll": float("nan")})
    ledger.fail(keys[1], "loss “is” not finite\n\\ 100 %")
    ledger.prune(keys[2], "left")
    storage = ledger.database.storage
    study = storage.get_study_id_from_name("setting")
    storage.create_new_trial(study)  # somebody else's trial, without attributes
    expected = in_optuna(ledger)
    assert {trial.state.name for trial in expected} == {"COMPLETE", "FAIL", "PRUNED", "RUNNING", "WAITING"}
    found = read_trials(storage.engine, study)
    assert [(t.trial_id, t.number, t.state, t.user_attrs) for t in found] == [
        (t._trial_id, t.number, t.state, t.user_attrs) for t in expected
    ]
    assert len(other.arms()) == 1 and read_trials(storage.engine, study + 100) == []
    assert set(ledger.arms()) == set(keys)
    ledger.close()


def test_claims_stay_in_one_cohort_and_leave_a_share(url: str) -> None:
    ledger, keys = filled(url, [arm(i, cohort=i // 3) for i in range(6)])
    other = Ledger(url, "setting")
    assert ledger.claim(keys, 16, workers=3) == keys[:2]
    assert other.claim(keys, 16) == keys[2:3]
    assert other.claim(keys, 16) == keys[3:]
    assert ledger.claim(keys, 16) == []
    ledger.close()
    other.close()


def test_failures_are_tried_again_until_retries_are_used_up(url: str) -> None:
    ledger, keys = filled(url, [arm(0)], retries=1)
    ledger.claim(keys, 1)
    assert ledger.fail(keys[0], "first")
    ledger.claim(keys, 1)
    assert not ledger.fail(keys[0], "loss is not finite at step 7", "a.log")
    state = ledger.arms()[keys[0]]
    assert (state.state, state.permanent, state.reason, state.log) == (
        "failed",
        True,
        "loss is not finite at step 7",
        "a.log",
    )
    assert ledger.ensure([arm(0)], {}, "table") == []
    assert ledger.ensure([arm(0)], {}, "table", again=True) == keys
    assert ledger.arms()[keys[0]].state == "waiting"
    ledger.close()


def test_arm_of_a_killed_process_is_free_at_once(url: str) -> None:
    ledger, keys = filled(url, [arm(0)], grace=1000.0)

    def claim_and_die() -> None:
        Ledger(url, "setting").claim(keys, 1)
        kill_this_process()

    killed_in(claim_and_die)
    assert ledger.arms()[keys[0]].state == "stale"
    assert ledger.reap_stale() == keys
    state = ledger.arms()[keys[0]]
    assert (state.state, state.retries) == ("waiting", 1)
    assert ledger.reap_stale() == []


def test_a_process_killed_inside_its_claim_locks_nobody_out(url: str, clock: Callable[[float], None]) -> None:
    """The database frees its lock. Its trial is RUNNING without an owner or a sign of life, and free after `grace`."""
    ledger, keys = filled(url, [arm(0), arm(1)], grace=5.0)

    def claim_and_die() -> None:
        dying = Ledger(url, "setting")
        # the first attribute that a claim writes is the owner
        dying.database.storage.set_trial_user_attr = kill_this_process  # type: ignore[method-assign]
        dying.claim(keys, 1)

    killed_in(claim_and_die)
    state = ledger.arms()[keys[0]]
    assert (state.state, state.owner) == ("running", None)
    assert ledger.claim(keys, 9) == keys[1:]
    clock(6.0)
    assert ledger.reap_stale() == keys[:1]
    assert ledger.arms()[keys[0]].state == "waiting"
    assert ledger.claim(keys, 9) == keys[:1]
    ledger.close()


@pytest.mark.parametrize("host", ["this machine", "another machine"])
def test_a_clock_that_jumps_takes_no_arm_from_a_living_worker(
    host: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of day jumps an hour forward and back: only the watcher's own steady clock counts."""
    jump = [0.0]

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(seconds=jump[0])

    real = time.time
    monkeypatch.setattr(optuna.storages._rdb.storage, "datetime", Jumping)
    monkeypatch.setattr(time, "time", lambda: real() + jump[0])
    ledger, keys = filled(url, [arm(0)], grace=30.0)
    watcher = Ledger(url, "setting", grace=30.0)
    if host == "another machine":
        on(ledger, host)
    assert ledger.claim(keys, 1) == keys
    for number, jump[0] in enumerate((0.0, 3600.0, -3600.0, 0.0)):
        sign_of_life(ledger, keys[0], number)
        assert watcher.reap_stale() == [] and ledger.owned(keys[0])
    jump[0] = -3600.0  # it ends before it began
    assert ledger.complete(keys[0], {"val/top1": 1.0}) and watcher.arms()[keys[0]].state == "complete"
    ledger.close()


def test_living_owner_elsewhere_keeps_its_arm_while_its_counter_moves(url: str, clock: Callable[[float], None]) -> None:
    ledger, keys = filled(url, [arm(0)], grace=60.0)
    on(ledger, "another machine").claim(keys, 1)
    watcher = Ledger(url, "setting", grace=60.0)
    for count in range(1, 4):
        clock(50.0)
        sign_of_life(ledger, keys[0], 100 + count)
        assert watcher.reap_stale() == []
    clock(70.0)
    assert watcher.reap_stale() == keys
    assert not ledger.owned(keys[0])
    assert not ledger.complete(keys[0], {"val/top1": 1.0})
    assert watcher.arms()[keys[0]].state == "waiting"
    ledger.close()


def test_a_thread_gives_signs_of_life(url: str) -> None:
    ledger, keys = filled(url, [arm(0)], grace=0.1)
    ledger.claim(keys, 1)
    ledger.give_back(keys[0])
    ledger.close()
    ledger.claim(keys, 1)  # a closed ledger may be used again
    limit = time.monotonic() + 30
    while in_optuna(ledger)[0].user_attrs.get("beat", 0) < 2:
        assert time.monotonic() < limit
        time.sleep(0.02)
    ledger.close()


def test_of_two_trials_of_one_arm_the_lower_number_wins(url: str) -> None:
    ledger, keys = filled(url, [arm(0)])
    storage = ledger.database.storage
    again = create_trial(state=TrialState.WAITING, user_attrs={"arm_key": keys[0], "cohort_key": "s0"})
    storage.create_new_trial(storage.get_study_id_from_name("setting"), again)
    assert ledger.arms()[keys[0]].number == 0
    assert ledger.claim(keys, 5) == keys
    assert ledger.claim(keys, 5) == []
    ledger.complete(keys[0], {"val/top1": 1.0})
    assert (ledger.arms()[keys[0]].number, ledger.arms()[keys[0]].state) == (0, "complete")
    ledger.close()


def claim_with_two_processes(url: str, count: int) -> None:
    ledger, keys = filled(url, [arm(i) for i in range(count)], timeout=120.0)

    def claim_all() -> list[str]:
        own, claimed = Ledger(url, "setting", timeout=120.0), []
        while found := own.claim(keys, 3):
            for key in found:
                claimed.append(key)
                assert own.complete(key, {"val/top1": 1.0})
        return claimed

    claimed = at_once(2, claim_all)
    assert Counter(claimed[0] + claimed[1]) == Counter(keys)
    assert len(in_optuna(ledger)) == count  # none invented
    assert {state.state for state in ledger.arms().values()} == {"complete"}


def test_two_processes_claim_each_arm_once(url: str) -> None:
    claim_with_two_processes(url, 12)


@pytest.mark.full
@pytest.mark.parametrize("repeat", range(int(os.environ.get("BASD_REPEATS", "1"))))
def test_two_processes_claim_100_arms_once(url: str, repeat: int) -> None:
    claim_with_two_processes(url, 100)


def test_processes_create_the_ledger_together(url: str, tmp_path: Path) -> None:
    (tmp_path / "ledger.db").unlink(missing_ok=True)
    assert at_once(4, lambda: Ledger(url, "setting").check()) == [None] * 4
    assert Ledger(url, "setting").arms() == {}


def test_unusable_ledgers_are_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("this is no database " * 100)
    for address, words in (
        ("sqlite:///{tmp}/missing/ledger.db", "is no directory"),
        ("sqlite:///{tmp}/text.db", "not an SQLite database"),
        ("ledger.db", "no database address"),
        ("sqlite://", "must be a file"),
        ("mysql://me:secret@host/name", "mysql://me:***@host/name: mysql cannot hold a ledger"),
        ("sqlite:///{tmp}", "cannot be used"),
    ):
        with pytest.raises(UserError) as error:
            Ledger(address.format(tmp=tmp_path), "setting", timeout=1.0).check()
        assert words in str(error.value) and "\n" not in str(error.value), address


def test_a_lock_is_told_of_and_freed_with_its_holder(url: str, tmp_path: Path) -> None:
    _, keys = filled(url, [arm(0)])
    held = tmp_path / "held"

    def hold() -> None:
        with Database(url).exclusive():
            held.touch()
            time.sleep(60)

    holder = start(hold)
    while not held.exists():
        assert holder.is_alive()
        time.sleep(0.02)
    with pytest.raises(UserError, match="stayed locked by another process for 0.2 s"):
        Ledger(url, "setting", timeout=0.2).claim(keys, 1)
    holder.kill()
    holder.join()
    ledger = Ledger(url, "setting", timeout=10)
    assert ledger.claim(keys, 1) == keys
    ledger.close()


def test_a_transaction_of_another_program_is_told_of_and_the_next_call_goes_on(tmp_path: Path) -> None:
    url = empty_ledger(tmp_path / "ledger.db")
    filled(url, [arm(0)])
    connection = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError, match="stayed locked by another process for 0.2 s"):
        Ledger(url, "setting", timeout=0.2).arms()
    connection.rollback()
    assert len(Ledger(url, "setting", timeout=0.2).arms()) == 1


# -- trained again by other code ---------------------------------------------------------------------------------------


def trained_by(state: Any) -> str:
    return str(state.trained_by)


def completed(url: str, keys: list[str], version: str, top1: float) -> Ledger:
    """Claim and complete what waits for code of this version."""
    ledger = Ledger(url, "setting")
    for key in ledger.claim(keys, 9, version=version):
        assert ledger.complete(key, {"val/top1": top1}, version)
    ledger.close()
    return ledger


def test_a_retrained_arm_replaces_the_old_result_once(url: str) -> None:
    ledger, keys = filled(url, [arm(0), arm(1)])
    completed(url, keys, "v", 0.1)
    newer = [arm(0, version="w"), arm(1, version="w")]
    assert ledger.retrain([arm(0), arm(1)], {}, "table", trained_by) == []
    assert ledger.retrain(newer[:1], {}, "table", trained_by) == keys[:1]
    assert ledger.retrain(newer[:1], {}, "table", trained_by) == []  # it waits already
    states = ledger.arms()
    assert [(states[key].state, states[key].replaces) for key in keys] == [("waiting", "v"), ("complete", "")]
    assert ledger.completions() == {keys[1]: {1: {"val/top1": 0.1}}}
    assert ledger.ensure(newer, {}, "table") == []
    # the code whose result is to be replaced neither trains it nor waits for ever
    with pytest.raises(UserError, match="--retrain-stale"):
        ledger.ensure([arm(0)], {}, "table")
    assert ledger.claim(keys, 9, version="v") == [] and not states[keys[0]].open_to("v")
    completed(url, keys, "w", 0.2)
    state = ledger.arms()[keys[0]]
    assert (state.state, state.metrics, state.trained_by, state.number) == ("complete", {"val/top1": 0.2}, "w", 2)
    assert ledger.completions() == {keys[1]: {1: {"val/top1": 0.1}}, keys[0]: {2: {"val/top1": 0.2}}}
    assert ledger.retrain(newer[:1], {}, "table", trained_by) == []


def test_tries_of_a_retrained_arm_stay_tries_of_it(url: str) -> None:
    """Neither a failed try nor a new set of retries brings the old result back."""
    ledger, keys = filled(url, [arm(0)], retries=1)
    completed(url, keys, "v", 0.1)
    newer = [arm(0, version="w")]
    ledger.retrain(newer, {}, "table", trained_by)
    for again in (True, False):
        assert ledger.claim(keys, 1, version="w") == keys and ledger.replaces[keys[0]] == "v"
        assert ledger.fail(keys[0], "no") is again
    assert (ledger.arms()[keys[0]].state, ledger.completions()) == ("failed", {})
    assert ledger.ensure(newer, {}, "table", again=True) == keys
    assert ledger.claim(keys, 1, version="v") == [] and ledger.claim(keys, 1, version="w") == keys
    ledger.close()


def test_code_that_goes_back_keeps_to_its_own_result(url: str) -> None:
    ledger, keys = filled(url, [arm(0)])
    completed(url, keys, "v", 0.1)
    ledger.retrain([arm(0, version="w")], {}, "table", trained_by)
    assert ledger.retrain([arm(0)], {}, "table", trained_by) == keys
    assert ledger.claim(keys, 1, version="w") == []
    completed(url, keys, "v", 0.1)
    assert (ledger.arms()[keys[0]].trained_by, len(ledger.completions() or {})) == ("v", 1)


def test_two_processes_that_retrain_at_once_enqueue_each_arm_once(url: str) -> None:
    ledger, keys = filled(url, [arm(i) for i in range(8)], timeout=120.0)
    completed(url, keys, "v", 0.1)
    newer = [arm(i, version="w") for i in range(8)]

    def retrain() -> int:
        return len(Ledger(url, "setting", timeout=120.0).retrain(newer, {}, "table", trained_by))

    assert sum(at_once(2, retrain)) == 8
    assert len(in_optuna(ledger)) == 16 and {state.state for state in ledger.arms().values()} == {"waiting"}
