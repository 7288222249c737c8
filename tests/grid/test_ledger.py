"""The ledger: every arm claimed once, whatever dies."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from basd.errors import UserError
from basd.grid import ledger as ledger_module
from basd.grid import processes
from basd.grid.ledger import Ledger
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


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind: every test that takes it is one that both have to pass."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres").database())
    return f"sqlite:///{tmp_path}/ledger.db"


def filled(url: str, arms: list[Any], **options: Any) -> tuple[Ledger, list[str]]:
    ledger = Ledger(url, "setting", **options)
    ledger.ensure(arms, {a.arm_key: ["row"] for a in arms}, "table")
    return ledger, [a.arm_key for a in arms]


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
    storage, study = ledger.database.storage, ledger._study_id()
    storage.create_new_trial(study)  # as somebody else's, without a word
    expected = storage.get_all_trials(study)
    assert {trial.state.name for trial in expected} == {"COMPLETE", "FAIL", "PRUNED", "RUNNING", "WAITING"}
    found = read_trials(storage.engine, study)
    assert [(t.trial_id, t.number, t.state, t.user_attrs) for t in found] == [
        (t._trial_id, t.number, t.state, t.user_attrs) for t in expected
    ]
    assert len(other._trials()) == 1 and read_trials(storage.engine, study + 100) == []
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


def claim_and_die(url: str) -> None:
    ledger = Ledger(url, "setting")
    ledger.claim([arm(0).arm_key], 1)
    os.kill(os.getpid(), 9)


def test_arm_of_a_killed_process_is_free_at_once(url: str) -> None:
    ledger, keys = filled(url, [arm(0)], grace=1000.0)
    process = multiprocessing.get_context("spawn").Process(target=claim_and_die, args=(url,))
    process.start()
    process.join()
    assert ledger.arms()[keys[0]].state == "stale"
    assert ledger.reap_stale() == keys
    state = ledger.arms()[keys[0]]
    assert (state.state, state.retries) == ("waiting", 1)
    assert ledger.reap_stale() == []


def test_killed_between_claim_and_owner_is_free_after_grace(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from optuna.trial import TrialState

    ledger, keys = filled(url, [arm(0)], grace=5.0)
    ledger._database.storage.set_trial_state_values(ledger.arms()[keys[0]].trial_id, TrialState.RUNNING)
    now = 0.0
    monkeypatch.setattr(ledger_module.time, "monotonic", lambda: now)
    assert ledger.arms()[keys[0]].state == "running"
    now = 6.0
    assert ledger.reap_stale() == keys
    assert ledger.arms()[keys[0]].state == "waiting"


def claim_and_die_before_saying_who(url: str) -> None:
    ledger = Ledger(url, "setting")

    def killed(*_: Any) -> None:
        os.kill(os.getpid(), 9)

    ledger._database.storage.set_trial_user_attr = killed  # type: ignore[method-assign]
    ledger.claim([arm(0).arm_key], 1)


def test_killed_before_it_said_who_it_is_locks_nobody_out(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real process, dead inside the claim: its lock is free, its trial RUNNING without an owner or a beat."""
    ledger, keys = filled(url, [arm(0), arm(1)], grace=5.0)
    process = multiprocessing.get_context("spawn").Process(target=claim_and_die_before_saying_who, args=(url,))
    process.start()
    process.join()
    assert process.exitcode == -9
    state = ledger.arms()[keys[0]]
    assert (state.state, state.owner) == ("running", None)
    assert ledger.claim(keys, 9) == keys[1:]
    now = time.monotonic()
    monkeypatch.setattr(ledger_module.time, "monotonic", lambda: now + 6.0)
    assert ledger.reap_stale() == keys[:1]
    assert ledger.claim(keys, 9) == keys[:1]
    ledger.close()


@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_a_clock_that_jumps_takes_no_arm_from_a_living_worker(
    host: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour forward and back, as after a correction of the time: only the watcher's own steady clock is asked."""
    from datetime import datetime, timedelta

    import optuna

    clock = SimpleNamespace(jump=0.0)

    class Jumping(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(seconds=clock.jump)

    real = time.time
    monkeypatch.setattr(optuna.storages._rdb.storage, "datetime", Jumping)
    monkeypatch.setattr(time, "time", lambda: real() + clock.jump)
    ledger, keys = filled(url, [arm(0)], grace=30.0)
    watcher = Ledger(url, "setting", grace=30.0)
    assert ledger.claim(keys, 1) == keys
    if host == "elsewhere":
        monkeypatch.setattr(processes.socket, "gethostname", lambda: "elsewhere")
    trial = ledger.arms()[keys[0]].trial_id
    for number, clock.jump in enumerate((0.0, 3600.0, -3600.0, 0.0)):
        ledger._database.storage.set_trial_user_attr(trial, "beat", number)
        assert watcher.reap_stale() == [] and ledger.owned(keys[0])
    clock.jump = -3600.0  # it ends before it began
    assert ledger.complete(keys[0], {"val/top1": 1.0}) and watcher.arms()[keys[0]].state == "complete"
    ledger.close()


def test_living_owner_elsewhere_keeps_its_arm_while_its_counter_moves(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, keys = filled(url, [arm(0)], grace=5.0)
    watcher = Ledger(url, "setting", grace=5.0)
    ledger.claim(keys, 1)
    monkeypatch.setattr(processes.socket, "gethostname", lambda: "elsewhere")  # the watcher cannot see the process
    now = 0.0
    monkeypatch.setattr(ledger_module.time, "monotonic", lambda: now)
    monkeypatch.setattr(ledger_module.time, "time", lambda: 1e12)  # clocks that people set are not asked
    trial = watcher.arms()[keys[0]].trial_id
    for count in range(1, 4):
        now += 4.0
        ledger._database.storage.set_trial_user_attr(trial, "beat", 100 + count)
        assert watcher.reap_stale() == []
    now += 6.0
    assert watcher.reap_stale() == keys
    assert not ledger.owned(keys[0])
    assert not ledger.complete(keys[0], {"val/top1": 1.0})
    assert watcher.arms()[keys[0]].state == "waiting"


def test_beat_counts(url: str) -> None:
    ledger, keys = filled(url, [arm(0)], grace=0.5)
    ledger.claim(keys, 1)
    ledger.give_back(keys[0])
    ledger.close()
    ledger.claim(keys, 1)  # a closed ledger may be used again
    time.sleep(0.6)
    trial = ledger._database.storage.get_trial(ledger.arms()[keys[0]].trial_id)
    assert trial.user_attrs["beat"] >= 2
    ledger.close()


def test_lower_number_wins(url: str) -> None:
    ledger, keys = filled(url, [arm(0)])
    ledger._enqueue({"arm_key": keys[0], "cohort_key": "s0"})
    assert ledger.arms()[keys[0]].number == 0
    assert ledger.claim(keys, 5) == keys
    assert ledger.claim(keys, 5) == []
    ledger.complete(keys[0], {"val/top1": 1.0})
    assert (ledger.arms()[keys[0]].number, ledger.arms()[keys[0]].state) == (0, "complete")
    ledger.close()


CLAIMER = """
import sys
from basd.grid.ledger import Ledger
url, keys = sys.argv[1], [f"{i:016x}" for i in range(int(sys.argv[2]))]
ledger = Ledger(url, "setting", timeout=120.0)
while claimed := ledger.claim(keys, 3):
    for key in claimed:
        print(key)
        ledger.complete(key, {"val/top1": 1.0})
"""


def claim_with_two_processes(url: str, count: int) -> None:
    ledger, keys = filled(url, [arm(i) for i in range(count)], timeout=120.0)
    command = [sys.executable, "-c", CLAIMER, url, str(count)]
    claimers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    claimed = [line for claimer in claimers for line in claimer.communicate()[0].split()]
    assert all(claimer.returncode == 0 for claimer in claimers)
    assert Counter(claimed) == Counter(keys)
    assert len(ledger._trials()) == count  # none invented
    assert {state.state for state in ledger.arms().values()} == {"complete"}


def test_two_processes_claim_each_arm_once(url: str) -> None:
    claim_with_two_processes(url, 20)


@pytest.mark.slow
@pytest.mark.parametrize("repeat", range(int(os.environ.get("BASD_REPEATS", "1"))))
def test_two_processes_claim_200_arms_once(url: str, repeat: int) -> None:
    claim_with_two_processes(url, 200)


def test_two_processes_create_the_ledger_together(url: str) -> None:
    program = "import sys; from basd.grid.ledger import Ledger; Ledger(sys.argv[1], 'setting').check()"
    creators = [subprocess.Popen([sys.executable, "-c", program, url]) for _ in range(4)]
    assert [creator.wait() for creator in creators] == [0, 0, 0, 0]
    assert Ledger(url, "setting").arms() == {}


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("sqlite:///{tmp}/missing/ledger.db", "is no directory"),
        ("sqlite:///{tmp}/text.db", "not an SQLite database"),
        ("ledger.db", "no database address"),
        ("sqlite://", "must be a file"),
        ("mysql://me:secret@host/name", r"mysql://me:\*\*\*@host/name: mysql cannot hold a ledger"),
        ("sqlite:///{tmp}", "cannot be used"),
    ],
)
def test_unusable_ledgers_are_told_in_one_sentence(tmp_path: Path, address: str, words: str) -> None:
    (tmp_path / "text.db").write_text("this is no database " * 100)
    with pytest.raises(UserError, match=words):
        Ledger(address.format(tmp=tmp_path), "setting", timeout=1.0).check()


HOLDER = """
import sys, time
from basd.grid.storage import Database
with Database(sys.argv[1]).exclusive():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_is_told_of_and_freed_with_its_holder(url: str) -> None:
    filled(url, [arm(0)])[0].close()
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, url], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="stayed locked by another process for 0.2 s"):
        Ledger(url, "setting", timeout=0.2).claim([f"{0:016x}"], 1)
    holder.kill()
    holder.wait()
    ledger = Ledger(url, "setting", timeout=10)
    assert ledger.claim([f"{0:016x}"], 1) == [f"{0:016x}"]
    ledger.close()


def test_a_transaction_of_another_program_is_told_of_and_the_next_call_goes_on(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
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


RETRAINER = """
import sys
from test_ledger import arm, trained_by
from basd.grid.ledger import Ledger
ledger = Ledger(sys.argv[1], "setting", timeout=120.0)
print(len(ledger.retrain([arm(i, version="w") for i in range(8)], {}, "table", trained_by)))
"""


def test_two_processes_that_retrain_at_once_enqueue_each_arm_once(url: str) -> None:
    ledger, keys = filled(url, [arm(i) for i in range(8)], timeout=120.0)
    completed(url, keys, "v", 0.1)
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    command = [sys.executable, "-c", RETRAINER, url]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path})
        for _ in range(2)
    ]
    assert sum(int(process.communicate()[0]) for process in both) == 8
    assert len(ledger._trials()) == 16 and {state.state for state in ledger.arms().values()} == {"waiting"}
