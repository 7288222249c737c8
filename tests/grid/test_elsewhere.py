"""Arms that begin on one machine and end on another, or nowhere: MLflow, sync and audit tell what became of them.

Two machines are two run directories with one ledger and one MLflow store.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import grid_fakes
import pytest
from forked import kill_this_process, killed_in
from grid_fakes import SETTING, make_plan
from ledgers import empty_ledger

from basd.grid.audit import Audit, audit_plan
from basd.grid.ledger import Ledger
from basd.grid.options import GridOptions
from basd.grid.plan import Plan
from basd.grid.run import labels_of, mirror_of, run_grid, sync
from basd.grid.worker import Worker
from basd.tracking.files import read_json
from basd.tracking.mlflow_store import open_client


class Machine:
    """Trains for a table for which other machines train too."""

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self.options = GridOptions(
            directory=str(root / name / "runs"),
            ledger_url=f"sqlite:///{root}/ledger.db",
            tracking_uri=f"sqlite:///{root}/mlflow.db",
            device="cpu",
        )

    def ledger(self) -> Ledger:
        ledger = Ledger(self.options.ledger_url, SETTING, retries=self.options.retries)
        ledger.owner = dataclasses.replace(ledger.owner, host=self.name)
        return ledger

    def work(self, plan: Plan) -> int:
        ledger = self.ledger()
        ledger.ensure(plan.arms.values(), labels_of(plan), plan.name)
        mirror = mirror_of(plan, self.options, ledger).start()
        trained = Worker(plan.arms, self.ledger(), self.options, train=grid_fakes.train_cohort).work()
        assert mirror.drain(30.0), mirror.problem
        return trained

    def die_training(self, plan: Plan) -> None:
        """A process begins the plan's arms, sends some points and is killed: the journal, the ledger and MLflow have no end."""

        def begin() -> None:
            ledger = self.ledger()
            ledger.ensure(plan.arms.values(), labels_of(plan), plan.name)
            mirror_of(plan, self.options, ledger).start()
            Worker(plan.arms, ledger, self.options, train=train).work()

        def train(arms: Any, directories: Any, recorders: Any, **_: Any) -> Any:
            for recorder in recorders:
                recorder.metrics(1, {"train/loss": 1.0})
            for directory, recorder in zip(directories, recorders, strict=True):
                length = recorder.flush()
                while (read_json(directory / "mirror.json") or {}).get("position") != length:
                    time.sleep(0.02)
            kill_this_process()

        killed_in(begin)

    def reap(self) -> list[str]:
        """What a watcher does once the dead one's counter stood still for long enough."""
        watcher = self.ledger()
        watcher.grace = -1.0
        return watcher.reap_stale()

    def sync(self, plan: Plan) -> None:
        outcome = sync(plan, self.options, timeout=20.0)
        assert outcome.mirrored, outcome.mirror_problem

    def audit(self, plan: Plan) -> Audit:
        return audit_plan(plan, self.options, plan.version)

    def runs(self) -> dict[str, str]:
        """Code version, or "configuration" for a parent -> status, with a mark where it was superseded."""
        client = open_client(self.options.tracking_uri)
        experiment = client.get_experiment_by_name(SETTING)
        assert experiment is not None
        found = {}
        for run in client.search_runs([experiment.experiment_id]):
            tags = run.data.tags
            name = tags["basd.version"] if "basd.arm_key" in tags else "configuration"
            found[name] = run.info.status + (" superseded" if "basd.superseded" in tags else "")
        return found


@pytest.fixture
def machines(tmp_path: Path, store: Path) -> tuple[Machine, Machine]:
    shutil.copy(store, tmp_path / "mlflow.db")
    empty_ledger(tmp_path / "ledger.db")
    return Machine("first", tmp_path), Machine("second", tmp_path)


def test_what_a_dead_machine_left_is_no_account_of_an_arm_that_another_completed(
    machines: tuple[Machine, Machine],
) -> None:
    first, second = machines
    plan = make_plan(1, 1)
    first.die_training(plan)
    assert first.runs() == {"v1": "RUNNING", "configuration": "RUNNING"}
    assert second.reap() == list(plan.arms) and second.work(plan) == 1
    assert second.runs() == {"v1": "FINISHED", "configuration": "FINISHED"}
    # the first machine is back, its journal without an end
    first.sync(plan)
    outcome = run_grid(plan, first.options)
    assert outcome.ok and outcome.mirrored and outcome.trained == 0
    assert first.runs() == {"v1": "FINISHED", "configuration": "FINISHED"}
    audit = first.audit(plan)
    assert audit.in_order and "1 arm was trained on another machine" in audit.notes[0], audit.findings
    assert second.audit(plan).in_order


def test_an_arm_retrained_elsewhere_by_newer_code_is_not_superseded_by_what_is_left(
    machines: tuple[Machine, Machine],
) -> None:
    first, second = machines
    old, new = make_plan(1, 1), make_plan(1, 1, version="v2")
    first.die_training(old)
    second.reap()
    assert second.work(new) == 1
    ended = {"v1": "KILLED superseded", "v2": "FINISHED", "configuration": "FINISHED"}
    assert second.runs() == ended
    for machine in (first, second):
        machine.sync(new)
        assert machine.runs() == ended and machine.audit(new).in_order, machine.audit(new).findings


def test_a_complete_training_is_retrained_elsewhere_and_its_mirror_forgets_what_it_sent(
    machines: tuple[Machine, Machine],
) -> None:
    first, second = machines
    old, new = make_plan(1, 1), make_plan(1, 1, version="v2")
    assert first.work(old) == 1
    labels, trained_by = labels_of(new), (lambda state: state.trained_by)
    assert len(second.ledger().retrain(new.arms.values(), labels, new.name, trained_by)) == 1
    first.sync(new)  # while it waits
    assert second.work(new) == 1
    for path in Path(first.options.directory).rglob("mirror.json"):
        path.unlink()
    ended = {"v1": "FINISHED superseded", "v2": "FINISHED", "configuration": "FINISHED"}
    for machine in (first, second):
        machine.sync(new)
        assert machine.runs() == ended and machine.audit(new).in_order, machine.audit(new).findings


def test_a_leftover_that_a_mirror_follows_already_supersedes_nothing(machines: tuple[Machine, Machine]) -> None:
    """The mirror took the old directory before the arm was completed elsewhere, and lost its memory of what it sent."""
    first, second = machines
    old, new = make_plan(1, 1), make_plan(1, 1, version="v2")
    first.die_training(old)
    second.reap()
    mirror = mirror_of(new, first.options, first.ledger())
    assert second.work(new) == 1
    (directory,) = mirror.pending()
    (directory / "mirror.json").unlink()
    mirror.conclude(directory, "KILLED")
    assert mirror.drain(20.0), mirror.problem
    assert first.runs() == {"v1": "KILLED superseded", "v2": "FINISHED", "configuration": "FINISHED"}


@pytest.mark.parametrize(("retries", "status"), [(5, "KILLED"), (0, "FAILED")])
def test_a_run_of_a_machine_that_never_comes_back_is_ended_by_any_other(
    retries: int, status: str, machines: tuple[Machine, Machine]
) -> None:
    first, second = machines
    first.options = dataclasses.replace(first.options, retries=retries)
    second.options = dataclasses.replace(second.options, retries=retries)
    plan = make_plan(1, 1)
    first.die_training(plan)
    second.sync(plan)
    assert second.runs()["v1"] == "RUNNING"  # its counter may still move
    second.reap()
    orphaned = [finding for finding in second.audit(plan).findings if finding.kind == "orphaned"]
    assert {finding.way_out for finding in orphaned} == {"run `basd sync fake_table`"} and len(orphaned) == 2
    second.sync(plan)
    assert second.runs() == {"v1": status, "configuration": status}
    assert [finding.kind for finding in second.audit(plan).findings if finding.kind == "orphaned"] == []
    if retries:
        assert second.work(plan) == 1
        assert second.runs() == {"v1": "FINISHED", "configuration": "FINISHED"} and second.audit(plan).in_order


def test_a_run_whose_arm_is_in_training_elsewhere_stays_open(machines: tuple[Machine, Machine]) -> None:
    first, second = machines
    plan = make_plan(1, 2)
    first.die_training(plan)
    second.sync(plan)
    assert set(second.runs().values()) == {"RUNNING"}
