"""The `basd` command as a user meets it: a real ledger, a real MLflow database, and real worker processes."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
from command import basd_here
from project import SETTINGS, TABLE, Project
from tiny import TINY

from basd.cli import main


def basd(*arguments: str, cwd: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "basd", *arguments],
        cwd=cwd,
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=300,
    )


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "BASD_CACHE": str(cache), "COLUMNS": "160"}


@pytest.fixture(scope="module")
def cache(project: Project) -> Path:
    return project.cache


@pytest.fixture(scope="module")
def grid(project: Project, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A directory with a complete table, and what `basd grid` printed."""
    return project.copy(tmp_path_factory.mktemp("grid")), project.said


def table_of(output: str) -> list[str]:
    """The printed table, without what is said before and after it."""
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("leave_one_out") and "arms" not in line)
    end = next(i for i, line in enumerate(lines) if line.startswith("Runs:"))
    return lines[start:end]


def metrics_of(folder: Path) -> dict[str, tuple[str, dict[str, float]]]:
    """Final metrics of every arm of the table by key, from the journals."""
    found = {}
    for path in folder.glob("runs/*/*/journal.jsonl"):
        if "again" not in path.parent.name:
            found[path.parent.name] = final_of(path)
    return found


def assert_same_arms(folder: Path, project: Path) -> None:
    """The table's nine arms, as they were trained without trouble."""
    expected, found = metrics_of(project), metrics_of(folder)
    assert len(found) == 9 and found == {key: expected[key] for key in found}


def final_of(path: Path) -> tuple[str, dict[str, float]]:
    last = json.loads(path.read_text().splitlines()[-1])
    return last.get("end"), last["metrics"]


def test_grid_trains_everything_and_prints_the_table(grid) -> None:
    folder, said = grid
    assert "Traceback" not in said
    text = "\n".join(table_of(said))
    for label in ("BASD (complete)", "without attn", "cross-entropy only", "reference", "n too small", "Holm"):
        assert label in text
    assert "Trained 9 arms" in said
    assert "mlflow ui" in said
    written = sorted(path.name for path in folder.glob("reports/*/leave_one_out.*"))
    endings = ("csv", "forest.pdf", "forest.png", "html", "json", "md", "runs.csv", "tex")
    assert written == [f"leave_one_out.{ending}" for ending in endings]
    assert "\\toprule" in next(folder.glob("reports/*/leave_one_out.tex")).read_text()
    index = (folder / "reports" / "index.html").read_text()
    assert "/leave_one_out.html" in index and "verdicts: 2 n too small" in index


def test_mlflow_holds_parents_and_nested_arms_by_the_names_of_the_design(grid) -> None:
    folder, _ = grid
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name.startswith("digits-")]
    runs = client.search_runs([experiment.experiment_id])
    of_table = [run for run in runs if "basd.ablation.leave_one_out" in run.data.tags]
    arms = [run for run in of_table if "basd.arm_key" in run.data.tags]
    (table,) = [run for run in runs if run.data.tags.get("basd.table") == "leave_one_out"]
    parents = [run for run in of_table if run not in arms]
    assert (len(arms), len(parents)) == (9, 3)
    assert table.info.run_name == "table: leave_one_out" and "| BASD" in table.data.tags["mlflow.note.content"]
    files = {file.path for file in client.list_artifacts(table.info.run_id, "report")}
    assert {f"report/leave_one_out.{end}" for end in ("md", "tex", "csv", "html", "forest.png", "forest.pdf")} <= files
    assert all(len(run.inputs.dataset_inputs) == 3 for run in (*arms, *parents))
    assert {run.info.status for run in runs} == {"FINISHED"}
    by_id = {run.info.run_id: run for run in parents}
    for arm in arms:
        tags, metrics = arm.data.tags, arm.data.metrics
        parent = by_id[tags["mlflow.parentRunId"]]
        assert parent.data.tags["basd.configuration_key"] == tags["basd.configuration_key"]
        assert {"basd.seed", "basd.version", "basd.cohort"} <= tags.keys()
        assert {
            "train/loss",
            "train/ce",
            "val/top1",
            "test/top1",
            "test/top5",
            "test/nll",
            "test/ece",
        } <= metrics.keys()
        assert {"time/images_per_second", "time/data_wait_share"} <= metrics.keys()
        artifacts = {artifact.path for artifact in client.list_artifacts(arm.info.run_id)}
        assert {"config.yaml", "student.safetensors"} <= artifacts
        if tags["basd.ablation.leave_one_out"] == "basd":
            for name in ("rsd", "rel", "attn", "spectral"):
                assert {f"loss/{name}", f"weight/{name}", f"ramp/{name}"} <= metrics.keys()
            assert "selector/entropy" in metrics
            assert any(name.startswith("aligner/spatial_variance_share/") for name in metrics)
    for parent in parents:
        own = [
            arm.data.metrics["test/top1"] for arm in arms if arm.data.tags["mlflow.parentRunId"] == parent.info.run_id
        ]
        assert parent.data.metrics["test/top1"] == pytest.approx(sum(own) / 3)
        steps = [point.step for point in client.get_metric_history(parent.info.run_id, "test/top1")]
        assert sorted(steps) == [1, 2, 3]


def test_the_mirror_holds_every_point_of_the_journal_once(grid) -> None:
    folder, _ = grid
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name.startswith("digits-")]
    for run in client.search_runs([experiment.experiment_id]):
        key = run.data.tags.get("basd.arm_key")
        if key is None:
            continue
        (journal,) = folder.glob(f"runs/*/{key}/journal.jsonl")
        points = [(e["step"], e["metrics"]["train/loss"]) for e in map(json.loads, journal.read_text().splitlines())
                  if "train/loss" in e.get("metrics", {})]  # fmt: skip
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert sorted((point.step, point.value) for point in history) == sorted(points)


def test_a_second_call_trains_nothing_and_prints_the_same(grid, cache: Path) -> None:
    folder, first = grid
    before = {path: path.read_bytes() for path in folder.glob("reports/**/*") if path.is_file()}
    status, said = basd_here("grid", *TABLE, cwd=folder, cache=cache)
    assert status == 0
    assert "Nothing to train" in said
    assert table_of(said) == table_of(first)
    assert {path: path.read_bytes() for path in before} == before
    _, said = basd_here("report", "leave_one_out", "--figures", "table", cwd=folder, cache=cache)
    assert table_of(said) == table_of(first)
    assert {path: path.read_bytes() for path in folder.glob("reports/**/*") if path.is_file()} == before
    _, said = basd_here("status", cwd=folder, cache=cache)
    assert "9 of 9 arms done" in said
    _, said = basd_here("plan", *TABLE, cwd=folder, cache=cache)
    assert "9 arms, 9 done" in said


def test_report_all_lists_what_could_not_be_written(
    grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    folder, _ = grid
    shutil.copytree(folder / "reports", tmp_path / "reports")
    monkeypatch.chdir(tmp_path)
    (plan,) = folder.glob("runs/*/plans/leave_one_out-*.json")
    plans = tmp_path / "runs" / plan.parent.parent.name / "plans"
    plans.mkdir(parents=True)
    values = json.loads(plan.read_text())
    shutil.copy(plan, plans)
    (plans / "other-0123.json").write_text(json.dumps({**values, "name": "other"}))
    (plans / "torn-0123.json").write_text("{")
    # these runs are in no database here
    assert main(["report", "--all", "--quiet"]) == 1
    said = capsys.readouterr().err
    assert said.count("No runs of") == 2 and "is not a plan" in said and "Traceback" not in said
    index = (tmp_path / "reports" / "index.md").read_text()
    assert "files below are of an earlier report: No runs of 'leave\\_one\\_out'" in index
    assert "Could not be written: No runs of 'other'" in index and "### torn" in index
    there = f"tracking.uri=sqlite:///{folder}/mlflow.db"
    assert main(["report", "--all", "--figures", "table", "--quiet", there]) == 1
    index = (tmp_path / "reports" / "index.md").read_text()
    assert "of an earlier report" not in index and "No runs" not in index and "### torn" in index
    for path in (tmp_path / "reports").glob("*/leave_one_out.*"):
        assert path.read_bytes() == next(folder.glob(f"reports/*/{path.name}")).read_bytes()
    assert (tmp_path / "reports" / plans.parent.name / "other.html").exists()


@pytest.mark.full
def test_a_table_of_older_code_is_told_and_trained_again_on_demand(
    grid, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    folder, _ = grid
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "reports")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BASD_CACHE", str(cache))
    monkeypatch.setattr("basd.grid.plan.code_version", lambda: "newer")
    monkeypatch.setattr("basd.version.code_version", lambda: "newer")
    one = [*TABLE, "rows=[basd]", "seeds=[0]"]
    assert main(["grid", "--quiet", *one]) == 0
    said = capsys.readouterr().out
    assert "Nothing to train" in said and "--allow-mixed-code" in said
    assert "1 of 1 complete arms were trained by other code than the installed newer" in said
    assert "`basd grid leave_one_out --retrain-stale`" in said
    before = metrics_of(tmp_path)
    assert main(["grid", "--quiet", "--retrain-stale", *one]) == 0
    said = capsys.readouterr().out
    assert "Trained 1 arms" in said and "other code" not in said and "Code version: newer (1 arm)" in said
    after = metrics_of(tmp_path)
    # the same code under another name: the same bits
    assert {key: after[key] for key in before} == before and len(after) == len(before) + 1
    # two of the other seeds' arms are still of the older code
    assert main(["grid", "--quiet", *TABLE, "rows=[basd]"]) == 2
    said = capsys.readouterr()
    assert "2 of 3 complete arms" in said.out and "--retrain-stale" in said.err


def test_train_knows_an_arm_that_a_grid_has_finished(grid, cache: Path) -> None:
    folder, _ = grid
    status, said = basd_here("train", *SETTINGS, "method=ce", "seed=1", cwd=folder, cache=cache)
    assert status == 0
    assert "Finished before: val/top1" in said


FACTORIAL = """
question: Does attn do the same in company?
reference: losses+attn
seeds: [0, 1, 2]
factors:
  losses: {on: [method=basd], off: [method=ce]}
  attn: {on: [], off: [losses.attn.enabled=false]}
"""


@pytest.mark.full
def test_a_factorial_of_trained_arms_is_reported_by_its_factors(grid, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(grid[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "experiments" / "mine.yaml").write_text(FACTORIAL)
    command = ["grid", "mine", *SETTINGS, "--delta", "0.5"]
    status, said = basd_here(*command, cwd=tmp_path, cache=cache)
    assert status == 0 and "Nothing to train" in said, said
    assert "Effects of the factors on test top-1 (points)" in said and "Shapley value" in said
    (reports,) = (path for path in (tmp_path / "reports").iterdir() if path.is_dir())
    assert "seeds for Δ = 0.5" in (reports / "mine.md").read_text()
    effects = {(line["kind"], line["effect"]): line for line in csv.DictReader((reports / "mine.factorial.csv").open())}
    # attn changes nothing where there are no losses: there the row folds into cross-entropy
    assert effects["alone", "attn"]["delta"] == "0" and effects["alone", "attn"]["p_holm"] == "1"
    assert float(effects["shapley", "attn"]["delta"]) == pytest.approx(
        float(effects["leave_one_out", "attn"]["delta"]) / 2
    )
    # the table's formats, the factorial's, three figures
    assert len(list(reports.glob("mine.*"))) == 6 + 3 + 6


def test_a_wanted_difference_is_a_number_above_0(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("0", "-1", "much", "inf"):
        with pytest.raises(SystemExit):
            main(["report", "losses", f"--delta={wrong}"])
        assert f"{wrong} must be a number above 0, such as 0.5" in capsys.readouterr().err


@pytest.mark.full
def test_train_again_is_a_run_of_its_own_that_no_table_counts(grid, cache: Path) -> None:
    folder, first = grid
    again = ["train", "--again", *SETTINGS, "method=ce", "seed=1"]
    status, said = basd_here(*again, cwd=folder, cache=cache)
    assert status == 0, said
    (journal,) = folder.glob("runs/*/*-again-*/journal.jsonl")
    original = journal.parent.name.split("-")[0]
    assert final_of(journal) == metrics_of(folder)[original], "the same numbers, bit for bit"
    _, said = basd_here("report", "leave_one_out", cwd=folder, cache=cache)
    assert table_of(said) == table_of(first)


@pytest.mark.full
def test_multirun_trains_every_combination_and_repeats_none(store: Path, cache: Path, tmp_path: Path) -> None:
    shutil.copy(store, tmp_path / "mlflow.db")
    command = ["train", "-m", *TINY, "recipe.duration=6 steps", "method=ce", "seed=0,1"]
    first = basd(*command, cwd=tmp_path, cache=cache)
    assert first.returncode == 0, first.stdout + first.stderr
    assert len(metrics_of(tmp_path)) == 2
    again = basd(*command, cwd=tmp_path, cache=cache)
    assert again.stdout.count("Finished before") == 2
    status, said = basd_here("train", "-m", *TINY, "method=ce", "student.points=2,[0,9]", cwd=tmp_path, cache=cache)
    assert status == 2 and "student.points holds block 9" in said
    status, said = basd_here("train", "-m", "selctor=uniform,forward", cwd=tmp_path, cache=cache)
    assert status == 2 and "did you mean selector?" in said


@pytest.mark.full
def test_a_killed_grid_goes_on_and_ends_with_the_same_numbers(grid, cache: Path, tmp_path: Path) -> None:
    folder, _ = grid
    command = [sys.executable, "-m", "basd", "grid", *TABLE]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(cache), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    limit = time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None:
        if len(list(tmp_path.glob("runs/*/*/checkpoint.pt"))) >= 2:
            break
        time.sleep(0.05)
    for worker in workers_of(process.pid):
        os.kill(worker, signal.SIGKILL)
    process.kill()
    process.wait()
    done = basd("grid", *TABLE, cwd=tmp_path, cache=cache)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_arms(tmp_path, folder)


def workers_of(parent: int) -> list[int]:
    import psutil

    try:
        return [child.pid for child in psutil.Process(parent).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@pytest.mark.full
def test_two_grids_at_once_train_each_arm_once(grid, cache: Path, tmp_path: Path) -> None:
    folder, first = grid
    command = [sys.executable, "-m", "basd", "grid", *TABLE]
    both = [
        subprocess.Popen(
            command, cwd=tmp_path, env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert_same_arms(tmp_path, folder)
    assert [table_of(output)[:8] for output in outputs] == [table_of(first)[:8]] * 2
    logs = "".join(path.read_text() for path in tmp_path.glob("runs/*/logs/*.log"))
    assert logs.count(" complete") == 9, logs
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name.startswith("digits-")]
    # 9 arms, 3 configurations and the table, each once
    assert len(client.search_runs([experiment.experiment_id])) == 13


MISTAKES = (
    (["grid", "leave_one_ot"], "did you mean leave_one_out?"),
    (["grid", "leave_one_out", "rows=[basd,nothing]"], "nothing is not a row of leave_one_out"),
    (["grid", "leave_one_out", "seeds=[]"], "at least one"),
    (["train", "selctor=uniform"], "did you mean selector?"),
    (["train", "student.points=[0,9]"], "student.points holds block 9"),
    (["train", *(f"losses.{name}.enabled=false" for name in ("rsd", "rel", "attn", "spectral"))], "every loss off"),
    (["train", "teacher=timm", "teacher.model=resnet18"], "VisionTransformer family"),
    (["train", "teacher=timm", "teacher.model=vit_nothing"], "is not a model of timm"),
    (["train", "teacher=timm", "teacher.weights=weights.bin"], ".safetensors"),
    (["report", "leave_one_out"], "nothing was planned here"),
    (["report"], "name one table"),
    (["status", "leave_one_ot"], "did you mean leave_one_out?"),
)


def test_bad_input_is_one_sentence_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BASD_CACHE", str(tmp_path / "cache"))
    for arguments, sentence in MISTAKES:
        assert main(arguments) == 2, arguments
        said = capsys.readouterr()
        assert said.err.startswith("basd: ") and sentence in said.err, arguments
        assert "Traceback" not in said.out + said.err, arguments
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "ledger.db").exists()


UNUSABLE = (
    ("tracking.uri=http://127.0.0.1:9", "127.0.0.1:9"),
    ("tracking.uri=sqlite:////proc/nowhere/mlflow.db", "/proc/nowhere"),
    ("ledger.url=sqlite:////proc/nowhere/ledger.db", "/proc/nowhere"),
    ("ledger.url=nonsense", "ledger.url=nonsense"),
    ("runtime.directory=/proc/nowhere", "/proc/nowhere"),
    ("runtime.device=cuda:9", "cuda"),
)


def test_an_unusable_resource_stops_before_training_and_loses_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BASD_CACHE", str(cache))
    for override, sentence in UNUSABLE:
        assert main(["grid", "--quiet", *TABLE, "rows=[basd]", override]) == 2, override
        said = capsys.readouterr()
        assert sentence in said.out + said.err and "Traceback" not in said.out + said.err, override
    assert not list(tmp_path.glob("runs/*/*/journal.jsonl"))


def test_doctor_and_teacher(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BASD_CACHE", str(cache))
    assert main(["doctor", *TINY]) == 0
    said = capsys.readouterr().out
    for what in ("code", "packages", "device", "data", "teacher", "working directory", "ledger", "tracking"):
        assert f"ok    {what}:" in said
    assert main(["doctor", *TINY, "tracking.uri=http://127.0.0.1:9"]) == 1
    assert "FAIL  tracking" in capsys.readouterr().out
    assert main(["teacher", *TINY]) == 0
    assert "test top-1" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    for command in ("train", "plan", "grid", "worker", "status", "audit", "sync", "report", "teacher", "doctor"):
        assert command in said
