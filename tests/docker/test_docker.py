"""The files of the images are linted, and their services' commands are run here, on PostgreSQL, without containers."""

from __future__ import annotations

import base64
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import basd_here
from tiny import TINY

sys.path.insert(0, str(Path(__file__).parents[1] / "grid"))

from postgres import PASSWORD, Server, programs

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
ACCOUNT = "of-the-accounts"


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return found


def tool(name: str) -> str:
    """A program of the environment that runs the tests."""
    return str(Path(sys.executable).parent / name)


def test_linters_find_nothing() -> None:
    files = [str(DOCKER / "compose.yaml"), str(DOCKER / "compose.cuda.yaml")]
    for command in (
        [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", *files],
        [tool("hadolint"), str(DOCKER / "Dockerfile")],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_images_are_pinned_and_nobody_is_root() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    stages = re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]
    assert re.search(r"^ARG PYTHON=\d+\.\d+\.\d+-", text, re.MULTILINE)
    for stage in stages:
        assert stage.startswith("python:${PYTHON} AS ")
        if not stage.startswith("python:${PYTHON} AS wheel"):
            assert re.search(r"^USER [1-9]\d*$", stage, re.MULTILINE)
    pinned = (DOCKER / "constraints.txt").read_text().splitlines()[1:]
    assert pinned and all(re.fullmatch(r"[A-Za-z0-9._-]+==\S+", line) for line in pinned)
    for service in compose()["services"].values():
        assert re.fullmatch(r"basd:(cpu|services)|[a-z]+:\d+\.\d+-\w+", service["image"])


def test_ports_are_on_loopback_and_no_secret_is_written_down() -> None:
    found = compose()
    for service in found["services"].values():
        assert all(port.startswith("${BIND:-127.0.0.1}:") for port in service.get("ports", []))
    assert all(secret["file"].startswith("./secrets/") for secret in found["secrets"].values())
    assert "/docker/secrets/" in (ROOT / ".gitignore").read_text()
    for path in DOCKER.iterdir():
        if path.is_file():
            assert not re.search(r"://\w+:[^/@\s]+@", path.read_text()), path


def test_every_long_service_has_a_health_check() -> None:
    services = compose()["services"]
    assert all("healthcheck" in services[name] for name in ("postgres", "mlflow", "dashboard"))


# -- the services' own commands ----------------------------------------------------------------------------------------


def with_secrets(folder: Path, **variables: str) -> dict[str, str]:
    """The environment that the images' entry point gives a command."""
    (folder / "secrets").mkdir(exist_ok=True)
    (folder / "auth").mkdir(exist_ok=True)
    (folder / "secrets" / "postgres_password").write_text(PASSWORD + "\n")
    (folder / "secrets" / "mlflow_password").write_text(ACCOUNT + "\n")
    places = {"BASD_SECRETS": str(folder / "secrets"), "BASD_AUTH_DIRECTORY": str(folder / "auth")}
    environment = {"PATH": os.environ["PATH"], **places, **variables}
    command = [str(DOCKER / "with-secrets.sh"), "env"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def test_passwords_come_from_files(tmp_path: Path) -> None:
    """The database's always; those of MLflow's accounts where they are switched on, in a file for the server alone."""
    settings = tmp_path / "auth" / "basic_auth.ini"
    found = with_secrets(tmp_path)
    assert found["PGPASSWORD"] == PASSWORD and not any(name.startswith("MLFLOW") for name in found)
    worker = with_secrets(tmp_path, MLFLOW_AUTH="1")
    assert (worker["MLFLOW_TRACKING_USERNAME"], worker["MLFLOW_TRACKING_PASSWORD"]) == ("admin", ACCOUNT)
    assert "MLFLOW_AUTH_CONFIG_PATH" not in worker and not settings.exists()
    server = with_secrets(tmp_path, MLFLOW_AUTH="1", MLFLOW_AUTH_DATABASE="postgresql://accounts")
    assert server["MLFLOW_AUTH_CONFIG_PATH"] == str(settings) and settings.stat().st_mode & 0o777 == 0o600
    lines = settings.read_text().splitlines()
    assert f"admin_password = {ACCOUNT}" in lines and "database_uri = postgresql://accounts" in lines


class Host:
    """One machine instead of the containers: addresses and folders of the compose file become those of this test."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder, self.server = folder, server
        for name in ("secrets", "auth", "artifacts", "work"):
            (folder / name).mkdir(parents=True)
        (folder / "secrets" / "postgres_password").write_text(PASSWORD + "\n")
        (folder / "secrets" / "mlflow_password").write_text(ACCOUNT + "\n")
        self.port, self.dashboard = free_port(), free_port()
        self.variables = {"MLFLOW_AUTH": "1"}
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PG", "MLFLOW"))},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "BASD_SECRETS": str(folder / "secrets"),
            "BASD_AUTH_DIRECTORY": str(folder / "auth"),
            "COLUMNS": "160",
        }
        self.started: list[subprocess.Popen[bytes]] = []

    def text(self, words: str) -> str:
        """A text of the compose file as compose would fill it in, with this host's addresses."""

        def value(match: re.Match[str]) -> str:
            name, kind, other = match.groups()
            given = self.variables.get(name, "")
            return (given or other) if kind == ":-" else (other if given else "")

        filled = re.sub(r"\$\{(\w+)(:[-+])([^}]*)\}", value, words)
        for there, here in (
            ("postgres:5432", f"127.0.0.1:{self.server.port}"),
            ("mlflow:5000", f"127.0.0.1:{self.port}"),
            ("127.0.0.1:5000", f"127.0.0.1:{self.port}"),
            ("127.0.0.1:8080", f"127.0.0.1:{self.dashboard}"),
            ("--port 5000", f"--port {self.port}"),
            ("--port 8080", f"--port {self.dashboard}"),
            ("0.0.0.0", "127.0.0.1"),
            ("/artifacts", str(self.folder / "artifacts")),
        ):
            filled = filled.replace(there, here)
        return filled

    def variables_of(self, service: dict[str, Any]) -> dict[str, str]:
        return {name: self.text(value) for name, value in service.get("environment", {}).items()}

    def start(self, name: str, log: str) -> subprocess.Popen[bytes]:
        """A service's command, behind the entry point of its image."""
        service = compose()["services"][name]
        command = [str(DOCKER / "with-secrets.sh"), *shlex.split(self.text(service["command"]))]
        with open(self.folder / log, "wb") as file:
            process = subprocess.Popen(
                command,
                cwd=self.folder / "work",
                env={**self.environment, **self.variables_of(service)},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def wait_until_healthy(self, name: str, log: str, seconds: float = 120.0) -> None:
        kind, *command = compose()["services"][name]["healthcheck"]["test"]
        assert kind == "CMD"
        command = [self.text(word) for word in command]
        limit = time.monotonic() + seconds
        while subprocess.run(command, env=self.environment, capture_output=True).returncode:
            assert time.monotonic() < limit, (self.folder / log).read_text()[-3000:]
            time.sleep(1)

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    if programs() is None:
        pytest.skip("PostgreSQL's server is not installed")
    made = Server()
    made.execute("CREATE DATABASE ledger")
    environment = {
        **os.environ,
        "PATH": f"{made.programs}:{os.environ['PATH']}",
        "PGHOST": "127.0.0.1",
        "PGPORT": str(made.port),
        "PGPASSWORD": PASSWORD,
        "POSTGRES_USER": "basd",
    }
    subprocess.run([str(DOCKER / "databases.sh")], env=environment, check=True)
    yield made
    made.close()


def get(address: str, password: str | None = None) -> int:
    request = urllib.request.Request(address)
    if password is not None:
        request.add_header("Authorization", "Basic " + base64.b64encode(f"admin:{password}".encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_accounts_are_off_unless_asked_for() -> None:
    command, switch = compose()["services"]["mlflow"]["command"], "${MLFLOW_AUTH:+--app-name basic-auth}"
    assert switch in command and "basic-auth" not in command.replace(switch, "")


@pytest.mark.full
def test_the_services_commands_serve_and_train(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path, server)
    host.environment["BASD_CACHE"] = str(tmp_path / "cache")
    settings = [*TINY, "rows=[basd,ce]", "seeds=[1]", "recipe.duration=1 epochs"]
    host.variables.update(ABLATION="leave_one_out", OVERRIDES=shlex.join(settings))
    try:
        host.start("mlflow", "mlflow.log")
        host.wait_until_healthy("mlflow", "mlflow.log")
        listing = f"http://127.0.0.1:{host.port}/api/2.0/mlflow/experiments/search?max_results=1"
        assert (get(listing), get(listing, "wrong"), get(listing, ACCOUNT)) == (401, 401, 200)
        code = host.start("worker", "worker.log").wait(240)
        log = (tmp_path / "worker.log").read_text()
        assert code == 0 and "Traceback" not in log, log
        host.variables["OVERRIDES"] = ""
        urls = compose()["services"]["worker"]["command"].replace("basd worker ${ABLATION:-leave_one_out}", "")
        for name, value in with_secrets(tmp_path, MLFLOW_AUTH="1").items():
            if name.startswith(("PG", "MLFLOW")):
                monkeypatch.setenv(name, value)
        words = ["audit", "leave_one_out", *shlex.split(host.text(urls))]
        code, said = basd_here(*words, cwd=tmp_path / "work", cache=tmp_path / "cache")
        assert code == 0 and "2 of 2 arms complete" in said, said
        # artifacts went through the server
        assert list((tmp_path / "artifacts").rglob("config.yaml"))
        host.start("dashboard", "dashboard.log")
        host.wait_until_healthy("dashboard", "dashboard.log")
        for path in [*(tmp_path / "work").rglob("*"), *tmp_path.glob("*.log")]:
            if path.is_file():
                content = path.read_bytes()
                assert PASSWORD.encode() not in content and ACCOUNT.encode() not in content, path
    finally:
        host.close()
