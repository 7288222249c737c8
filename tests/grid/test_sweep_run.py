"""`run_sweep` from batch to batch, with arms that end at once: what it says and survives, and what reaches MLflow."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sweep_fakes
import yaml
from ledgers import empty_ledger
from mlflow import MlflowClient
from rich.console import Console
from tiny import TINY

from basd.errors import UserError
from basd.grid.options import GridOptions
from basd.grid.plan import Preparer
from basd.grid.sweep import SweepOutcome, run_sweep
from basd.grid.sweeps import Sweep, load_sweep

SPACE = {"weighting.temperature": "interval(0.1, 10)"}


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sweep]:
    monkeypatch.chdir(tmp_path)
    sweep_fakes.before.clear()
    (tmp_path / "sweeps").mkdir()

    def make(*overrides: str, **changes: object) -> Sweep:
        values = {"space": SPACE, "sampler": "random", "trials": 5, "batch": 2, **changes}
        (tmp_path / "sweeps" / "mine.yaml").write_text(yaml.safe_dump(values))
        return load_sweep("mine", [*TINY, *overrides])

    return make


@pytest.fixture
def options(tmp_path: Path, store: Path) -> GridOptions:
    (tmp_path / "tracking").mkdir()
    shutil.copy(store, tmp_path / "tracking" / "mlflow.db")
    return GridOptions(
        directory=str(tmp_path / "runs"),
        ledger_url=empty_ledger(tmp_path / "ledger.db"),
        tracking_uri=f"sqlite:///{tmp_path}/tracking/mlflow.db",
        device="cpu",
        trainer="sweep_fakes:train",
    )


def run(sweep: Sweep, options: GridOptions, preparer: Preparer) -> tuple[SweepOutcome, str]:
    text = io.StringIO()
    outcome = run_sweep(sweep, options, preparer, console=Console(file=text, width=200), quiet=True, here=True)
    return outcome, text.getvalue()


def test_batches_follow_each_other_until_the_last_trial(sweep, options: GridOptions, preparer: Preparer) -> None:
    outcome, said = run(sweep(), options, preparer)
    assert outcome.states == {"COMPLETE": 5} and outcome.trained == 5 and outcome.mirrored and not outcome.stuck
    assert [line for line in said.splitlines() if line.startswith("Trial")] == [
        "Trials 0, 1 of 5: 2 arms.", "Trials 2, 3 of 5: 2 arms.", "Trial 4 of 5: 1 arm."]  # fmt: skip
    again, said = run(sweep(), options, preparer)
    assert again.trained == 0 and "Trial" not in said
    more, said = run(sweep("trials=6"), options, preparer)
    assert more.trained == 1 and "Trial 5 of 6: 1 arm." in said


def test_a_tracking_store_that_goes_away_does_not_end_the_search(
    sweep, options: GridOptions, preparer: Preparer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(sweep("trials=1"), options, preparer)
    cohorts = [0]

    def away() -> None:
        cohorts[0] += 1
        if cohorts[0] == 1:
            (tmp_path / "tracking").rename(tmp_path / "elsewhere")
            (tmp_path / "tracking").write_text("no folder")

    sweep_fakes.before.append(away)
    with monkeypatch.context() as patch:
        patch.setattr("basd.grid.sweep.PATIENCE", 1.0)
        outcome, _ = run(sweep("trials=4"), options, preparer)
    assert outcome.states == {"COMPLETE": 4} and outcome.trained == 3
    assert not outcome.mirrored and "basd sync mine" in outcome.mirror_problem
    # back again, the next call sends what is owed
    (tmp_path / "tracking").unlink()
    (tmp_path / "elsewhere").rename(tmp_path / "tracking")
    outcome, _ = run(sweep("trials=4"), options, preparer)
    assert outcome.mirrored and outcome.trained == 0
    client = MlflowClient(options.tracking_uri)
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    assert sum("basd.arm_key" in run.data.tags for run in runs) == 4
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_store_that_is_away_from_the_beginning_is_said_before_any_compute(
    sweep, options: GridOptions, preparer: Preparer, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "tracking")
    with pytest.raises(UserError, match="tracking"):
        run(sweep(), options, preparer)
    assert not list(tmp_path.glob("runs/*/*/journal.jsonl"))


def test_seldom_validated_epochs_are_noted_and_too_few_refused(sweep, options: GridOptions, preparer: Preparer) -> None:
    with pytest.raises(UserError, match="has nothing to decide on"):
        run(sweep("recipe.duration=2 epochs", pruner="hyperband"), options, preparer)
    _, said = run(sweep("recipe.duration=6 epochs", "trials=1", pruner="median"), options, preparer)
    assert "every 2 epochs" in said
