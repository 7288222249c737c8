"""`basd grid NAME --retrain-stale`: what other code trained is trained again, once, and replaces the old result everywhere."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import grid_fakes
import pytest
from forked import kill_this_process, killed_in
from grid_fakes import SETTING, make_plan
from ledgers import empty_ledger
from rich.console import Console

import analysis
from basd.cli import main, parser
from basd.grid.audit import audit_plan
from basd.grid.finished import find_finished
from basd.grid.ledger import Ledger
from basd.grid.options import GridOptions
from basd.grid.plan import Plan
from basd.grid.run import Outcome, labels_of, mirror_of, run_grid
from basd.grid.versions import said_of_stale, set_aside, stale_versions
from basd.grid.worker import Worker
from basd.tracking.mlflow_store import open_client


class Grid:
    """A table in a directory, whose workers are of this process."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.root = root
        self.options = GridOptions(
            directory=str(root / "runs"),
            ledger_url=empty_ledger(root / "ledger.db"),
            tracking_uri=f"sqlite:///{root}/mlflow.db",
            device="cpu",
            **options,
        )

    def ledger(self) -> Ledger:
        return Ledger(self.options.ledger_url, SETTING)

    def work(self, plan: Plan, train: Any = grid_fakes.train_cohort) -> int:
        """What a worker of the plan's code does, and the mirror beside it."""
        ledger = self.ledger()
        ledger.ensure(plan.arms.values(), labels_of(plan), plan.name)
        mirror = mirror_of(plan, self.options, ledger).start()
        trained = Worker(plan.arms, self.ledger(), self.options, train=train).work()
        assert mirror.drain(30.0), mirror.problem
        return trained

    def retrain(self, plan: Plan) -> list[str]:
        return self.ledger().retrain(plan.arms.values(), labels_of(plan), plan.name, lambda state: state.trained_by)

    def runs(self) -> list[Any]:
        client = open_client(self.options.tracking_uri)
        experiment = client.get_experiment_by_name(SETTING)
        assert experiment is not None
        return list(client.search_runs([experiment.experiment_id]))

    def begun(self, plan: Plan) -> list[int]:
        """How often each arm was begun."""
        paths = [self.options.arm_directory(SETTING, key) / "trainings.txt" for key in plan.arms]
        return [len(path.read_text().split()) for path in paths]


@pytest.fixture
def grid(tmp_path: Path, store: Path) -> Grid:
    shutil.copy(store, tmp_path / "mlflow.db")
    return Grid(tmp_path)


def better(arms: Any, directories: Any, recorders: Any, *, finished: Any, **callbacks: Any) -> Any:
    """The trainer of newer code: its students are better by a tenth."""

    def told(result: Any) -> None:
        result.metrics = {**result.metrics, "test/top1": result.metrics["test/top1"] + 0.1}
        finished(result)

    class Recorder:
        def __init__(self, inner: Any) -> None:
            self.inner, self.rewind, self.flush = inner, inner.rewind, inner.flush

        def metrics(self, step: int, values: Any) -> None:
            self.inner.metrics(step, {k: v + 0.1 if k == "test/top1" else v for k, v in values.items()})

    return grid_fakes.train_cohort(arms, directories, [Recorder(r) for r in recorders], finished=told, **callbacks)


def test_an_arm_that_waits_is_not_stale(grid: Grid) -> None:
    assert grid.work(make_plan(1, 1)) == 1
    ledger, larger = grid.ledger(), make_plan(2, 2)
    ledger.ensure(larger.arms.values(), {}, larger.name)
    assert stale_versions(make_plan(2, 2, version="v2"), grid.options, ledger.arms()) == {"v1": 1}


def test_a_retrained_arm_replaces_its_result_in_ledger_journal_mlflow_and_table(grid: Grid) -> None:
    old, new = make_plan(2, 2), make_plan(2, 2, version="v2")
    assert grid.work(old) == 4
    states = grid.ledger().arms()
    assert stale_versions(new, grid.options, states) == {"v1": 4} and stale_versions(old, grid.options, states) == {}
    said = said_of_stale(new, {"v1": 4}, 4)
    assert "4 of 4 complete arms" in said and "--retrain-stale" in said and "--allow-mixed-code" in said
    first = next(iter(old.arms))
    journal = (grid.options.arm_directory(SETTING, first) / "journal.jsonl").read_bytes()

    assert sorted(grid.retrain(new)) == sorted(new.arms)
    findings = audit_plan(new, grid.options, "v2").findings
    assert {(one.kind, one.what) for one in findings} == {
        ("missing", "waiting to be trained again in place of code v1")
    }
    assert grid.work(new, better) == 4 and grid.begun(new) == [2] * 4
    assert grid.retrain(new) == [] and grid.work(new, better) == 0

    audit = audit_plan(new, grid.options, "v2")
    assert audit.in_order, (audit.findings, audit.problems)
    assert audit.summary.endswith("4 of 4 arms complete, nothing missing, failed or duplicate; code version v2.")
    nested = [run for run in grid.runs() if "basd.arm_key" in run.data.tags]
    told = {(run.data.tags["basd.version"], "basd.superseded" in run.data.tags, run.info.status) for run in nested}
    # what was finished stays so: it only counts no more
    assert len(nested) == 8 and told == {("v1", True, "FINISHED"), ("v2", False, "FINISHED")}
    for parent in [run for run in grid.runs() if "basd.arm_key" not in run.data.tags]:
        assert (parent.info.status, parent.data.tags["basd.version"]) == ("FINISHED", "v2")
        assert parent.data.metrics["test/top1"] == pytest.approx(0.605)
    frame = analysis.load(new.name, tracking_uri=grid.options.tracking_uri, setting=SETTING, rows=new.cells)
    assert set(frame["version"]) == {"v2"} and len(frame) == 4 and frame.attrs["warnings"] == []
    assert sorted(frame["test/top1"]) == pytest.approx([0.6, 0.6, 0.61, 0.61])
    # the old training is kept beside the new one and has a name of its own
    aside = grid.options.arm_directory(SETTING, f"{first}-of-v1")
    assert (aside / "journal.jsonl").read_bytes() == journal and (aside / "student.safetensors").exists()
    assert json.loads((aside / "arm.json").read_text())["version"] == "v1"


def test_the_old_student_can_still_be_named(grid: Grid) -> None:
    plan = make_plan(1, 1)
    key = next(iter(plan.arms))
    plan.arms[key].config.update(student={}, data={})
    grid.work(plan)
    directory = grid.options.arm_directory(SETTING, key)
    aside = set_aside(directory)
    assert aside is not None
    found = find_finished(f"{key}-of-v1", Path(grid.options.directory), grid.options.tracking_uri, None, grid.root)
    assert (found.weights.parent, found.version, found.label) == (aside, "v1", f"{key}-of-v1")


def test_setting_aside_goes_on_after_a_kill_and_takes_no_other_result_away(grid: Grid) -> None:
    plan = make_plan(1, 1)
    grid.work(plan)
    directory = grid.options.arm_directory(SETTING, next(iter(plan.arms)))
    copy = directory.with_name("copy")
    shutil.copytree(directory, copy)
    aside = set_aside(directory)
    assert aside is not None and set_aside(directory) is None
    shutil.move(aside / "student.safetensors", directory)  # as when killed before the last move
    assert set_aside(directory) == aside
    assert {path.name for path in aside.iterdir()} == {
        *("arm.json", "config.yaml", "journal.jsonl", "mirror.json", "student.safetensors")
    }
    for name in ("student.safetensors", "journal.jsonl"):
        shutil.copy(copy / name, directory)
    second = set_aside(directory)
    assert second is not None and second.name.endswith("-of-v1-2") and (aside / "student.safetensors").exists()


def test_killed_after_its_journal_closed_it_is_taken_over_as_what_trained_it(grid: Grid) -> None:
    """The old code's journal is none of the new trial; the new code's is, whatever the code is by then."""
    old, new, newest = (make_plan(1, 1, version=version) for version in ("v1", "v2", "v3"))
    (key,) = old.arms
    grid.work(old)
    grid.retrain(new)

    def die_telling() -> None:
        ledger = grid.ledger()
        storage = ledger.database.storage
        tell = storage.set_trial_user_attr

        def write(trial: int, name: str, value: Any) -> None:
            kill_this_process() if name == "metrics" else tell(trial, name, value)

        storage.set_trial_user_attr = write  # type: ignore[method-assign]
        Worker(new.arms, ledger, grid.options, train=better).work()

    killed_in(die_telling)
    assert grid.ledger().reap_stale() == [key]
    assert grid.work(newest, better) == 1
    assert grid.begun(old) == [2]
    state = grid.ledger().arms()[key]
    assert (state.state, state.trained_by, state.metrics["test/top1"]) == ("complete", "v2", 0.6)


def test_a_worker_of_the_old_code_leaves_it_alone(grid: Grid) -> None:
    old, new = make_plan(1, 1), make_plan(1, 1, version="v2")
    grid.work(old)
    grid.retrain(new)
    assert Worker(old.arms, grid.ledger(), grid.options, train=better).work() == 0
    assert grid.begun(old) == [1]
    assert grid.work(new, better) == 1


def test_an_interrupted_retraining_goes_on_with_and_without_the_flag(grid: Grid) -> None:
    options = dataclasses.replace(grid.options, trainer="grid_fakes:train_cohort")

    def run(plan: Plan, **given: Any) -> tuple[Outcome, str]:
        text = io.StringIO()
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        outcome = run_grid(plan, options, here=True, console=Console(file=text, width=200), **given)
        for number, handler in before.items():
            signal.signal(number, handler)
        return outcome, text.getvalue()

    grid.work(make_plan(2, 1))
    new = make_plan(2, 1, {(1, 0): {"terminate_at": 1}}, version="v2")
    outcome, _ = run(new)
    assert outcome.ok and outcome.trained == 0 and outcome.stale == {"v1": 2}
    outcome, _ = run(new, retrain_stale=True)
    assert outcome.interrupted and not outcome.complete and grid.begun(new) == [2, 2]
    outcome, _ = run(new)
    assert outcome.ok and outcome.trained == 2 and outcome.stale == {} and grid.begun(new) == [3, 3]
    outcome, _ = run(new, retrain_stale=True)
    assert outcome.ok and outcome.trained == 0 and grid.begun(new) == [3, 3]
    assert audit_plan(new, options, "v2").in_order


def test_the_command_has_the_flag_and_mixed_tables_name_it() -> None:
    assert parser().parse_args(["grid", "main", "--retrain-stale"]).retrain_stale
    with pytest.raises(SystemExit):
        main(["report", "main", "--retrain-stale"])
