"""`basd sweep` as a user meets it: real processes and arms, killed in the middle, read by status, audit, report and MLflow."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import yaml
from command import basd_here
from mlflow import MlflowClient
from tiny import TINY

# eight trials over four epochs on one process: who is left is then the same however often it is killed. The students are larger
# than the other tests' and some of their rates far too small, so that trials differ.
MINE = {
    "question": "Which rate?",
    "overrides": ["method=ce", "recipe.validate_every=1"],
    "space": {"recipe.lr": "tag(log, interval(1e-6, 2e-2))", "recipe.weight_decay": "choice(0.0, 0.05)"},
    "sampler": {"name": "tpe", "startup": 3},
    "pruner": {"name": "hyperband"},
    "trials": 8,
    "batch": 4,
    "seeds": [0, 1],
}
SWEEP = ["mine", *TINY, "student.width=24", "student.drop_path=0", "recipe.batch_size=100", "recipe.duration=4 epochs", "recipe.validate_every=1",
         "runtime.processes=1"]  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def started(cwd: Path, cache: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "BASD_CACHE": str(cache), "COLUMNS": "160"}
    command = [sys.executable, "-m", "basd", *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def basd(cwd: Path, cache: Path, *arguments: str) -> tuple[int, str]:
    process = started(cwd, cache, *arguments)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, store: Path, cache: Path) -> tuple[Path, str]:
    folder = prepared(tmp_path_factory.mktemp("sweep"), store)
    status, output = basd(folder, cache, "sweep", *SWEEP)
    assert status == 0, output
    return folder, output


def prepared(folder: Path, store: Path) -> Path:
    shutil.copy(store, folder / "mlflow.db")
    (folder / "sweeps").mkdir()
    (folder / "sweeps" / "mine.yaml").write_text(yaml.safe_dump(MINE, sort_keys=False))
    return folder


def trials_of(folder: Path) -> list[tuple[Any, ...]]:
    storage = f"sqlite:///{folder}/ledger.db"
    (name,) = [one.study_name for one in optuna.get_all_study_summaries(storage) if " sweep mine " in one.study_name]
    trials = optuna.load_study(study_name=name, storage=storage).trials
    return [
        (t.number, t.state.name, t.values, t.params, t.intermediate_values, t.user_attrs.get("reason")) for t in trials
    ]


@pytest.mark.full
def test_it_searches_and_reports(swept: tuple[Path, str]) -> None:
    folder, output = swept
    trials = trials_of(folder)
    assert len(trials) == 8 and {state for _, state, *_ in trials} == {"COMPLETE", "PRUNED"}
    assert trials[0][3] == {"recipe.lr": 0.001, "recipe.weight_decay": "0.05"} and trials[0][1] == "COMPLETE"
    assert "Best (trial" in output and "Traceback" not in output
    (reports,) = (path for path in (folder / "reports").iterdir() if path.is_dir())
    assert "/mine.html" in (folder / "reports" / "index.html").read_text()
    assert {path.name for path in reports.iterdir()} >= {
        "mine.md", "mine.html", "mine.trials.csv", "mine.history.pdf", "mine.history.png", "mine.epochs.png", "mine.slices.png"}  # fmt: skip


@pytest.mark.full
def test_pruned_arms_end_where_they_were_left(swept: tuple[Path, str]) -> None:
    import json

    folder, _ = swept
    ends = {}
    for journal in folder.glob("runs/*/*/journal.jsonl"):
        events = [json.loads(line) for line in journal.read_text().splitlines()]
        steps = [event["step"] for event in events if "step" in event and event["metrics"]]
        epoch = json.loads((journal.parent / "arm.json").read_text())["total_steps"] // 4
        ends[journal.parent.name] = (events[-1]["end"], events[-1]["reason"], max(steps) / epoch)
    left = [end for end in ends.values() if end[0] == "stopped"]
    assert left, "something was pruned"
    for _, reason, epochs in left:
        assert f"after epoch {epochs:g} of 4" in reason


@pytest.mark.full
def test_called_again_it_trains_nothing_and_writes_the_same_report(swept: tuple[Path, str], cache: Path) -> None:
    folder, _ = swept
    files = {path: path.read_bytes() for path in (folder / "reports").rglob("mine.*")}
    status, output = basd_here("sweep", *SWEEP, cwd=folder, cache=cache)
    assert status == 0 and "Nothing to train" in output, output
    assert {path: path.read_bytes() for path in (folder / "reports").rglob("mine.*")} == files
    status, output = basd_here("report", "mine", cwd=folder, cache=cache)
    assert status == 0 and "Best (trial" in output
    assert {path: path.read_bytes() for path in (folder / "reports").rglob("mine.*")} == files


@pytest.mark.full
def test_status_audit_sync_and_plan_know_it(swept: tuple[Path, str], cache: Path) -> None:
    folder, _ = swept
    status, output = basd_here("audit", "mine", cwd=folder, cache=cache)
    assert status == 0 and "left by the sweep" in output and "nothing missing" in output, output
    status, output = basd_here("status", "mine", cwd=folder, cache=cache)
    assert status == 0 and "left by the sweep" in output and "nobody is training" not in output
    status, output = basd_here("sync", *SWEEP, cwd=folder, cache=cache)
    assert status == 0 and "MLflow has everything." in output
    status, output = basd_here("plan", *SWEEP, "--no-probe", cwd=folder, cache=cache)
    assert status == 0 and "complete" in output and "recipe.weight_decay" in output


@pytest.mark.full
def test_mlflow_nests_sweep_configurations_and_arms(swept: tuple[Path, str]) -> None:
    folder, _ = swept
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()], max_results=1000)
    (sweep,) = [run for run in runs if run.data.tags.get("basd.sweep") == "mine"]
    assert sweep.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(sweep.info.run_id)} == {"figures", "mine.md", "mine.trials.csv"}
    below = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == sweep.info.run_id]
    arms = [run for run in runs if "basd.arm_key" in run.data.tags]
    assert len(below) == 8
    assert {run.data.tags["mlflow.parentRunId"] for run in arms} == {run.info.run_id for run in below}
    complete = [trial for trial in trials_of(folder) if trial[1] == "COMPLETE"]
    history = client.get_metric_history(sweep.info.run_id, "sweep/val/top1")
    assert {point.step: point.value for point in history} == {number: values[0] for number, _, values, *_ in complete}
    assert len(history) == len(complete), "called again, no point is sent twice"
    pruned = [run for run in arms if run.info.status == "KILLED"]
    assert pruned and all("left by hyperband" in run.data.tags["basd.reason"] for run in pruned)


@pytest.mark.full
def test_killed_again_and_again_it_finds_the_same(
    swept: tuple[Path, str], store: Path, cache: Path, tmp_path: Path
) -> None:
    prepared(tmp_path, store)
    moments = random.Random(0)
    for _ in range(3):
        process = started(tmp_path, cache, "sweep", *SWEEP)
        limit = time.monotonic() + 60
        # at first progress, then some moments later
        while not list(tmp_path.glob("runs/*/*/journal.jsonl")) and time.monotonic() < limit:
            time.sleep(0.1)
        time.sleep(moments.uniform(0.5, 5.0))
        for child in psutil.Process(process.pid).children(recursive=True):
            child.send_signal(signal.SIGKILL)
        process.kill()
        process.communicate()
    status, output = basd(tmp_path, cache, "sweep", *SWEEP)
    assert status == 0, output
    assert trials_of(tmp_path) == trials_of(swept[0])


@pytest.mark.full
def test_hydras_sweeper_searches_by_hand(store: Path, cache: Path, tmp_path: Path) -> None:
    shutil.copy(store, tmp_path / "mlflow.db")
    command = ["train", "-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "+hydra.sweeper.sampler.seed=1", *TINY,
               "recipe.duration=6 steps", "weighting=uwso"]  # fmt: skip
    status, output = basd(tmp_path, cache, *command, "weighting.temperature=interval(0.5,4)")
    assert status == 0 and "Directions: ['maximize']" in output, output
    assert len(list(tmp_path.glob("runs/*/*/student.safetensors"))) == 3
    status, output = basd_here(*command, "weighting.temprature=interval(0.5,4)", cwd=tmp_path, cache=cache)
    assert status == 2 and "temperature" in output and "Traceback" not in output
    status, output = basd_here(*command, "weighting.temperature=interval(-1,4)", cwd=tmp_path, cache=cache)
    assert status == 2 and "at least" in output


MISTAKES = (
    (["sweep", "uws"], "did you mean uwso"),
    (["sweep", "losses"], "basd grid losses"),
    (["grid", "uwso"], "basd sweep uwso"),
    (["sweep", "trials=3"], "needs the name of a sweep"),
    (["sweep", "uwso", "metric=test/top1"], "the test set chooses nothing"),
    (["sweep", "uwso", "recipe.duration=1 epochs", *TINY[:14]], "has nothing to decide on"),
    (["audit", "uwso"], "run basd sweep uwso first"),
    (["sync", "uwso"], "run basd sweep uwso first"),
)


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    for words, said in MISTAKES:
        status, output = basd_here(*words, cwd=tmp_path, cache=tmp_path / "cache")
        assert status == 2 and said in output and "Traceback" not in output, (words, output)
    assert not list(tmp_path.glob("runs/*/*/journal.jsonl"))
