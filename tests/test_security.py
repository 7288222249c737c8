"""What comes from elsewhere (weights, artifacts, plans, ledgers, tables, words) runs no code, leaves no folder, tells no password.

Beside this file: pickled code in every form of a teacher's file (tests/models/test_checkpoints.py) and of CIFAR's release
(tests/data/test_cifar.py), names of arms that are exported (tests/test_export.py), ports, images and secrets of the containers
(tests/docker/test_docker.py).
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent / "grid"))

from grid_fakes import SETTING, make_arm, make_plan

from basd.cli import main, parser
from basd.compose import compose
from basd.errors import UserError, without_passwords
from basd.export import trained_student
from basd.grid.ablations import load_ablation
from basd.grid.finished import find_finished
from basd.grid.ledger import Ledger
from basd.grid.options import GridOptions
from basd.grid.plan import Plan
from basd.grid.storage import Database
from basd.grid.worker import prepare
from basd.grid.workers import Workers
from basd.models.checkpoints import read_checkpoint
from basd.multirun import multirun, start_workers
from basd.tracking.files import write_json
from basd.tracking.journal import Journal
from basd.tracking.mirror import Mirror
from basd.tracking.mlflow_store import open_client, shown
from basd.training.checkpoint import CURRENT, load_checkpoint
from basd.training.teachers import _load_into

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for package in ("basd", "analysis") for path in (ROOT / package).rglob("*.py"))
SECRET = "hunter2"


class Code:
    """Unpickled, it makes a folder."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.made),)


# -- no code from files --------------------------------------------------------------------------------------------------


def _checkpoint(path: Path) -> str:
    shutil.copy(path, path.parent / CURRENT)
    state, sentence = load_checkpoint(path.parent)
    assert state is None and sentence is not None
    return sentence


def _teacher(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_checkpoint(path)
    return str(caught.value)


def _cache(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        _load_into(torch.nn.Linear(2, 2), path)
    return str(caught.value)


def _student(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        trained_student(SimpleNamespace(weights=path, place="the arm", student={}))  # type: ignore[arg-type]
    return str(caught.value)


def test_pickled_code_is_refused_in_a_sentence_and_never_runs(tmp_path: Path) -> None:
    made, path = tmp_path / "made", tmp_path / "weights"
    for form in ("torch", "pickle"):
        if form == "torch":
            torch.save({"step": 1, "extra": Code(made)}, path)
        else:
            path.write_bytes(pickle.dumps({"extra": Code(made)}, protocol=2))
        for read in (_checkpoint, _teacher, _cache, _student):
            said = read(path)
            assert said and "\n" not in said and not made.exists(), (form, read)


# what lint refuses, a line each
BAD_LINES = """
import os, pickle, marshal, subprocess, yaml
pickle.loads(b"data")
pickle.Unpickler(open("data", "rb"))
marshal.loads(b"data")
yaml.load("text", Loader=yaml.Loader)
eval("text")
exec("text")
subprocess.run("text" + input(), shell=True)
os.system("text" + input())
HOST = "0.0.0.0"
"""


def test_lint_refuses_code_that_runs_what_it_reads() -> None:
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", "basd/new.py", "--output-format=json", "-"]
    done = subprocess.run(command, cwd=ROOT, input=BAD_LINES, capture_output=True, text=True)
    found = {one["location"]["row"] for one in json.loads(done.stdout) if one["code"].startswith("S")}
    lines = BAD_LINES.splitlines()
    assert [lines[row - 1] for row in range(3, len(lines) + 1) if row not in found] == []


def test_no_source_instantiates_or_loads_objects() -> None:
    """What lint has no rule for."""
    loads = re.compile(
        r"\b(instantiate|unsafe_load|full_load|joblib\.load|np\.load|numpy\.load|allow_pickle|__import__)\b"
    )
    for path in SOURCES:
        name, text = path.relative_to(ROOT).as_posix(), path.read_text()
        assert not loads.search(text), name
        # both refuse it
        assert "_target_" not in text or name in ("basd/compose.py", "basd/multirun.py"), name
        assert not re.search(r"noqa: S\d", text), name
        for call in re.findall(r"torch\.load\(.*", text):
            assert "weights_only=True" in call, (name, call)


PYTHON_TAG = "!!python/object/apply:os.mkdir"


def test_a_table_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    table = tmp_path / "experiments" / "evil.yaml"
    table.write_text(f"question: {PYTHON_TAG} [made]\nreference: a\nseeds: [0]\nrows: []\n")
    with pytest.raises(UserError, match="not readable as YAML"):
        load_ablation("evil")
    with pytest.raises(UserError):
        main_refuses(["grid", "main", f"seeds={PYTHON_TAG} [made]"])
    assert not (tmp_path / "made").exists()


def main_refuses(arguments: list[str]) -> None:
    """Raises the sentence that the command prints."""
    from basd import cli

    given, extra = cli._parse(parser(), arguments)
    cli.command_of(given.command)(given, extra)


def test_no_override_names_code_to_run() -> None:
    for override in (
        "selector._target_=os.system",
        "+selector._target_=os.system",
        "hydra.launcher._target_=os.system",
        "hydra.launcher={_target_: os.system}",
        "++hydra.sweeper._target_=os.system",
    ):
        with pytest.raises(UserError, match="names code to run"):
            compose([override])
        # here Hydra would call it
        with pytest.raises(UserError, match="names code to run"):
            multirun([override, "seed=0,1"], again=False)
        with pytest.raises(UserError, match="names code to run"):
            start_workers("main", ["worker=0,1", override])


def test_presets_and_tables_are_plain_yaml() -> None:
    files = [
        *(ROOT / "basd" / "conf").rglob("*.yaml"),
        *(ROOT / "experiments").glob("*.yaml"),
        *(ROOT / "sweeps").glob("*.yaml"),
    ]
    assert len(files) > 20
    for path in files:
        assert "_target_" not in path.read_text() and "!!" not in path.read_text()
        yaml.safe_load(path.read_text())


# -- the tracking server -------------------------------------------------------------------------------------------------


@pytest.fixture
def store(store: Path, tmp_path: Path) -> Path:
    """A store of the test's own, which it writes to."""
    return Path(shutil.copy(store, tmp_path / "mlflow.db"))


def tracked_run(store: Path, tmp_path: Path, config: str, weights: bytes) -> str:
    """A finished run that says it is an arm's, with these artifacts; its id."""
    client = open_client(f"sqlite:///{store}")
    experiment = client.create_experiment(tmp_path.name, artifact_location=(tmp_path / "artifacts").as_uri())
    tags = {"basd.arm_key": "a" * 16, "basd.seed": "0", "basd.configuration_key": "c" * 16}
    run_id = str(client.create_run(experiment, tags=tags).info.run_id)
    for name, content in (("config.yaml", config.encode()), ("student.safetensors", weights)):
        (tmp_path / name).write_bytes(content)
        client.log_artifact(run_id, str(tmp_path / name))
    client.set_terminated(run_id)
    return run_id


def test_nothing_from_the_server_is_unpickled_or_run(store: Path, tmp_path: Path) -> None:
    made, scratch = tmp_path / "made", tmp_path / "scratch"
    scratch.mkdir()
    uri, runs = f"sqlite:///{store}", tmp_path / "runs"
    evil = tracked_run(store, tmp_path, f"student: {PYTHON_TAG} [{made}]\ndata: {{}}\n", b"")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read"):
        find_finished(evil, runs, uri, None, scratch)
    second = tmp_path / "second"
    second.mkdir()
    torch.save({"extra": Code(made)}, tmp_path / "w")
    run_id = tracked_run(store, second, "student: {}\ndata: {}\n", (tmp_path / "w").read_bytes())
    arm = find_finished(run_id, runs, uri, None, scratch)
    with pytest.raises(UserError, match="cannot be read"):
        trained_student(arm)
    assert not made.exists()


def test_artifacts_hold_nothing_from_outside_the_arm(store: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "key").write_text(SECRET)
    directory = tmp_path / "runs" / SETTING / ("b" * 16)
    prepare(make_arm(0, 0), directory)
    (directory / "artifacts" / "figures").mkdir(parents=True)
    (directory / "artifacts" / "figures" / "plain.txt").write_text("x")
    (directory / "artifacts" / "folder").symlink_to(outside)
    (directory / "artifacts" / "file").symlink_to(outside / "key")
    journal = Journal(directory)
    journal.metrics(1, {"train/loss": 1.0})
    journal.end("complete", "", {"test/top1": 0.5})
    mirror = Mirror(f"sqlite:///{store}", interval=0.05)
    mirror.add(directory)
    assert mirror.drain(30.0), mirror.problem
    sent = [path for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file()]
    assert {path.name for path in sent} == {"plain.txt", "config.yaml"}


# -- names that become paths ---------------------------------------------------------------------------------------------

OUTSIDE = ["../x", "../../x", "/tmp/x", "..", ".", "", "a/b", "a\\..\\b", "a\nb", "~root"]


def test_a_setting_or_an_arm_key_names_one_folder_in_runs() -> None:
    options = GridOptions(directory="runs")
    for name in OUTSIDE:
        with pytest.raises(UserError, match="cannot be the name"):
            options.setting_directory(name)
        with pytest.raises(UserError, match="cannot be the name"):
            options.arm_directory(SETTING, name)


def test_a_plan_that_was_tampered_with_is_no_plan(tmp_path: Path) -> None:
    for name in ("../../x", "/tmp/x", "a/b", ""):
        for place in ("arm_key", "setting", "setting of an arm", "name", "hash", "cell"):
            write_json(tmp_path / "plan.json", tampered(place, name))
            with pytest.raises(UserError, match="is not a plan"):
                Plan.load(tmp_path / "plan.json")
                pytest.fail(f"{place}={name} was taken")


def tampered(place: str, name: str) -> dict[str, Any]:
    """A plan's values with a name that leads elsewhere in one place."""
    values: dict[str, Any] = json.loads(json.dumps(make_plan(1, 1).to_dict()))
    (arm,) = values["arms"].values()
    if place == "arm_key":
        values["arms"] = {name: {**arm, "arm_key": name}}
        values["cells"] = {"row0": {"0": name}}
    elif place == "setting of an arm":
        arm["setting"] = name
    elif place == "cell":
        values["cells"]["row0"]["0"] = name
    else:
        values[place] = name
    return values


def test_a_ledger_that_was_tampered_with_leads_nowhere(tmp_path: Path) -> None:
    """Arms are those of the plan; a key that stands in the ledger alone is never made a path that leaves runs/."""
    plan, options = make_plan(1, 1), GridOptions(directory=str(tmp_path / "runs"))
    evil = SimpleNamespace(**{**vars(make_arm(0, 1)), "arm_key": "../../x"})
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db", SETTING)
    ledger.ensure([*plan.arms.values(), evil], {}, "table")
    assert ledger.claim(list(plan.arms), 9) == list(plan.arms)
    ledger.close()
    with pytest.raises(UserError, match="cannot be the name"):
        options.arm_directory(SETTING, next(key for key in ledger.arms() if key not in plan.arms))


def test_the_command_line_names_no_setting_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("status", "report", "audit", "export"):
        for setting in ("../x", "/tmp", "..", "a/../../b"):
            assert main([command, "main" if command != "export" else "abc", f"setting={setting}"]) == 2
            assert "is not the name of a setting" in capsys.readouterr().err, (command, setting)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_names_no_table_outside(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("../main", "/etc/passwd", "experiments/main", "main.yaml"):
        for command in ("plan", "grid", "worker", "audit", "sync", "report", "status"):
            assert main([command, name]) == 2, (command, name)
    assert "Traceback" not in capsys.readouterr().err


def test_row_labels_and_names_of_runs_become_no_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    for name in ("../x", "a/b", ".hidden"):
        text = f"question: q\nreference: a\nseeds: [0]\nrows:\n  - {{name: '{name}', overrides: [method=ce]}}\n"
        (tmp_path / "experiments" / "evil.yaml").write_text(text)
        with pytest.raises(UserError, match="the row name"):
            load_ablation("evil")


# -- addresses and passwords ---------------------------------------------------------------------------------------------

ADDRESSES = [
    f"postgresql://me:{SECRET}@host/name",
    f"postgresql://me:{SECRET}@host:port/name",
    f"postgresql://me:{SECRET}/x@host/name",
    f"postgresql://me:a@{SECRET}@host/name",
    f"postgres//me:{SECRET}@host/name",
    f"postgresql://host/name?user=me&password={SECRET}",
    f"mysql://me:{SECRET}@host/name",
    f"http://me:{SECRET}@127.0.0.1:9",
    f"http://me:{SECRET}@[bad",
    f"ftp://:{SECRET}@host",
]


def test_no_sentence_shows_a_password() -> None:
    for address in ADDRESSES:
        assert SECRET not in shown(address) and SECRET not in str(UserError(f"{address} does not answer"))
        with pytest.raises(UserError, match=r"ledger\.url") as caught:
            with Database(address, timeout=1.0).errors():
                raise OSError(f"could not open {address}")
        assert SECRET not in str(caught.value), address
        said = without_passwords(
            f"request to {address}/api failed; sqlite:///a@b.db and http://host:5000/x are as they were"
        )
        assert SECRET not in said and said.endswith("sqlite:///a@b.db and http://host:5000/x are as they were"), address


def test_what_mlflow_throws_is_told_without_the_password(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """MLflow's own message names the whole address."""
    from mlflow.exceptions import MlflowException

    directory = tmp_path / SETTING / ("a" * 16)
    prepare(make_arm(0, 0), directory)
    journal = Journal(directory)
    journal.end("complete")
    address = f"http://me:{SECRET}@127.0.0.1:9"

    def store(arm: Any) -> Any:
        raise MlflowException(f"API request to {address}/api/2.0/mlflow/runs failed")

    mirror = Mirror(address, interval=0.02)
    mirror._store = store  # type: ignore[method-assign]
    mirror.add(directory)
    with caplog.at_level(logging.INFO):
        assert not mirror.drain(0.3)
    assert "does not take the results yet" in mirror.problem
    assert SECRET not in mirror.problem + caplog.text


def test_passwords_reach_neither_artifacts_tags_nor_the_list_of_processes(tmp_path: Path, store: Path) -> None:
    arm = make_arm(0, 0)
    arm.config.update(ledger={"url": ADDRESSES[0]}, tracking={"uri": ADDRESSES[0]})
    directory = tmp_path / "runs" / SETTING / arm.arm_key
    prepare(arm, directory)
    assert SECRET not in (directory / "config.yaml").read_text()
    journal = Journal(directory)
    journal.end("failed", f"{UserError(f'no answer from {ADDRESSES[0]}')}")
    mirror = Mirror(f"sqlite:///{store}", interval=0.05)
    mirror.add(directory)
    assert mirror.drain(30.0), mirror.problem
    sent = [store, *(path for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file())]
    assert len(sent) == 2 and not any(SECRET.encode() in path.read_bytes() for path in sent)


def test_a_worker_is_not_told_addresses_on_its_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Any] = {}

    def start(command: list[str], **given: Any) -> Any:
        started.update(command=command, **given)
        return SimpleNamespace(pid=1)

    monkeypatch.setattr("basd.grid.workers.subprocess.Popen", start)
    options = GridOptions(directory=str(tmp_path), ledger_url=ADDRESSES[0], processes=1, device="cpu")
    Workers(tmp_path / "plan.json", options, tmp_path / "logs").start()
    assert SECRET not in " ".join(started["command"]) and any(SECRET in value for value in started["env"].values())


def test_commands_told_to_users_open_nothing_to_the_network() -> None:
    """`mlflow ui` binds to loopback unless told otherwise."""
    texts = [*(path.read_text() for path in SOURCES), (ROOT / "README.md").read_text()]
    for text in texts:
        for command in re.findall(r"(?:mlflow (?:ui|server)|optuna-dashboard)[^`\"'\n]*", text):
            assert "--host" not in command and "0.0.0.0" not in command
