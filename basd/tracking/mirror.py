"""The mirror: a background thread that copies the journals of arms to MLflow and never makes training wait.

The journal is the truth. The mirror remembers in `mirror.json` how far it came, and asks the server for the last step of each metric
whenever it is not sure (after a start or an error), so that nothing is sent twice and nothing is left out.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from basd.errors import UserError, without_passwords
from basd.tracking.datasets import datasets_of
from basd.tracking.files import FileLock, file_lock, read_json, write_json
from basd.tracking.journal import NAME as JOURNAL
from basd.tracking.journal import Event, read_events
from basd.tracking.mlflow_store import BATCH, SUPERSEDED, Store, check_tracking, fingerprint, sqlite_path
from basd.tracking.notes import arm_note, experiment_note, noted

__all__ = ["Mirror", "check_tracking", "is_mirrored"]

STATE = "mirror.json"
STATUS = {"complete": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
log = logging.getLogger("basd.mirror")


@dataclass
class _Arm:
    """One followed arm directory; the fields after `lock` are remembered in mirror.json."""

    directory: Path
    expected: int = 1
    run_tag: str = ""
    labels: dict[str, str] = field(default_factory=dict)  # ablation -> row label
    concluded: str = ""  # status for an arm whose process ended without a word
    left: bool = False  # what is here is no account of the arm: it was trained elsewhere, or anew
    spec: dict[str, Any] = field(default_factory=dict)
    lock: FileLock | None = None
    sure: bool = False  # the server was asked since the last start or error
    run_id: str = ""
    parent: str = ""
    position: int = 0
    events: int = 0
    last: dict[str, int] = field(default_factory=dict)  # metric -> last step sent
    status: str = ""
    config_sent: bool = False
    tags: dict[str, str] = field(default_factory=dict)  # tags set so far
    parent_closed: bool = False
    reopened: bool = False


REMEMBERED = ("run_id", "parent", "position", "status", "config_sent", "tags")


def is_mirrored(directory: Path | str, uri: str, labels: Mapping[str, str] | None = None) -> bool:
    """Whether everything in an arm's directory has reached the tracking server, these ablation labels included."""
    return _all_sent(Path(directory), read_json(Path(directory) / STATE), uri, labels or {})


def _all_sent(directory: Path, state: dict[str, Any] | None, uri: str, labels: Mapping[str, str]) -> bool:
    if not state or state.get("store") != fingerprint(uri) or state.get("status") not in STATUS.values():
        return False
    store = sqlite_path(uri)
    if store is not None and not store.exists():  # somebody deleted it: the journals fill a new one
        return False
    journal = directory / JOURNAL
    if journal.exists() and journal.stat().st_size != state.get("position"):
        return False
    tags = state.get("tags", {})
    return all(tags.get(f"basd.ablation.{name}") == label for name, label in labels.items())


class Mirror:
    """Follows arm directories and sends their journals to MLflow until `drain` or `close`."""

    def __init__(self, uri: str, *, interval: float = 1.0, longest_pause: float = 30.0) -> None:
        self.uri = uri
        self.problem = ""  # the last error in one sentence; "" when the server answers
        self._interval = interval
        self._longest_pause = longest_pause
        self._arms: dict[Path, _Arm] = {}
        self._stores: dict[str, Store] = {}
        self._guard = threading.Lock()
        self._wake = threading.Event()
        self._closing = False
        self._settling = False
        self._passes = 0
        self._thread: threading.Thread | None = None

    def add(
        self, directory: Path | str, *, expected: int = 1, labels: Mapping[str, str] | None = None, run_tag: str = ""
    ) -> None:
        """Follow an arm directory (it needs an arm.json by the time its journal appears).

        `expected`: number of arms after which the configuration's run is closed. `labels`: ablation name -> row label.
        `run_tag`: marks a run that stands beside the ledger's, e.g. a repetition; such a run counts in no mean.
        """
        path = Path(directory).absolute()
        with self._guard:
            arm = self._arms.setdefault(path, _Arm(path, run_tag=run_tag))
            arm.expected = max(arm.expected, expected)
            arm.labels.update(labels or {})
        self._wake.set()

    def tag_ablation(self, ablation: str, labels: Mapping[Path, str]) -> None:
        """Tag the runs of these arm directories, finished ones too, with `basd.ablation.<ablation>` = row label."""
        for directory, label in labels.items():
            self.add(directory, labels={ablation: label})

    def conclude(self, directory: Path | str, status: str) -> None:
        """Close the run of an arm whose process ended without a word ("FAILED" or "KILLED"); its journal's own end goes first."""
        with self._guard:
            arm = self._arms.get(Path(directory).absolute())
            if arm is not None:
                arm.concluded = status
        self._wake.set()

    def leave(self, directory: Path | str) -> None:
        """Follow an arm directory no more: the arm was completed on another machine, whose mirror tells of it."""
        with self._guard:
            arm = self._arms.get(Path(directory).absolute())
            if arm is not None:
                arm.left = True

    def start(self) -> Mirror:
        """Start the background thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="basd-mirror", daemon=True)
            self._thread.start()
        return self

    def pending(self) -> list[Path]:
        """Directories of which something is still to be sent."""
        with self._guard:
            arms = list(self._arms.values())
        return [arm.directory for arm in arms if not self._sent(arm)]

    def drain(self, timeout: float = 60.0) -> bool:
        """Send what is left, close the runs of configurations, stop the thread. Returns whether everything was sent.

        Call it when no arm is being trained any more. After an outage the rest is sent by the next mirror.
        """
        limit = time.monotonic() + timeout
        if self.pending() or self._thread is not None:
            self.start()
        with self._guard:
            self._settling, passes = True, self._passes
        while self._thread is not None and time.monotonic() < limit:
            self._wake.set()
            with self._guard:
                fresh = self._passes >= passes + 2  # one complete pass began after settling was asked for
            if fresh and not self.problem and not self.pending():
                break
            time.sleep(0.05)
        self.close()
        return not self.pending()

    def close(self) -> None:
        """Stop the thread and release the locks; does not wait for a request that hangs."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=2.0)
        with self._guard:
            for arm in self._arms.values():
                if arm.lock is not None and not (self._thread and self._thread.is_alive()):
                    arm.lock.release()

    # The thread

    def _run(self) -> None:
        pause = self._interval
        while not self._closing:
            self._wake.clear()
            wrong = self._pass()
            with self._guard:
                self._passes += 1
            pause = min(max(pause * 2, self._interval), self._longest_pause) if wrong else self._interval
            self._wake.wait(min(pause, 0.5) if self._settling else pause)

    def _pass(self) -> bool:
        """Look at every arm once. Returns whether something went wrong; two errors in a row end the pass."""
        with self._guard:
            arms, settling = list(self._arms.values()), self._settling
        in_row, problem = 0, ""
        for arm in arms:
            if self._closing or in_row == 2:
                break
            try:
                self._follow(arm, settling)
                in_row = 0
            except Exception as error:  # whatever the server does, training goes on and the mirror tries again
                in_row += 1
                arm.sure = False
                problem = str(error) if isinstance(error, UserError) else _sentence(self.uri, error)
                log.debug("mirroring %s failed", arm.directory, exc_info=True)
        self.problem = problem
        return bool(problem)

    def _follow(self, arm: _Arm, settling: bool) -> None:
        if arm.left or (self._sent(arm) and (not settling or arm.parent_closed)):
            return
        if not (arm.directory / JOURNAL).exists() or not self._own(arm):
            return
        if self._changed(arm):
            self._send(arm)
        if settling and arm.status and not arm.parent_closed:
            with self._setting_lock(arm):
                self._aggregate(arm, settle=True)
            for other in self._arms.copy().values():
                other.parent_closed |= arm.parent_closed and other.parent == arm.parent
        if self._sent(arm) and arm.lock is not None and (arm.status == "FINISHED" or settling):
            arm.lock.release()
            arm.lock = None

    def _sent(self, arm: _Arm) -> bool:
        if arm.left or not (arm.directory / JOURNAL).exists():
            return True  # nothing was ever trained, nothing is owed
        if arm.lock is None:  # another mirror may have done it
            return is_mirrored(arm.directory, self.uri, arm.labels)
        return not self._changed(arm) and bool(arm.status)

    def _changed(self, arm: _Arm) -> bool:
        size = (arm.directory / JOURNAL).stat().st_size
        unset = any(arm.tags.get(f"basd.ablation.{name}") != label for name, label in arm.labels.items())
        unsaid = bool(arm.concluded) and not arm.status
        return size != arm.position or unset or unsaid or not arm.run_id or not arm.sure

    def _own(self, arm: _Arm) -> bool:
        """Hold the directory's lock, so that no other mirror sends the same journal, and read what was sent before."""
        if arm.lock is not None:
            return True
        lock = FileLock(arm.directory / "mirror.lock")
        if not lock.acquire(0):
            return False
        spec = read_json(arm.directory / "arm.json")
        if spec is None:
            lock.release()
            return False
        arm.lock, arm.spec, arm.sure = lock, spec, False
        state = read_json(arm.directory / STATE) or {}
        if state.get("store") == fingerprint(self.uri):
            for name in REMEMBERED:
                if name in state:
                    setattr(arm, name, state[name])
        return True

    def _remember(self, arm: _Arm) -> None:
        state = {name: getattr(arm, name) for name in REMEMBERED}
        write_json(arm.directory / STATE, {"store": fingerprint(self.uri), **state})

    def _store(self, arm: _Arm) -> Store:
        setting = str(arm.spec["setting"])
        if setting not in self._stores:
            self._stores[setting] = Store(self.uri, setting)
        return self._stores[setting]

    def _setting_lock(self, arm: _Arm) -> Any:
        return file_lock(arm.directory.parent / "mirror.lock")

    # What is sent

    def _send(self, arm: _Arm) -> None:
        store = self._store(arm)
        spec = read_json(arm.directory / "arm.json")
        if spec is not None and spec["version"] != arm.spec["version"]:
            arm.spec, arm.sure = spec, False  # begun anew by other code since this mirror took the directory
        if not arm.sure:
            self._find_run(arm, store)
        if arm.left:
            return
        if not arm.config_sent and (arm.directory / "config.yaml").exists():
            store.upload(arm.run_id, arm.directory / "config.yaml")
            arm.config_sent = True
        closing = self._send_metrics(arm, store)
        wanted = {f"basd.ablation.{name}": label for name, label in arm.labels.items()}
        missing = {name: label for name, label in wanted.items() if arm.tags.get(name) != label}
        if missing:
            store.tag(arm.run_id, missing)
            store.tag(arm.parent, missing)
            arm.tags.update(missing)
        if closing is not None and arm.status != STATUS[closing.end]:
            self._finish(arm, store, STATUS[closing.end], closing.reason, closing.milliseconds)
        elif arm.concluded and not arm.status:
            self._finish(arm, store, arm.concluded, "", time.time_ns() // 1_000_000)
        self._remember(arm)

    def _find_run(self, arm: _Arm, store: Store) -> None:
        """Find or create the arm's run and ask the server what it has of it."""
        spec, key = arm.spec, str(arm.spec["arm_key"])
        params = {str(k): str(v) for k, v in spec.get("params", {}).items()}
        tags = {"basd.configuration_key": str(spec["configuration_key"]), "basd.version": str(spec["version"])}
        first = next(read_events(arm.directory / JOURNAL), None)
        start = first.milliseconds if first else time.time_ns() // 1_000_000
        with self._setting_lock(arm):
            shared = {name: value for name, value in params.items() if name != "seed"}
            arm.parent = store.parent(tags["basd.configuration_key"], str(spec["name"]), tags, shared, start)
            run = store.arm(key, arm.run_tag)
            if run is not None and run.data.tags.get("basd.version") != tags["basd.version"]:
                if run.info.start_time > start:  # begun anew on another machine, after what is here
                    arm.left = True
                    return
                # the code changed and the arm began anew: its points belong to another run
                store.tag(run.info.run_id, {SUPERSEDED: "true"})
                if run.info.status == "RUNNING":
                    store.close(run.info.run_id, "KILLED", start)
                run = None
            note = arm_note(str(spec["name"]), spec["seed"], arm.directory.name if arm.run_tag else key)
            if run is None:
                own = {
                    **noted({}, note),
                    **tags,
                    "basd.arm_key": key,
                    "basd.seed": str(spec["seed"]),
                    "basd.cohort": str(spec["cohort_key"]),
                }
                own |= {"basd.run": arm.run_tag} if arm.run_tag else {}
                name = f"{spec['name']} seed={spec['seed']}" + (f" {arm.run_tag}" if arm.run_tag else "")
                run_id = store.create_arm(arm.parent, name, own, params, start)
            else:
                run_id = str(run.info.run_id)
                store.describe(run, note)
            store.describe_experiment(experiment_note(spec))
            for one in (arm.parent, run_id):
                store.log_datasets(one, datasets_of(spec))
        if run_id != arm.run_id:  # mirror.json was about another run, or there was none
            arm.run_id, arm.tags, arm.config_sent, arm.status = run_id, {}, False, ""
        arm.position, arm.events = 0, 0  # read the journal from its start; `last` says what to leave out
        arm.last = store.last_steps(run_id)
        arm.reopened, arm.sure = False, True

    def _send_metrics(self, arm: _Arm, store: Store) -> Event | None:
        """Send the metrics of new events; returns the closing event if the journal has one that was not dealt with."""
        path = arm.directory / JOURNAL
        first = next(read_events(path, arm.position), None)
        if (
            path.stat().st_size < arm.position
            or (first is not None and first.index != arm.events)
            or (first is None and path.stat().st_size > arm.position)
        ):
            arm.position, arm.events = 0, 0  # the journal was rewound
        rows: list[tuple[str, float, int, int]] = []
        marks: dict[str, str] = {}
        closing: Event | None = None
        for event in read_events(path, arm.position):
            closing = event if event.end else None
            step = max([event.step, *arm.last.values()]) if event.end else event.step
            new = {k: v for k, v in event.metrics.items() if event.step > arm.last.get(k, -1) and not event.end}
            if event.end:  # final values that training already reported are not repeated
                new = {k: v for k, v in event.metrics.items() if k not in arm.last}
            if len(rows) + len(new) > BATCH:
                self._flush(arm, store, rows, marks)
            for name, value in new.items():
                arm.last[name] = step
                if math.isfinite(value):
                    rows.append((name, value, event.milliseconds, step))
                else:
                    marks[f"basd.nonfinite.{name}"] = f"{value} at step {step}"  # the last one counts
            arm.position, arm.events = event.next, event.index + 1
        self._flush(arm, store, rows, marks)
        if closing is None and arm.status and arm.position:
            arm.status = ""  # the arm went on after its end
        return closing

    def _flush(self, arm: _Arm, store: Store, rows: list[tuple[str, float, int, int]], marks: dict[str, str]) -> None:
        if (rows or marks) and not arm.reopened:
            store.reopen(arm.run_id)
            if not arm.run_tag:
                store.reopen(arm.parent)
                arm.parent_closed = False
            arm.reopened, arm.status = True, ""
        store.log_all(arm.run_id, rows)
        store.tag(arm.run_id, marks)
        rows.clear()
        marks.clear()
        if arm.position:
            self._remember(arm)

    def _finish(self, arm: _Arm, store: Store, status: str, reason: str, milliseconds: int) -> None:
        if status == "FINISHED":
            weights = arm.directory / "student.safetensors"
            if weights.exists():
                store.upload(arm.run_id, weights)
        for file in sorted((arm.directory / "artifacts").rglob("*")):
            # a link to elsewhere would publish what is no artifact
            if file.is_file() and file.resolve().is_relative_to(arm.directory.resolve()):
                below = file.parent.relative_to(arm.directory / "artifacts").as_posix()
                store.upload(arm.run_id, file, None if below == "." else below)
        if reason:
            store.tag(arm.run_id, {"basd.reason": reason})
        store.close(arm.run_id, status, milliseconds)
        if not arm.run_tag:
            with self._setting_lock(arm):
                self._aggregate(arm, settle=False)
        arm.status, arm.reopened = status, False

    def _aggregate(self, arm: _Arm, *, settle: bool) -> None:
        if arm.run_tag:
            arm.parent_closed = True
            return
        store = self._store(arm)
        arm.parent_closed = store.aggregate(str(arm.spec["configuration_key"]), arm.parent, arm.expected, settle=settle)


def _sentence(uri: str, error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return without_passwords(
        f"MLflow at {uri} does not take the results yet ({first}); they are kept in the journals, `basd sync` sends them later"
    )
