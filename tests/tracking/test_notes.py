"""What MLflow shows beside the numbers: descriptions, datasets, and the report of a table as a run of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient

import analysis
from basd.commands.published import publish_table_run
from basd.config import FrozenArm
from basd.grid.audit_records import Tracked
from basd.grid.finished import find_finished
from basd.tracking import runs as readers
from basd.tracking.datasets import datasets_of
from basd.tracking.files import write_json
from basd.tracking.journal import Journal
from basd.tracking.mirror import Mirror
from basd.tracking.mlflow_store import Store, http_problem
from basd.tracking.notes import LONGEST, NOTE, configuration_note, experiment_note, noted
from basd.tracking.published import FILES, TABLE, publish_table

SETTING = "digits-digits_vit-digits_tiny-digits-abc123"
SIZES = {"train": 1197, "validation": 150, "test": 450, "classes": 10}


@pytest.fixture
def uri(store: Path, tmp_path: Path) -> str:
    return f"sqlite:///{shutil.copy(store, tmp_path / 'mlflow.db')}"


@pytest.fixture
def server(store: Path, tmp_path: Path) -> Iterator[str]:
    """An MLflow server on an empty store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    database = f"sqlite:///{shutil.copy(store, tmp_path / 'server.db')}"
    options = ["--artifacts-destination", str(tmp_path / "artifacts"), "--workers", "1"]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database, "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    address, limit = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while http_problem(address) and time.monotonic() < limit:
        time.sleep(0.2)
    yield address
    os.killpg(process.pid, signal.SIGKILL)  # its workers too
    process.wait(30)


def arm(root: Path, seed: int = 0, **changed: Any) -> Path:
    """The directory of an arm that has ended."""
    directory = root / "runs" / SETTING / f"{seed:016x}"
    spec = {
        "arm_key": directory.name, "configuration_key": "c" * 16, "cohort_key": "s", "seed": seed, "setting": SETTING,
        "name": "basd without rel", "params": {"selector": "uniform", "seed": str(seed)}, "version": "v1",
        "config": {"data": {"name": "digits", "image_size": 40}, "student": {"width": 48, "depth": 4}, "recipe": {}},
        "teacher_fingerprint": "t" * 16, "data_fingerprint": "d" * 16, "total_steps": 3,
        "data_sizes": SIZES, "setting_words": ["recipe.duration=40 steps"],
    }  # fmt: skip
    write_json(directory / "arm.json", {**spec, **changed})
    journal = Journal(directory)
    journal.end("complete", "", {"test/top1": 0.5 + seed / 10})
    journal.close()
    return directory


def mirrored(uri: str, *directories: Path, expected: int = 2, table: str = "losses") -> None:
    mirror = Mirror(uri, interval=0.05)
    for directory in directories:
        mirror.add(directory, expected=expected, labels={table: "without_rel"})
    assert mirror.drain(60.0), mirror.problem


def found(uri: str) -> tuple[MlflowClient, Any, Any, list[Any]]:
    """An independent client, the experiment, the configuration's run and those of its arms."""
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(SETTING)
    runs = client.search_runs([experiment.experiment_id])
    arms = sorted((r for r in runs if "basd.arm_key" in r.data.tags), key=lambda run: run.data.tags["basd.seed"])
    (parent,) = [r for r in runs if "basd.configuration_key" in r.data.tags and r not in arms]
    return client, experiment, parent, arms


def inputs(run: Any) -> list[tuple[str, str, str, dict[str, Any] | None]]:
    return sorted(
        (
            one.tags[0].value,
            one.dataset.name,
            one.dataset.digest,
            json.loads(one.dataset.profile) if one.dataset.profile else None,
        )
        for one in run.inputs.dataset_inputs
    )


def test_experiment_configuration_and_arm_say_what_they_are(uri: str, tmp_path: Path) -> None:
    mirrored(uri, arm(tmp_path), arm(tmp_path, seed=1))
    _, experiment, parent, (run, _) = found(uri)
    told = experiment.tags[NOTE]
    assert "1,197 training images" in told and "10 classes" in told and "48 wide, 4 blocks" in told
    assert "`basd grid NAME 'recipe.duration=40 steps'`" in told
    told = parent.data.tags[NOTE]
    assert "preset `basd`, changed: `without rel`" in told and "Seeds finished: 0, 1" in told
    assert "Table `losses`: row without_rel" in told
    assert f"`basd export {0:016x}`" in run.data.tags[NOTE] and "seed 0" in run.data.tags[NOTE]
    # where the same call looks the arm up
    weights = tmp_path / "runs" / SETTING / f"{0:016x}" / "student.safetensors"
    weights.write_bytes(b"weights")
    exported = find_finished(f"{0:016x}", tmp_path / "runs", uri, None, tmp_path)
    assert exported.weights == weights


def test_what_a_person_wrote_stays(uri: str, tmp_path: Path) -> None:
    first = arm(tmp_path)
    mirrored(uri, first)
    client, experiment, parent, (run,) = found(uri)
    client.set_experiment_tag(experiment.experiment_id, NOTE, "Ours.")
    client.set_tag(parent.info.run_id, NOTE, "Look here.")
    client.set_tag(run.info.run_id, NOTE, "")
    (first / "mirror.json").unlink()  # everything is asked for and said again
    mirrored(uri, first, arm(tmp_path, seed=1))
    _, experiment, parent, (run, other) = found(uri)
    assert experiment.tags[NOTE] == "Ours." and parent.data.tags[NOTE] == "Look here." and run.data.tags[NOTE] == ""
    assert "seed 1" in other.data.tags[NOTE]


def test_a_description_follows_a_second_table(uri: str, tmp_path: Path) -> None:
    directory = arm(tmp_path)
    mirrored(uri, directory, expected=1)
    mirrored(uri, directory, expected=1, table="main")
    _, _, parent, _ = found(uri)
    assert "Table `losses`" in parent.data.tags[NOTE] and "Table `main`" in parent.data.tags[NOTE]


def test_texts_are_cut_between_lines_and_show_no_password() -> None:
    text = noted({}, "line of words\n" * 1000)[NOTE]
    assert len(text) <= LONGEST and text.endswith("words\n…")
    spec = {"setting": SETTING, "setting_words": ["teacher.weights=http://me:secret@host/w"]}
    text = noted({}, experiment_note(spec))[NOTE]
    assert "secret" not in text and "***" in text
    assert "No seed" in configuration_note("ce", {}) and "as it is" in configuration_note("ce", {})


def test_arms_and_configurations_name_their_data_once(uri: str, tmp_path: Path) -> None:
    first = arm(tmp_path)
    mirrored(uri, first, arm(tmp_path, seed=1))
    (first / "mirror.json").unlink()
    mirrored(uri, first)
    _, _, parent, arms = found(uri)
    splits = [("test", 450), ("train", 1197), ("validation", 150)]
    wanted = [(s, "digits", f"{'d' * 16}-{s}", {"num_rows": n, "classes": 10}) for s, n in splits]
    for run in (parent, *arms):
        assert inputs(run) == wanted
        assert {one.dataset.source_type for one in run.inputs.dataset_inputs} == {"external"}
    features = json.loads(json.loads(parent.inputs.dataset_inputs[0].dataset.schema)["mlflow_tensorspec"]["features"])
    assert features[0]["tensor-spec"]["shape"] == [-1, 3, 40, 40]


def test_arms_frozen_before_sizes_were_kept_are_mirrored(uri: str, tmp_path: Path) -> None:
    directory = arm(tmp_path, data_sizes={}, setting_words=[])
    values = json.loads((directory / "arm.json").read_text())
    del values["data_sizes"], values["setting_words"]
    write_json(directory / "arm.json", values)
    assert FrozenArm.from_dict(values).data_sizes == {}
    mirrored(uri, directory, expected=1)
    _, experiment, _, (run,) = found(uri)
    assert [(split, profile) for split, _, _, profile in inputs(run)] == [
        ("test", None),
        ("train", None),
        ("validation", None),
    ]
    assert f"setting={SETTING}" in experiment.tags[NOTE]


def test_sources_of_data() -> None:
    for data, name, kind, source in (
        ({"name": "folder", "root": "/data/my birds"}, "my birds", "local", {"uri": "/data/my%20birds"}),
        ({"name": "cifar100", "root": "/data"}, "cifar100", "local", {"uri": "/data"}),
        ({"name": "timm", "dataset": "hfds/org/set"}, "hfds/org/set", "hugging_face", {"path": "org/set"}),
    ):
        found = datasets_of({"config": {"data": data}, "data_fingerprint": "d" * 16, "data_sizes": SIZES})
        assert found
        for one in found:
            said = (one.dataset.name, one.dataset.source_type, json.loads(one.dataset.source))
            assert said == (name, kind, source)


# -- tables ------------------------------------------------------------------------------------------------------------


def table(uri: str, lock: Path, text: str = "| row |", **files: bytes) -> bool:
    every = {"report/losses.md": text.encode(), **{f"report/losses.{end}": content for end, content in files.items()}}
    tags = {"basd.plan": "p" * 12, "basd.seeds": "0, 1"}
    return publish_table(uri, SETTING, lock, name="losses", description=text, tags=tags, files=every)


def table_runs(uri: str) -> list[Any]:
    client = MlflowClient(uri)
    return list(
        client.search_runs([client.get_experiment_by_name(SETTING).experiment_id], f"tags.`{TABLE}` = 'losses'")
    )


def test_a_report_is_one_run_and_sent_again_only_when_it_changed(uri: str, tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    assert table(uri, lock, png=b"a picture")
    (before,) = table_runs(uri)
    assert before.info.run_name == "table: losses" and before.info.status == "FINISHED"
    assert before.data.tags[NOTE] == "| row |" and before.data.tags["basd.plan"] == "p" * 12
    files = Path(before.info.artifact_uri.removeprefix("file://")) / "report"
    assert {path.name: path.read_bytes() for path in files.iterdir()} == {
        "losses.md": b"| row |",
        "losses.png": b"a picture",
    }
    (files / "losses.png").unlink()  # would come back if it were sent again
    assert not table(uri, lock, png=b"a picture")
    assert not (files / "losses.png").exists()
    assert table(uri, lock, "| other |", png=b"another")
    (after,) = table_runs(uri)
    assert after.info.run_id == before.info.run_id and after.data.tags[NOTE] == "| other |"
    assert (files / "losses.png").read_bytes() == b"another" and (files / "losses.md").read_bytes() == b"| other |"
    MlflowClient(uri).set_tag(after.info.run_id, NOTE, "Mine.")
    assert table(uri, lock, "| third |")
    assert table_runs(uri)[0].data.tags[NOTE] == "Mine."


def test_cut_off_between_files_and_end_it_is_sent_again(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifacts", fail)
        with pytest.raises(OSError, match="gone"):
            table(uri, tmp_path / "lock")
    (run,) = table_runs(uri)
    assert run.info.status == "RUNNING" and FILES not in run.data.tags
    assert table(uri, tmp_path / "lock")
    (run,) = table_runs(uri)
    assert run.info.status == "FINISHED" and FILES in run.data.tags


def test_readers_of_arms_pass_over_it(uri: str, tmp_path: Path) -> None:
    mirrored(uri, arm(tmp_path), arm(tmp_path, seed=1))
    alone = analysis.load("losses", tracking_uri=uri)
    table(uri, tmp_path / "lock")
    with closing(readers.open_runs(uri)) as sql:
        assert type(sql).__name__ == "SqlRuns"
        assert alone.equals(analysis.load("losses", tracking_uri=uri))
    # through the API, a run a page
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("basd.tracking.sql_runs.KNOWN_SCHEMAS", set())
        assert alone.equals(analysis.load("losses", tracking_uri=uri, page_size=1))
    (run,) = table_runs(uri)
    with closing(Tracked(uri, SETTING)) as tracked:
        (read,) = [one for one in tracked.runs if one.run_id == run.info.run_id]
    assert not {"basd.arm_key", "basd.configuration_key", "basd.seed", "basd.ablation.losses"} & set(read.tags)
    # a later arm finds its configuration's run, not this one
    assert Store(uri, SETTING).parent("c" * 16, "basd", {}, {}, 0) == found(uri)[2].info.run_id


@pytest.mark.full
def test_a_server_takes_all_of_it(server: str, tmp_path: Path) -> None:
    mirrored(server, arm(tmp_path), expected=1)
    _, experiment, parent, (run,) = found(server)
    assert NOTE in experiment.tags and "Seeds finished: 0" in parent.data.tags[NOTE] and len(inputs(run)) == 3
    assert table(server, tmp_path / "lock", png=b"a picture")
    assert not table(server, tmp_path / "lock", png=b"a picture")
    (published,) = table_runs(server)
    names = {file.path for file in MlflowClient(server).list_artifacts(published.info.run_id, "report")}
    assert names == {"report/losses.md", "report/losses.png"}


class Screen:
    def __init__(self) -> None:
        self.said: list[str] = []

    def print(self, text: str, **_: Any) -> None:
        self.said.append(text)


def test_the_command_publishes_what_lies_there_and_fails_softly(uri: str, tmp_path: Path) -> None:
    folder, screen = tmp_path / "reports", Screen()
    folder.mkdir()
    made: Any = SimpleNamespace(
        name="losses", setting=SETTING, hash="p" * 12, reference="basd", seeds=(0, 1), metrics=("test/top1",)
    )
    options: Any = SimpleNamespace(tracking_uri=uri, setting_directory=lambda setting: tmp_path / "runs" / setting)
    publish_table_run(made, options, screen, folder)  # no report, nothing to do
    entry = {
        "kind": "table",
        "name": "losses",
        "setting": SETTING,
        "files": [],
        "figures": [],
        "facts": {"plan": "p" * 12},
    }
    (folder / "losses.json").write_text(json.dumps(entry))
    (folder / "losses.md").write_text("# losses\n\n| row |\n\n![losses.forest.png](losses.forest.png)\n")
    (folder / "losses.forest.png").write_bytes(b"\x89PNG")
    (folder / "losses.html").write_text('<a href="losses.forest.pdf"><img src="losses.forest.png" alt="f"></a>')
    (folder / "losses2.md").write_text("another table's")
    Store(uri, SETTING)
    publish_table_run(made, options, screen, folder)
    (run,) = table_runs(uri)
    assert run.data.tags[NOTE] == "| row |" and run.data.tags["basd.reference"] == "basd" and not screen.said
    files = Path(run.info.artifact_uri.removeprefix("file://")) / "report"
    assert {path.name for path in files.iterdir()} == {"losses.md", "losses.forest.png", "losses.html"}
    assert (files / "losses.html").read_text() == '<img src="data:image/png;base64,iVBORw==" alt="f">'
    options.tracking_uri = "http://me:secret@127.0.0.1:1"
    publish_table_run(made, options, screen, folder)
    (said,) = screen.said
    assert "basd sync losses" in said and "secret" not in said and "\n" not in said
    options.tracking_uri, made.hash = uri, "q" * 12  # of another plan: its tags would not be true
    (folder / "losses.md").write_text("changed")
    publish_table_run(made, options, screen, folder)
    assert table_runs(uri)[0].data.tags["basd.plan"] == "p" * 12 and len(screen.said) == 1
