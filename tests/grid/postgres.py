"""A PostgreSQL server for the tests, on loopback, from the programs that are installed."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from pathlib import Path

PASSWORD = "of-the-tests"


def programs() -> Path | None:
    """The folder of initdb and postgres; None where PostgreSQL's server is not installed."""
    places = [Path(found).parent for found in [shutil.which("initdb")] if found]
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").exists() and (place / "postgres").exists()), None)


class Server:
    """A server with an empty data directory; it refuses to run as root, who starts it as `postgres` or `nobody`."""

    def __init__(self) -> None:
        found = programs()
        assert found is not None
        self.programs = found
        self.user = next(name for name in ("postgres", "nobody") if _exists(name)) if os.geteuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="basd-postgres-"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        secret = self.folder / "password"
        secret.write_text(PASSWORD)
        if self.user is not None:
            for path in (self.folder, secret):
                shutil.chown(path, self.user)
        self._run(
            "initdb",
            "-D",
            "data",
            "-U",
            "basd",
            "-A",
            "scram-sha-256",
            "--pwfile=password",
            "-E",
            "UTF8",
            "--locale=C",
            "--no-sync",
        )
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        settings = (
            "listen_addresses=127.0.0.1",
            f"port={self.port}",
            f"unix_socket_directories={self.folder}",
            "fsync=off",
        )
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [self.programs / "postgres", "-D", "data", *(part for setting in settings for part in ("-c", setting))],
                cwd=self.folder,
                user=self.user,
                stdout=log,
                stderr=log,
            )
        limit = time.monotonic() + 30
        while time.monotonic() < limit:
            try:
                self.execute("SELECT 1")
                return
            except Exception:
                assert self.process.poll() is None, (self.folder / "log").read_text()
                time.sleep(0.05)
        raise AssertionError((self.folder / "log").read_text())

    def stop(self) -> None:
        """End it at once, as a machine that fails does; what was committed stays."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        # children notice that their parent is gone; a new server waits for them
        (self.folder / "data" / "postmaster.pid").unlink(missing_ok=True)

    def close(self) -> None:
        assert self.process is not None
        # at once: nobody needs what it would write
        self.process.send_signal(signal.SIGQUIT)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def address(self, name: str) -> str:
        return f"postgresql://basd:{PASSWORD}@127.0.0.1:{self.port}/{name}"

    def database(self) -> str:
        """The address of a new empty database."""
        name = f"t{uuid.uuid4().hex[:12]}"
        self.execute(f"CREATE DATABASE {name}")
        return self.address(name)

    def execute(self, command: str, name: str = "postgres") -> None:
        import psycopg

        with psycopg.connect(self.address(name), autocommit=True, connect_timeout=5) as connection:
            connection.execute(command)  # type: ignore[arg-type]

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self.programs / program, *arguments], cwd=self.folder, user=self.user, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def _exists(user: str) -> bool:
    try:
        pwd.getpwnam(user)
    except KeyError:
        return False
    return True
