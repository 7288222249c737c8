"""A worker: claims arms of one cohort key, trains them side by side, says in the ledger what became of each, and goes on.

`python -m basd.grid.worker --plan FILE` works on a plan until nothing waits. SIGTERM or SIGINT once: the arms are
checkpointed and given back; twice: it leaves at once, and its arms go on from their last checkpoint elsewhere.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basd.distributed import PeerLostError
from basd.errors import DISK_FULL, TOO_MANY_ARMS, UserError, is_disk_full
from basd.grid.leases import leased
from basd.grid.ledger import Ledger
from basd.grid.options import GridOptions
from basd.grid.room import Room
from basd.grid.versions import set_aside, version_in
from basd.tracking.files import FileLock, read_json, write_json, write_text
from basd.tracking.journal import Journal, last_event

if TYPE_CHECKING:
    from basd.config import FrozenArm
    from basd.grid.plan import Plan
    from basd.grid.pruning import EpochPruner
    from basd.training.recorder import Recorder

log = logging.getLogger("basd.worker")
Trainer = Callable[..., Sequence[Any]]
# Seconds before a worker tries again after a full disk; between questions to a ledger that does not answer, and in all.
FULL_DISK_PAUSE = 10.0
LEDGER_PAUSE, LEDGER_PATIENCE = 3.0, 600.0
# GridOptions as JSON, in the environment of a worker process.
OPTIONS = "BASD_WORKER_OPTIONS"


def load_trainer(name: str) -> Trainer:
    """The function behind "module:function"."""
    module, _, function = name.partition(":")
    found: Trainer = getattr(importlib.import_module(module), function)
    return found


def prepare(arm: FrozenArm, directory: Path) -> None:
    """Write arm.json and config.yaml. An arm begun by another code version starts anew: half of each would be neither.

    What another version finished is set aside.
    """
    import yaml

    before = read_json(directory / "arm.json")
    if before is not None and before.get("version") != arm.version:
        log.warning(
            "arm %s was begun by code %s; it starts again with %s", arm.arm_key, before.get("version"), arm.version
        )
        # the journal goes before arm.json changes, so that a mirror never takes old points for the new version's
        set_aside(directory)
        for left in (*directory.glob("checkpoint*.pt"), directory / "journal.jsonl", directory / "progress.json"):
            left.unlink(missing_ok=True)
    if before != arm.to_dict():
        write_json(directory / "arm.json", arm.to_dict(), durable=True)
        # this file goes to the tracking server: addresses, which may hold passwords, stay out of it
        public = {name: section for name, section in arm.config.items() if name not in ("tracking", "ledger")}
        write_text(directory / "config.yaml", yaml.safe_dump(public, sort_keys=False, allow_unicode=True))


class Progress:
    """Writes an arm's progress.json, at most once a second."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "progress.json"
        self._first: tuple[int, float] | None = None
        self._written = -1e9
        self._data_wait: float | None = None

    def measured(self, values: Mapping[str, float]) -> None:
        """Take note of how long the last epoch waited for images, from the metrics of its end."""
        self._data_wait = values.get("time/data_wait_share", self._data_wait)

    def __call__(self, step: int, total: int) -> None:
        """Tell that `step` of `total` steps are done."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        if now - self._written < 1.0 and step != total:
            return
        self._written = now
        seconds, steps = now - self._first[1], step - self._first[0]
        rate = steps / seconds if seconds > 0 and steps > 0 else None
        try:
            values = {"step": step, "total": total, "steps_per_second": rate, "data_wait_share": self._data_wait}
            write_json(self.path, {**values, "time": time.time()})
        except OSError as error:  # a full disk must not end the arm for the sake of a progress bar
            log.debug("progress not written: %s", error)


class _Watched:
    """A recorder whose metrics others take note of on the way."""

    def __init__(self, recorder: Recorder, *notes: Callable[[Mapping[str, float]], None]) -> None:
        self._recorder, self._notes = recorder, notes
        self.flush, self.rewind = recorder.flush, recorder.rewind

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        for note in self._notes:
            note(values)
        self._recorder.metrics(step, values)


class Worker:
    """Works on arms of one setting until nothing waits or `stop` says so."""

    def __init__(
        self,
        arms: Mapping[str, FrozenArm],
        ledger: Ledger,
        options: GridOptions,
        *,
        workers: int = 1,
        train: Trainer | None = None,
        stop: Callable[[], bool] = lambda: False,
        log_path: str = "",
        prune: EpochPruner | None = None,
    ) -> None:
        self.arms = arms
        self.version = next((arm.version for arm in arms.values()), "")  # of the code, which is the same for all
        self.ledger = ledger
        self.options = options
        self.workers = workers
        self.stop = stop
        self.log_path = log_path
        self.prune = prune
        self.trained = 0
        self._train = train
        self._blocked: dict[str, float] = {}  # arms whose directory another process holds -> when to look again
        self._no_room = False  # an arm was given back because the disk is full
        self._memory = Room(options.cohort_size, self._available)
        self._unsaid: list[Callable[[], object]] = []  # what the ledger could not be told yet

    def work(self) -> int:
        """Claim and train until nothing waits; returns how many arms this worker completed."""
        try:
            while not self.stop():
                self._wait_for_room()
                claimed, waiting = self._next_patiently()
                if claimed:
                    self._cohort(claimed)
                elif waiting:
                    time.sleep(0.5)  # what waits is held by a process that lost it but still lives
                else:
                    break
        finally:
            self.ledger.close()
        return self.trained

    def _next(self) -> tuple[list[str], bool]:
        """Claimed arms of one cohort, and, where there are none, whether any waits."""
        self.ledger.reap_stale(list(self.arms))
        now = time.monotonic()
        free = [key for key in self.arms if self._blocked.get(key, 0.0) <= now]
        claimed = self.ledger.claim(free, self._memory.arms(), workers=self.workers, version=self.version)
        return claimed, not claimed and any(
            state.open_to(self.version) for state in self.ledger.arms(list(self.arms)).values()
        )

    def _available(self) -> int | None:
        from basd.training.device import choose_device
        from basd.training.memory import available_bytes

        return available_bytes(choose_device(self.options.device))

    def _next_patiently(self) -> tuple[list[str], bool]:
        """`_next`, asked again while the ledger does not answer: its server may be starting, its disk full for a while."""
        end, said = time.monotonic() + LEDGER_PATIENCE, ""
        while True:
            try:
                return self._next()
            except UserError as error:
                if time.monotonic() > end or self.stop():
                    raise
                if str(error) != said:
                    log.warning("%s (waiting)", error)
                said = str(error)
                time.sleep(LEDGER_PAUSE)

    def _wait_for_room(self) -> None:
        """After a full disk: a while, before arms are claimed that would be given back again."""
        if self._no_room:
            self._no_room = False
            log.warning("%s; trying again in %g s", DISK_FULL, FULL_DISK_PAUSE)
            end = time.monotonic() + FULL_DISK_PAUSE
            while time.monotonic() < end and not self.stop():
                time.sleep(0.2)

    def _cohort(self, keys: list[str]) -> None:
        """Train claimed arms; every one is complete, failed or given back afterwards."""
        locks: dict[str, FileLock] = {}
        journals: dict[str, Journal] = {}
        open_keys = set(keys)
        try:
            for key in keys:
                self._open(key, locks, journals, open_keys)
            for key in [key for key in keys if key in journals]:
                reason = self.prune.decided(key) if self.prune is not None else ""
                if reason:  # killed between the decision and its word to the ledger
                    open_keys.discard(key)
                    self._mark(key, journals[key], "pruned", {}, reason)
            cohort = [key for key in keys if key in journals and key in open_keys]
            if not cohort:
                return

            def finished(result: Any) -> None:
                if result.arm_key in open_keys:
                    open_keys.discard(result.arm_key)
                    self._no_room = self._no_room or result.reason == DISK_FULL
                    if result.reason == TOO_MANY_ARMS:
                        self._memory.crowded(len(cohort))
                    self._mark(result.arm_key, journals[result.arm_key], result.status, result.metrics, result.reason)

            bars = {key: Progress(self._directory(key)) for key in cohort}
            self._memory.begin()
            log.info("training %d arms: %s", len(cohort), ", ".join(cohort))
            try:
                train = self._train or load_trainer(self.options.trainer)
                results = train(
                    [self.arms[key] for key in cohort],
                    [self._directory(key) for key in cohort],
                    [
                        _Watched(journals[key], bars[key].measured, partial(self._memory.measured, key))
                        for key in cohort
                    ],
                    stop=self.stop,
                    owned=self.ledger.owned,
                    progress=lambda key, step, total: bars[key](step, total),
                    finished=finished,
                    **({"prune": self.prune} if self.prune is not None else {}),
                )
                for result in results:
                    finished(result)
            except PeerLostError:
                raise  # not the arms' fault: they are given back below
            except Exception as error:
                log.exception("the cohort failed")
                for key in sorted(open_keys & set(cohort)):
                    open_keys.discard(key)
                    self._mark(key, journals[key], "failed", {}, _sentence(error))
        finally:
            for key in sorted(open_keys):  # a trainer that said nothing, or an exit on the way
                self._mark(key, journals.get(key), "stopped", {}, "")
            for journal in journals.values():
                try:
                    journal.close()
                except OSError as error:
                    log.warning("%s: %s", journal.path, error)
            for lock in locks.values():
                lock.release()
            self._say()

    def _open(self, key: str, locks: dict[str, FileLock], journals: dict[str, Journal], open_keys: set[str]) -> None:
        """Take an arm's directory and journal, or settle the arm right away."""
        directory = self._directory(key)
        try:
            lock = FileLock(directory / "arm.lock")
            if not lock.acquire(0):
                log.warning("arm %s is still held by another process; looking again later", key)
                self._blocked[key] = time.monotonic() + 5.0
                open_keys.discard(key)
                self._tell(lambda: self.ledger.give_back(key))
                return
            locks[key] = lock
            event, version = last_event(directory), version_in(directory)
            replaced = version != "" and version == self.ledger.replaces.get(key)
            # killed between its journal's last line and the ledger
            if event is not None and event.end == "complete" and not replaced:
                open_keys.discard(key)
                self.trained += 1
                self._tell(lambda: self.ledger.complete(key, event.metrics, version))
                return
            prepare(self.arms[key], directory)
            journals[key] = Journal(directory)
        except OSError as error:
            open_keys.discard(key)
            if is_disk_full(error):
                self._no_room = True
                self._tell(lambda: self.ledger.give_back(key))
                return
            log.exception("arm %s could not start", key)
            reason = f"{directory} cannot be written ({error.strerror or error}); check permissions"
            self._tell(lambda: self.ledger.fail(key, reason, self.log_path))

    def _mark(self, key: str, journal: Journal | None, status: str, metrics: Mapping[str, float], reason: str) -> None:
        """Journal first, then the ledger."""
        if status == "stopped" and not self.ledger.owned(key):
            self._tell(lambda: self.ledger.give_back(key))  # lost: this only forgets the claim
            return
        if journal is not None:
            try:
                if status == "complete":
                    journal.end("complete", "", metrics)
                else:
                    journal.end("failed" if status == "failed" else "stopped", reason, metrics)
            except OSError as error:
                if is_disk_full(error):
                    # its end is written when it ends where there is room
                    self._no_room, status, reason = True, "stopped", DISK_FULL
                else:
                    log.exception("the journal of %s cannot be written", key)
                    status, reason = "failed", f"its journal cannot be written ({error.strerror or error})"
        if status == "complete":
            self.trained += 1
            self._tell(lambda: self.ledger.complete(key, metrics, self.arms[key].version))
        elif status == "pruned":
            self._tell(lambda: self.ledger.prune(key, reason))
        elif status == "failed":
            self._tell(lambda: self.ledger.fail(key, reason, self.log_path))
        else:
            self._tell(lambda: self.ledger.give_back(key))
        log.info("arm %s %s%s", key, status, f": {reason}" if reason else "")

    def _tell(self, action: Callable[[], object]) -> None:
        """Tell the ledger something; while it does not answer, training goes on and it is told later."""
        try:
            action()
        except UserError as error:
            log.warning("%s", error)
            self._unsaid.append(action)

    def _say(self) -> None:
        """Repeat what the ledger could not be told; raises when it stays silent."""
        for attempt in range(10):
            actions, self._unsaid = self._unsaid, []
            for action in actions:
                self._tell(action)
            if not self._unsaid:
                return
            time.sleep(min(2.0**attempt, 30.0))
        raise UserError(
            "The ledger could not be told what became of some arms; their journals are kept, run the same command again"
        )

    def _directory(self, key: str) -> Path:
        return self.options.arm_directory(self.arms[key].setting, key)


def _sentence(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


class Stop:
    """Becomes true on the first SIGTERM or SIGINT, or when the process that started this one is gone."""

    def __init__(self, parent: int | None = None) -> None:
        self.parent = parent
        self.asked = False  # by a signal: the second one ends the process
        self.told = False  # by another process or for its sake

    def __call__(self) -> bool:
        if not (self.asked or self.told) and self.parent is not None and os.getppid() != self.parent:
            log.warning("the process that started this worker is gone; giving back its arms")
            self.told = True
        return self.asked or self.told

    def ask(self) -> None:
        """Become true."""
        self.told = True

    def listen(self) -> None:
        """Install the signal handlers."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True


def log_name() -> str:
    """The file name of this process's log."""
    return f"worker-{socket.gethostname()}-{os.getpid()}.log"


def work_on(
    plan_path: Path | str,
    options: GridOptions,
    *,
    workers: int = 1,
    parent: int | None = None,
    log_path: str = "",
    mirror: bool = False,
) -> int:
    """Join the work on a saved plan (`basd worker`); returns how many arms this process completed.

    `mirror`: also send the plan's journals to MLflow, for a worker without a `basd grid` beside it.
    """
    from basd.grid.plan import Plan

    plan = Plan.load(Path(plan_path))
    stop = Stop(parent)
    stop.listen()
    ledger = Ledger.of(options, plan.setting)
    ledger.ensure(plan.arms.values(), {key: plan.labels_of(key) for key in plan.arms}, plan.name)
    worker = Worker(
        plan.arms,
        ledger,
        options,
        workers=workers,
        stop=stop,
        log_path=log_path,
        prune=pruner_of(plan, ledger, options),
    )
    if not mirror:
        return worker.work()
    from basd.grid.run import mirror_of

    following = mirror_of(plan, options, ledger).start()
    try:
        return worker.work()
    finally:
        if not following.drain():
            log.warning("not everything is in MLflow yet (%s); run `basd sync %s`", following.problem, plan.name)


def pruner_of(plan: Plan, ledger: Ledger, options: GridOptions) -> EpochPruner | None:
    """What leaves arms of a sweep's plan at the ends of epochs; None where nothing does."""
    if plan.sweep is None or not plan.sweep["trials"]:
        return None
    from basd.grid.pruning import EpochPruner

    def in_tables(key: str) -> bool:
        state = ledger.arms([key]).get(key)
        return state is not None and bool(set(state.labels) - {plan.name})

    return EpochPruner(plan.sweep, options.ledger_url, options.ledger_timeout, in_tables)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry of `python -m basd.grid.worker`. Exit status 0: nothing waits or it was asked to stop; 2: a UserError."""
    parser = argparse.ArgumentParser(prog="python -m basd.grid.worker", description=__doc__)
    parser.add_argument("--plan", required=True, help="a saved plan")
    parser.add_argument("--workers", type=int, default=1, help="how many workers share the arms")
    parser.add_argument("--parent", type=int, default=None, help="stop when this process is gone")
    parser.add_argument("--log-directory", default="", help="where this process's output is kept")
    parser.add_argument("--mirror", action="store_true", help="send the journals to MLflow as well")
    parser.add_argument("--leased", action="store_true", help="whoever started this process has handed it a GPU")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    log_path = str(Path(given.log_directory) / log_name()) if given.log_directory else ""
    try:
        options = GridOptions(**json.loads(os.environ.get(OPTIONS, "{}")))
        with nullcontext() if given.leased else leased(options, log.warning):
            work_on(
                given.plan,
                options,
                workers=given.workers,
                parent=given.parent,
                log_path=log_path,
                mirror=given.mirror,
            )
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while it waited for a GPU, where nothing was begun
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
