"""The mirror: MLflow ends up with what the journals say, once, whatever happened on the way."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from basd.errors import UserError
from basd.tracking.files import write_json
from basd.tracking.journal import Journal
from basd.tracking.mirror import Mirror, check_tracking, is_mirrored
from basd.tracking.mlflow_store import open_client


@pytest.fixture(scope="module")
def uri(store: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A real SQLite store for all tests of this file; every test has an experiment of its own."""
    return f"sqlite:///{shutil.copy(store, tmp_path_factory.mktemp('mirrored') / 'mlflow.db')}"


class Arms:
    """Arm directories of one experiment."""

    def __init__(self, root: Path, setting: str) -> None:
        self.root, self.setting = root / setting, setting

    def directory(self, seed: int, version: str = "v1") -> Path:
        directory = self.root / f"{seed:016x}"
        spec = {
            "arm_key": directory.name,
            "configuration_key": "c" * 16,
            "cohort_key": "s",
            "seed": seed,
            "setting": self.setting,
            "name": "basd",
            "params": {"selector": "uniform", "seed": str(seed)},
            "version": version,
        }
        write_json(directory / "arm.json", spec)
        (directory / "config.yaml").write_text("seed: 1\n")
        return directory

    def complete(self, seed: int, top1: float) -> Path:
        directory = self.directory(seed)
        journal = Journal(directory)
        for step in (1, 2, 3):
            journal.metrics(step, {"train/loss": 1.0 / step})
        journal.metrics(3, {"test/top1": top1})
        (directory / "student.safetensors").write_bytes(b"weights")
        (directory / "artifacts" / "figures").mkdir(parents=True)
        (directory / "artifacts" / "figures" / "history.txt").write_text("x")
        journal.end("complete", "", {"test/top1": top1, "val/top1": top1 + 0.1})
        journal.close()
        return directory


@pytest.fixture
def arms(tmp_path: Path, request: pytest.FixtureRequest) -> Arms:
    return Arms(tmp_path / "runs", request.node.name.replace("[", "-").replace("]", ""))


def mirror_once(uri: str, *directories: Path, expected: int = 1, **options: Any) -> Mirror:
    mirror = Mirror(uri, interval=0.05)
    for directory in directories:
        mirror.add(directory, expected=expected, **options)
    assert mirror.drain(30.0), mirror.problem
    return mirror


def runs_of(uri: str, setting: str) -> tuple[list[Any], list[Any]]:
    """Parent runs and nested runs."""
    client = open_client(uri)
    experiment = client.get_experiment_by_name(setting)
    runs = list(client.search_runs([experiment.experiment_id])) if experiment else []
    runs.sort(key=lambda run: run.data.tags.get("basd.seed", ""))
    nested = [run for run in runs if "basd.arm_key" in run.data.tags]
    return [run for run in runs if run not in nested], nested


def history(uri: str, run: Any, key: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in open_client(uri).get_metric_history(run.info.run_id, key))


def test_names_are_those_of_the_design(uri: str, arms: Arms) -> None:
    first = arms.complete(0, 0.5)
    mirror_once(uri, first, expected=2, labels={"table": "basd"})
    (parent,), (run,) = runs_of(uri, arms.setting)
    assert parent.info.run_name == "basd" and parent.info.status == "KILLED"  # one of two seeds is missing
    assert parent.data.params == {"selector": "uniform"}
    assert {k: v for k, v in run.data.tags.items() if k.startswith("basd.")} == {
        "basd.arm_key": first.name,
        "basd.configuration_key": "c" * 16,
        "basd.seed": "0",
        "basd.version": "v1",
        "basd.cohort": "s",
        "basd.ablation.table": "basd",
    }
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert run.info.status == "FINISHED" and run.data.params == {"selector": "uniform", "seed": "0"}
    assert history(uri, run, "train/loss") == [(1, 1.0), (2, 0.5), (3, 1.0 / 3)]
    assert history(uri, run, "test/top1") == [(3, 0.5)]
    assert history(uri, run, "val/top1") == [(3, 0.6)]
    client = open_client(uri)
    names = [a.path for a in client.list_artifacts(run.info.run_id)] + [
        a.path for a in client.list_artifacts(run.info.run_id, "figures")
    ]
    assert sorted(names) == ["config.yaml", "figures", "figures/history.txt", "student.safetensors"]

    mirror_once(uri, arms.complete(1, 0.7), expected=2)
    (parent,), nested = runs_of(uri, arms.setting)
    assert len(nested) == 2 and parent.info.status == "FINISHED"
    assert [step for step, _ in history(uri, parent, "test/top1")] == [1, 2]
    assert parent.data.metrics["test/top1"] == pytest.approx(0.6)
    assert parent.data.metrics["test/top1_std"] == pytest.approx(0.02**0.5)
    assert "train/loss" not in parent.data.metrics


def test_a_long_name_fits_the_column_of_every_backend_and_keeps_its_seed(uri: str, arms: Arms) -> None:
    """SQLite takes any length; PostgreSQL refused the run, and nothing of the arm reached MLflow."""
    from mlflow.store.tracking.dbmodels.models import SqlRun

    directory = arms.complete(0, 0.5)
    values = json.loads((directory / "arm.json").read_text())
    write_json(directory / "arm.json", {**values, "name": "basd " + "recipe.lr=1 " * 60})
    mirror_once(uri, directory)
    column = SqlRun.__table__.c["name"].type.length
    for run in [run for runs in runs_of(uri, arms.setting) for run in runs]:
        assert len(run.info.run_name) <= column
    (nested,) = runs_of(uri, arms.setting)[1]
    assert nested.info.run_name.startswith("basd recipe.lr=1") and nested.info.run_name.endswith("seed=0")


def test_a_second_table_tags_a_finished_run(uri: str, arms: Arms) -> None:
    directory = arms.complete(0, 0.5)
    mirror_once(uri, directory, labels={"first": "basd"})
    assert is_mirrored(directory, uri, {"first": "basd"})
    assert not is_mirrored(directory, uri, {"second": "complete"})
    mirror = Mirror(uri, interval=0.05)
    mirror.tag_ablation("second", {directory: "complete"})
    assert mirror.drain(30.0)
    (parent,), (run,) = runs_of(uri, arms.setting)
    for found in (parent, run):
        assert found.data.tags["basd.ablation.first"] == "basd"
        assert found.data.tags["basd.ablation.second"] == "complete"
        assert found.info.status == "FINISHED"


def test_killed_arm_goes_on_in_the_same_run_without_double_points(uri: str, arms: Arms) -> None:
    directory = arms.directory(0)
    journal = Journal(directory)
    journal.metrics(1, {"train/loss": 1.0})
    position = journal.flush()
    for step in (2, 3):
        journal.metrics(step, {"train/loss": 1.0 / step})
    journal.flush()
    mirror = Mirror(uri, interval=0.05)
    mirror.add(directory)
    mirror.conclude(directory, "KILLED")
    assert mirror.drain(30.0)
    (parent,), (run,) = runs_of(uri, arms.setting)
    assert run.info.status == parent.info.status == "KILLED"
    time.sleep(0.01)
    journal = Journal(directory)
    journal.rewind(position)  # back to the checkpoint: steps 2 and 3 come again, with other times
    (directory / "mirror.json").unlink()  # and the mirror lost its memory as well
    for step in (2, 3, 4):
        journal.metrics(step, {"train/loss": 1.0 / step})
    journal.end("complete", "", {"test/top1": 0.5})
    mirror_once(uri, directory)
    (_,), (again,) = runs_of(uri, arms.setting)
    assert again.info.run_id == run.info.run_id and again.info.status == "FINISHED"
    assert history(uri, again, "train/loss") == [(s, 1.0 / s) for s in (1, 2, 3, 4)]


def test_failed_arm_is_marked_and_retried_in_the_same_run(uri: str, arms: Arms) -> None:
    directory = arms.directory(0)
    journal = Journal(directory)
    journal.metrics(1, {"train/loss": float("nan"), "train/ce": float("inf"), "loss/rsd": 1.0})
    journal.end("failed", "loss is not finite at step 1")
    mirror = Mirror(uri, interval=0.05).start()
    mirror.add(directory)
    wait_for(lambda: not mirror.pending())
    _, (run,) = runs_of(uri, arms.setting)
    assert run.info.status == "FAILED" and run.data.tags["basd.reason"] == "loss is not finite at step 1"
    assert set(run.data.metrics) == {"loss/rsd"}
    assert run.data.tags["basd.nonfinite.train/ce"] == "inf at step 1"
    journal.rewind(0)
    journal.metrics(1, {"loss/rsd": 1.0})
    journal.metrics(2, {"loss/rsd": 0.5})
    journal.flush()
    wait_for(lambda: runs_of(uri, arms.setting)[1][0].info.status == "RUNNING")
    journal.end("complete", "", {"test/top1": 0.5})
    assert mirror.drain(30.0)
    (parent,), (again,) = runs_of(uri, arms.setting)
    assert again.info.run_id == run.info.run_id
    assert again.info.status == parent.info.status == "FINISHED"
    assert history(uri, again, "loss/rsd") == [(1, 1.0), (2, 0.5)]


def wait_for(condition: Any, seconds: float = 20.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.05)


def test_a_repetition_beside_the_ledger_is_a_run_of_its_own(uri: str, arms: Arms) -> None:
    mirror_once(uri, arms.complete(0, 0.5))
    spec = json.loads((arms.root / f"{0:016x}" / "arm.json").read_text())
    again = arms.root / f"{0:016x}-again-1"
    write_json(again / "arm.json", spec)
    journal = Journal(again)
    journal.end("complete", "", {"test/top1": 0.9})
    mirror_once(uri, again, run_tag="again-1")
    (parent,), nested = runs_of(uri, arms.setting)
    assert {run.data.tags.get("basd.run") for run in nested} == {None, "again-1"}
    assert parent.data.metrics["test/top1"] == 0.5  # it counts in no mean


def test_arm_begun_anew_by_other_code_has_a_run_of_its_own(uri: str, arms: Arms) -> None:
    directory = arms.directory(0)
    journal = Journal(directory)
    journal.metrics(1, {"train/loss": 1.0})
    journal.end("stopped")
    mirror_once(uri, directory)
    arms.directory(0, version="v2")
    journal.rewind(0)
    journal.metrics(1, {"train/loss": 9.0})
    journal.end("complete", "", {"test/top1": 0.5})
    mirror_once(uri, directory)
    _, nested = runs_of(uri, arms.setting)
    by_version = {run.data.tags["basd.version"]: run for run in nested}
    assert by_version["v1"].data.tags["basd.superseded"] == "true" and by_version["v1"].info.status == "KILLED"
    assert history(uri, by_version["v2"], "train/loss") == [(1, 9.0)]


def test_code_that_changes_under_a_mirror_gets_a_run_of_its_own(uri: str, arms: Arms) -> None:
    """One mirror took the directory before a worker began the arm anew with other code."""
    directory = arms.directory(0)
    journal = Journal(directory)
    journal.metrics(1, {"train/loss": 1.0})
    journal.metrics(2, {"train/loss": 0.9})
    journal.end("stopped")
    mirror = Mirror(uri, interval=0.05)
    mirror.add(directory)
    mirror.start()
    wait_for(lambda: any(run.info.status == "KILLED" for run in runs_of(uri, arms.setting)[1]))
    journal.close()
    (directory / "journal.jsonl").unlink()
    arms.directory(0, version="v2")
    journal = Journal(directory)
    for step in range(1, 4):
        journal.metrics(step, {"train/loss": 9.0 - step})
    journal.end("complete", "", {"test/top1": 0.5})
    assert mirror.drain(30.0)
    by_version = {run.data.tags["basd.version"]: run for run in runs_of(uri, arms.setting)[1]}
    assert history(uri, by_version["v1"], "train/loss") == [(1, 1.0), (2, 0.9)]
    assert "test/top1" not in by_version["v1"].data.metrics
    assert history(uri, by_version["v2"], "train/loss") == [(1, 8.0), (2, 7.0), (3, 6.0)]
    assert by_version["v2"].info.status == "FINISHED"


def test_many_points_are_sent_in_batches(uri: str, arms: Arms) -> None:
    directory = arms.directory(0)
    journal = Journal(directory)
    for step in range(150):
        journal.metrics(step, {f"loss/{i}": float(step) for i in range(7)})
    journal.end("complete")
    mirror_once(uri, directory)
    _, (run,) = runs_of(uri, arms.setting)
    assert [step for step, _ in history(uri, run, "loss/6")] == list(range(150))


def test_two_mirrors_send_a_journal_once(uri: str, arms: Arms) -> None:
    directories = [arms.complete(seed, 0.5) for seed in range(3)]
    mirrors = [Mirror(uri, interval=0.05) for _ in range(2)]
    for mirror in mirrors:
        for directory in directories:
            mirror.add(directory, expected=3)
        mirror.start()
    assert all(mirror.drain(30.0) for mirror in mirrors)
    (parent,), nested = runs_of(uri, arms.setting)
    assert parent.info.status == "FINISHED" and len(nested) == 3
    for run in nested:
        assert len(history(uri, run, "train/loss")) == 3


def test_outage_is_survived(uri: str, arms: Arms, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = arms.complete(0, 0.5)
    down = threading.Event()
    down.set()
    log = MlflowClient.log_batch
    calls = []

    def flaky(self: MlflowClient, run_id: str, metrics: Any = (), **rest: Any) -> None:
        if metrics:
            calls.append(len(metrics))
        if metrics and down.is_set():
            log(self, run_id, metrics=metrics[:1])  # part of a batch arrives, then the line is cut
            raise ConnectionError("connection reset by peer\nmore")
        log(self, run_id, metrics=metrics, **rest)

    monkeypatch.setattr(MlflowClient, "log_batch", flaky)
    mirror = Mirror(uri, interval=0.05, longest_pause=0.1)
    mirror.add(directory)
    mirror.start()
    wait_for(lambda: len(calls) > 2)
    assert "connection reset by peer" in mirror.problem and "\n" not in mirror.problem
    down.clear()
    assert mirror.drain(30.0) and mirror.problem == ""
    _, (run,) = runs_of(uri, arms.setting)
    assert history(uri, run, "train/loss") == [(1, 1.0), (2, 0.5), (3, 1.0 / 3)]


def test_drain_gives_up_in_time_and_the_next_mirror_sends_the_rest(uri: str, arms: Arms) -> None:
    directory = arms.complete(0, 0.5)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    others = set(threading.enumerate())
    mirror = Mirror(f"http://127.0.0.1:{port}", interval=0.05)
    mirror.add(directory)
    began = time.monotonic()
    assert not mirror.drain(0.5)
    assert time.monotonic() - began < 10.0
    # a request that hangs still holds the arm's lock
    wait_for(lambda: not set(threading.enumerate()) - others, 30.0)
    mirror.close()
    mirror_once(uri, directory)
    _, (run,) = runs_of(uri, arms.setting)
    assert run.info.status == "FINISHED"


def test_a_deleted_store_is_filled_again(uri: str, tmp_path: Path, arms: Arms) -> None:
    shutil.copy(uri.removeprefix("sqlite:///"), tmp_path / "other.db")  # quicker than a new one
    uri = f"sqlite:///{tmp_path}/other.db"
    directory = arms.complete(0, 0.5)
    (directory / "mirror.json").write_text('{"store": "", "half a line')
    assert not is_mirrored(directory, uri)
    mirror_once(uri, directory)
    assert is_mirrored(directory, uri)
    (tmp_path / "other.db").unlink()
    assert not is_mirrored(directory, uri)


@pytest.mark.full
def test_processes_create_one_store_together(tmp_path: Path) -> None:
    program = "import sys; from basd.tracking.mlflow_store import Store; Store(sys.argv[1], 'setting')"
    command = [sys.executable, "-c", program, f"sqlite:///{tmp_path}/mlflow.db"]
    creators = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    chatter = [creator.communicate()[1] for creator in creators]
    assert [creator.returncode for creator in creators] == [0, 0, 0], chatter
    assert not any("INFO" in text for text in chatter), chatter


class _Answers(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        pass


def test_check_tracking_answers_quickly(tmp_path: Path) -> None:
    check_tracking(f"sqlite:///{tmp_path}/new.db")
    assert not (tmp_path / "new.db").exists()
    (tmp_path / "text.db").write_text("no database, but long enough to be read")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    silent = socket.socket()  # takes connections and says nothing
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    for address, words in [
        (f"sqlite:///{tmp_path}/missing/new.db", "cannot be written"),
        (f"sqlite:///{tmp_path}/text.db", "not an SQLite database"),
        (f"http://127.0.0.1:{port}", "does not answer"),
        (f"http://127.0.0.1:{silent.getsockname()[1]}", "does not answer"),
        ("http://no-such-host.invalid", "does not answer"),
        ("ftp://somewhere", "no MLflow address"),
    ]:
        began = time.monotonic()
        with pytest.raises(UserError, match=words):
            check_tracking(address, timeout=0.2)
        assert time.monotonic() - began < 8.0
    silent.close()
    server = HTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    check_tracking(f"http://127.0.0.1:{server.server_port}")
    _Answers.status = 503
    with pytest.raises(UserError, match="it answered 503"):
        check_tracking(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
