"""A grid under torture: workers killed at random moments, the tracking server stopped, the disk full, the ledger locked.

    python tests/torture.py                                        # 12 arms, two workers, 40 kills, SQLite
    python tests/torture.py --ledger postgresql --workers 4
    python tests/torture.py --eight 5                              # eight `basd grid` at the same instant, five times

Afterwards the audit must be complete, without a duplicate or a lost point, and every metric must equal, bit for bit, that of a
grid which nothing interrupted. Prints what was done and found; exit status 1 where something is wrong. The disk is filled on a
tmpfs of its own, which only root can mount; others do without that part, and are told so.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "grid")]

from tiny import TINY  # noqa: E402

from basd.tracking.journal import read_events  # noqa: E402

ROWS = ("basd", "ce", "kd", "a2d")
MEGABYTES = 64
# these differ from run to run
OF_THE_MACHINE = ("time/", "system/")
Points = dict[tuple[int, str], float]


def write_table(folder: Path, rows: tuple[str, ...], seeds: int) -> None:
    lines = ["question: Does it survive?", f"reference: {rows[0]}", f"seeds: {list(range(seeds))}", "rows:"]
    lines += [f"  - {{name: {row}, overrides: [method={row}]}}" for row in rows]
    (folder / "experiments").mkdir(parents=True, exist_ok=True)
    (folder / "experiments" / "torture.yaml").write_text("\n".join(lines) + "\n")


class Server:
    """An MLflow server that can be killed and started again on its port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, wait: bool = True) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--workers", "1"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        # without its jobs, seven processes that tracking does not need
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until it answers."""
        limit = time.monotonic() + 120
        while time.monotonic() < limit:
            try:
                urllib.request.urlopen(f"{self.address}/health", timeout=2)
                return
            except OSError:
                time.sleep(0.2)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


class Torture:
    """One grid, its reference, and what is done to it."""

    def __init__(self, folder: Path, given: argparse.Namespace) -> None:
        self.folder, self.given = folder, given
        self.random = random.Random(given.seed)
        self.work, self.reference = folder / "work", given.reference or folder / "reference"
        self.work.mkdir(parents=True)
        self.on_tmpfs = os.geteuid() == 0 and not subprocess.call(
            ["mount", "-t", "tmpfs", "-o", f"size={MEGABYTES}m", "tmpfs", str(self.work)], stderr=subprocess.DEVNULL
        )
        self.environment = {**os.environ, "BASD_CACHE": str(folder / "cache"), "COLUMNS": "160"}
        for place in (self.work, self.reference):
            write_table(place, given.rows, given.seeds)
        self.server = Server(folder / "server")
        self.postgres: Any = None
        self.ledger = "sqlite:///ledger.db"
        if given.ledger == "postgresql":
            from postgres import Server as Postgres

            self.postgres = Postgres()
            self.ledger = self.postgres.database()
        self.started = 0
        self.logs: list[Path] = []
        self.done: dict[str, int] = {"kills": 0, "server stops": 0, "disk full": 0, "ledger locked": 0}

    def settings(self, *more: str) -> list[str]:
        own = [f"recipe.duration={self.given.epochs} epochs", "recipe.batch_size=50", "runtime.threads=1"]
        return [*TINY, *own, *more]

    def command(self, what: str) -> list[str]:
        ledger = [f"ledger.url={self.ledger}", "ledger.retries=1000", "ledger.grace=5"]
        tracking = [f"tracking.uri={self.server.address}"]
        return [sys.executable, "-m", "basd", what, "torture", *self.settings(*ledger, *tracking)]

    def start(self) -> subprocess.Popen[bytes]:
        self.started += 1
        self.logs.append(self.folder / f"worker-{self.started}.log")
        with open(self.logs[-1], "wb") as log:
            return subprocess.Popen(
                self.command("worker"),
                cwd=self.work,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def run(self, what: str) -> tuple[int, str]:
        done = subprocess.run(
            self.command(what), cwd=self.work, env=self.environment, capture_output=True, text=True, timeout=1800
        )
        return done.returncode, done.stdout + done.stderr

    def train_reference(self) -> None:
        if any(self.reference.glob("runs/*/*/journal.jsonl")):
            return
        command = [sys.executable, "-m", "basd", "grid", "torture", *self.settings("runtime.processes=1")]
        done = subprocess.run(command, cwd=self.reference, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    # what is done to it

    def stop_the_server(self) -> None:
        self.done["server stops"] += 1
        self.server.kill()
        time.sleep(self.random.uniform(1, 4))
        self.server.start(wait=False)

    def fill_the_disk(self) -> None:
        if not self.on_tmpfs:
            return
        self.done["disk full"] += 1
        block = self.work / "filled"
        try:
            with open(block, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**16))
        except OSError:
            time.sleep(4)
        finally:
            block.unlink(missing_ok=True)

    def lock_the_ledger(self) -> None:
        self.done["ledger locked"] += 1
        if self.postgres is not None:
            import psycopg

            try:
                with psycopg.connect(self.ledger) as connection:
                    connection.execute("LOCK TABLE trials, trial_user_attributes IN ACCESS EXCLUSIVE MODE")
                    time.sleep(4)
            except psycopg.errors.UndefinedTable:
                pass  # not created yet
            return
        connection = sqlite3.connect(self.work / "ledger.db", isolation_level=None, timeout=30)
        try:
            connection.execute("BEGIN EXCLUSIVE")
            time.sleep(4)
            connection.rollback()
        except sqlite3.Error:
            pass  # not created yet
        finally:
            connection.close()

    def suffer(self) -> None:
        """Kill workers until there were enough kills or the work is done."""
        total = self.given.kills
        others: dict[int, list[Callable[[], None]]] = {}
        for share, action in (
            (0.15, self.stop_the_server),
            (0.3, self.fill_the_disk),
            (0.5, self.stop_the_server),
            (0.65, self.lock_the_ledger),
            (0.8, self.stop_the_server),
        ):
            others.setdefault(max(1, round(total * share)), []).append(action)
        workers = [self.start() for _ in range(self.given.workers)]
        try:
            while self.done["kills"] < total:
                time.sleep(self.random.uniform(0.1, self.given.between))
                place = self.random.randrange(len(workers))
                if all(worker.poll() == 0 for worker in workers):
                    break
                if workers[place].poll() is None:
                    os.killpg(workers[place].pid, signal.SIGKILL)
                    self.done["kills"] += 1
                    for action in others.pop(self.done["kills"], ()):
                        action()
                workers[place].wait()
                workers[place] = self.start()
        finally:
            for worker in workers:
                if worker.poll() is None:
                    os.killpg(worker.pid, signal.SIGKILL)
                    worker.wait()

    # what is found

    def points(self, folder: Path) -> dict[str, Points]:
        """Every metric of every arm by step and name, and `end` for its end."""
        found: dict[str, Points] = {}
        for path in sorted(folder.glob("runs/*/*/journal.jsonl")):
            own: Points = {}
            for event in read_events(path):
                for name, value in event.metrics.items():
                    place = (event.step, f"{event.end}:{name}" if event.end else name)
                    if not name.startswith(OF_THE_MACHINE):
                        assert place not in own, f"{path}: {place} twice"
                        own[place] = value
                if event.end:
                    own[event.step, f"end:{event.end}"] = own.get((event.step, f"end:{event.end}"), 0) + 1
            found[path.parent.name] = own
        return found

    def findings(self) -> list[str]:
        """What is wrong, one line each."""
        wrong = []
        code, said = self.run("grid")
        if code:
            wrong.append(f"the last basd grid ended with {code}: {said[-2000:]}")
        code, said = self.run("audit")
        if code:
            wrong.append(f"the audit: {said[-3000:]}")
        wrong += [
            f"a traceback in {log}: {log.read_text()[-1500:]}" for log in self.logs if "Traceback" in log.read_text()
        ]
        found, expected = self.points(self.work), self.points(self.reference)
        if found.keys() != expected.keys():
            wrong.append(f"arms {sorted(found.keys() ^ expected.keys())} are on one side only")
        for key in found.keys() & expected.keys():
            differ = [
                place
                for place in found[key].keys() | expected[key].keys()
                if found[key].get(place) != expected[key].get(place)
            ]
            if differ:
                wrong.append(
                    f"arm {key}: {len(differ)} of {len(expected[key])} points differ, such as {sorted(differ)[:3]}"
                )
        self.compared = sum(len(points) for points in expected.values())
        return wrong

    def close(self) -> None:
        self.server.kill()
        if self.postgres is not None:
            self.postgres.close()
        if self.on_tmpfs:
            subprocess.call(["umount", "-l", str(self.work)])


@contextmanager
def torture(folder: Path, given: argparse.Namespace) -> Iterator[Torture]:
    made = Torture(folder, given)
    try:
        yield made
    finally:
        made.close()


def run(folder: Path, given: argparse.Namespace, say: Callable[[str], None] = print) -> list[str]:
    """All of it; returns what is wrong."""
    with torture(folder, given) as made:
        began = time.monotonic()
        made.train_reference()
        reference = time.monotonic() - began
        made.server.start()
        began = time.monotonic()
        made.suffer()
        if made.server.process is None:
            made.server.start()
        # the last time it was started again nobody waited for it
        made.server.wait()
        wrong = made.findings()
        seconds = time.monotonic() - began
        done = ", ".join(f"{number} {what}" for what, number in made.done.items())
        say(
            f"{len(given.rows) * given.seeds} arms on {given.ledger}, {given.workers} workers ({made.started} started): {done}"
        )
        if not made.on_tmpfs:
            say("The disk was not filled: only root can mount a tmpfs.")
        say(
            f"{made.compared} points compared with a grid that nothing interrupted; {reference:.0f} s without, {seconds:.0f} s with torture"
        )
        return wrong


def eight(folder: Path, repeats: int, count: int = 8) -> list[str]:
    """`count` grids of a table of two arms and two steps, started at once in an empty directory; returns what is wrong."""
    wrong = []
    environment = {**os.environ, "BASD_CACHE": str(folder / "cache"), "COLUMNS": "160"}
    for repeat in range(repeats):
        place = folder / str(repeat)
        write_table(place, ("basd", "ce"), 1)
        command = [
            sys.executable,
            "-m",
            "basd",
            "grid",
            "torture",
            *TINY,
            "recipe.duration=2 steps",
            "runtime.threads=1",
        ]
        began = [
            subprocess.Popen(
                command, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for _ in range(count)
        ]
        said = [process.communicate()[0] for process in began]
        for process, text in zip(began, said, strict=True):
            if process.returncode or "Traceback" in text:
                wrong.append(f"repeat {repeat}: status {process.returncode}: {text[-1500:]}")
        ends = [
            sum(event.end == "complete" for event in read_events(path)) for path in place.glob("runs/*/*/journal.jsonl")
        ]
        if ends != [1, 1]:
            wrong.append(f"repeat {repeat}: the arms ended {ends} times")
        audit = [
            sys.executable,
            "-m",
            "basd",
            "audit",
            "torture",
            *TINY,
            "recipe.duration=2 steps",
            "runtime.threads=1",
        ]
        done = subprocess.run(audit, cwd=place, env=environment, capture_output=True, text=True)
        if done.returncode:
            wrong.append(f"repeat {repeat}: the audit: {done.stdout[-1500:]}{done.stderr[-500:]}")
    return wrong


def options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ledger", choices=("sqlite", "postgresql"), default="sqlite")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--rows", type=lambda text: tuple(text.split(",")), default=ROWS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--between", type=float, default=8.0, help="at most this many seconds between two kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--reference", type=Path, help="the folder of the undisturbed grid; trained where it is empty")
    parser.add_argument(
        "--eight", type=int, default=0, metavar="TIMES", help="instead: eight grids at once, so many times"
    )
    return parser.parse_args(arguments)


def main() -> int:
    given = options()
    folder = Path(tempfile.mkdtemp(prefix="basd-torture-"))
    wrong = eight(folder, given.eight) if given.eight else run(folder, given)
    for line in wrong:
        print(f"WRONG: {line}")
    if wrong:
        print(f"Left for a look: {folder}")
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    print("Nothing is wrong.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
