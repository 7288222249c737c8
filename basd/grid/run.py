"""`basd grid`: enqueue what is missing, keep workers at it until everything is done, and say what came of it."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basd import distributed
from basd.errors import UserError
from basd.grid import leases
from basd.grid.display import Display, data_wait, steps_done
from basd.grid.finished import asked
from basd.grid.ledger import ArmState, Ledger
from basd.grid.options import GridOptions
from basd.grid.versions import is_leftover, stale_versions, trained_version
from basd.grid.workers import Workers
from basd.tracking.files import file_lock
from basd.tracking.journal import NAME as JOURNAL
from basd.tracking.mirror import Mirror, check_tracking, is_mirrored
from basd.tracking.mlflow_store import Store, sqlite_path

if TYPE_CHECKING:
    from rich.console import Console

    from basd.grid.plan import Plan

POLL = 0.5  # seconds between looks at the ledger
PATIENCE = 300.0  # seconds for workers to checkpoint after Ctrl-C


@dataclass(frozen=True)
class Failure:
    """Why an arm failed for good, and where its log lies."""

    reason: str
    log: str


@dataclass
class Outcome:
    """What became of a grid. Keys are arm keys of the plan."""

    complete: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    pruned: list[str] = field(default_factory=list)  # left by a sweep
    failed: dict[str, Failure] = field(default_factory=dict)
    trained: int = 0  # completed during this call, by any process
    stale: dict[str, int] = field(default_factory=dict)  # other code versions -> complete arms that each trained
    workers_started: int = 0
    worker_deaths: int = 0
    interrupted: bool = False
    mirrored: bool = True  # everything is in MLflow
    mirror_problem: str = ""
    wall_seconds: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)  # prepare, start, train, mirror

    @property
    def ok(self) -> bool:
        """Every arm of the plan is complete."""
        return not self.missing and not self.failed


def labels_of(plan: Plan) -> dict[str, list[str]]:
    """arm key -> names of the rows it serves."""
    return {key: list(plan.labels_of(key)) for key in plan.arms}


def mirror_of(plan: Plan, options: GridOptions, ledger: Ledger) -> Mirror:
    """A mirror that follows every arm of the plan that is not complete, or of which something is not in MLflow yet.

    What is here of an arm that was completed on another machine is no account of it, and is not followed.
    """
    mirror = Mirror(options.tracking_uri)
    states = ledger.arms()
    known = {state.key: state.configuration_key for state in states.values()}
    known |= {arm.arm_key: arm.configuration_key for arm in plan.arms.values()}
    seeds = Counter(known.values())
    for key, rows in labels_of(plan).items():
        directory, labels = options.arm_directory(plan.setting, key), {plan.name: ", ".join(rows)}
        complete = key in states and states[key].state == "complete"
        sent = complete and is_mirrored(directory, options.tracking_uri, labels)
        if not (sent or (complete and is_leftover(directory, states[key]))):
            mirror.add(directory, expected=seeds[plan.arms[key].configuration_key], labels=labels)
    return mirror


def run_grid(
    plan: Plan,
    options: GridOptions,
    *,
    only: Collection[str] | None = None,
    here: bool = False,
    untracked: bool = False,
    console: Console | None = None,
    quiet: bool = False,
    retrain_stale: bool = False,
) -> Outcome:
    """Train every arm of the plan that is not complete, however often this was interrupted before.

    `only`: of these arms. `here`: in this process instead of processes of their own. `untracked`: also where the tracking store
    does not answer at the beginning, as it may in the middle. `retrain_stale`: complete arms that other
    code trained are trained again, once. Several calls at once share the work.
    UserError when the ledger or the tracking store cannot be used.
    """
    whole, plan = plan, plan.only(only) if only is not None else plan
    if console is None:
        from rich.console import Console as RichConsole

        console = RichConsole()
    began = time.monotonic()
    ledger = Ledger.of(options, plan.setting)
    ledger.check()
    keys = list(plan.arms)
    states = ledger.arms(keys)
    before = {key for key, state in states.items() if state.state == "complete"}
    if not untracked and (len(before) < len(keys) or (retrain_stale and stale_versions(plan, options, states))):
        check_tracking(options.tracking_uri)
    plan_path = options.setting_directory(plan.setting) / "plans" / f"{plan.name}-{plan.hash}.json"
    whole.save(plan_path)
    ledger.reap_stale(keys)
    if retrain_stale:

        def trained_by(state: ArmState) -> str:
            return trained_version(state, options.arm_directory(plan.setting, state.key))

        anew = ledger.retrain(plan.arms.values(), labels_of(plan), plan.name, trained_by)
        before -= set(anew)
        for key in anew:  # the bar begins at nothing
            (options.arm_directory(plan.setting, key) / "progress.json").unlink(missing_ok=True)
    # what a sweep has left or seen fail stays so; a table wants it all the same
    ledger.ensure(plan.arms.values(), labels_of(plan), plan.name, again=plan.sweep is None)
    mirror = mirror_of(plan, options, ledger)
    outcome = Outcome(seconds={"prepare": time.monotonic() - began, "start": 0.0, "train": 0.0, "mirror": 0.0})
    if len(before) < len(keys):
        mirror.start()
        if here or distributed.world() > 1:
            _work_here(plan, options, ledger, outcome, console, quiet)
        else:
            try:
                _work(plan, options, ledger, plan_path, outcome, console, quiet)
            except UserError:
                mirror.close()
                raise
    _settle(plan, options, ledger, mirror, outcome, before)
    outcome.wall_seconds = time.monotonic() - began
    return outcome


def _work(
    plan: Plan, options: GridOptions, ledger: Ledger, plan_path: Path, outcome: Outcome, console: Console, quiet: bool
) -> None:
    """Keep workers running until every arm of the plan is complete or has failed for good."""
    workers = Workers(plan_path, options, options.setting_directory(plan.setting) / "logs")
    steps = sum(arm.total_steps for arm in plan.arms.values())
    display = Display(console, plan.name, steps, len(plan.arms), quiet=quiet)
    began = time.monotonic()
    try:
        with _terminations():
            try:
                _loop(plan, options, ledger, workers, display)
            except KeyboardInterrupt:
                outcome.interrupted = True
                _stop(plan, workers, display)
    finally:
        if len(workers):  # an error on the way: no worker is left behind
            workers.signal(signal.SIGTERM)
            if not workers.wait(PATIENCE):
                workers.signal(signal.SIGKILL)
        display.close()
        ledger.close()
    outcome.workers_started, outcome.worker_deaths = workers.started, workers.deaths
    ended = time.monotonic()
    first = display.first_progress or ended
    outcome.seconds["start"], outcome.seconds["train"] = first - began, ended - first


def _work_here(
    plan: Plan, options: GridOptions, ledger: Ledger, outcome: Outcome, console: Console, quiet: bool
) -> None:
    """Train in this process, which torchrun may have started with others, until every arm is complete or has failed for good."""
    from basd.grid.worker import Stop, Worker, load_trainer, pruner_of

    keys = list(plan.arms)
    display = Display(console, plan.name, sum(arm.total_steps for arm in plan.arms.values()), len(keys), quiet=quiet)
    stop = Stop()
    stop.listen()
    shown = [-POLL]

    def train(arms: Any, directories: Any, recorders: Any, *, progress: Any, **callbacks: Any) -> Any:
        def report(key: str, step: int, total: int) -> None:
            progress(key, step, total)
            if time.monotonic() - shown[0] >= POLL:
                shown[0] = time.monotonic()
                try:
                    states = ledger.arms(keys)
                except UserError:
                    return  # a ledger locked for a while: the display waits, training does not
                count = Counter(state.state for state in states.values())
                failed = sum(state.permanent for state in states.values())
                wait = data_wait(_running(plan, options, states))
                display.update(_steps(plan, options, states), count["complete"], failed, wait)

        return load_trainer(options.trainer)(arms, directories, recorders, progress=report, **callbacks)

    began = time.monotonic()
    outcome.workers_started = 1
    try:
        while not stop():
            prune = pruner_of(plan, ledger, options)
            Worker(plan.arms, ledger, options, train=train, stop=stop, prune=prune).work()
            ledger.reap_stale(keys)
            # arms that other workers have may come back
            states = ledger.arms(keys).values()
            if not any(state.state in ("running", "stale") or state.open_to(plan.version) for state in states):
                break
            time.sleep(POLL)
    finally:
        display.close()
        ledger.close()
    outcome.interrupted = stop()
    if outcome.interrupted:
        display.say(f"Stopped after a checkpoint. Run `{plan.command}` again to go on from here.")
    ended = time.monotonic()
    first = display.first_progress or ended
    outcome.seconds["start"], outcome.seconds["train"] = first - began, ended - first


def _loop(plan: Plan, options: GridOptions, ledger: Ledger, workers: Workers, display: Display) -> None:
    keys = list(plan.arms)
    trouble, leased = "", False
    while True:
        try:
            for sentence in workers.gone():
                display.say(f"Note: {sentence}")
            states = ledger.arms(keys)
            if any(
                state.state == "stale" or (state.state == "failed" and not state.permanent) for state in states.values()
            ):
                ledger.reap_stale(keys)
                states = ledger.arms(keys)
        except UserError as error:  # a ledger locked for a while must not end a long run; workers wait for it too
            if str(error) != trouble:
                display.say(f"{error} (waiting)")
            trouble = str(error)
            time.sleep(5 * POLL)
            continue
        count = Counter(state.state for state in states.values())
        failed = sum(state.permanent for state in states.values())
        wait = data_wait(_running(plan, options, states))
        display.update(_steps(plan, options, states), count["complete"] + count["pruned"], failed, wait)
        waiting = sum(state.open_to(plan.version) for state in states.values()) + count["failed"] - failed
        running = count["running"] + count["stale"]
        if not waiting and not running and not len(workers):
            return
        if workers.deaths > options.retries * workers.limit:
            if not running and not len(workers):
                display.say(f"No worker stays alive: {workers.last_death}")
                return
        elif waiting and len(workers) < min(workers.limit, waiting + running):
            try:
                workers.start()
                continue
            except leases.LeasedError as error:  # it starts one as soon as a device gets free
                if leases.names_device(options) and not len(workers):
                    raise
                if not len(workers) and not leased:
                    display.say(f"{error}; waiting for the first that gets free.")
                leased = True
        time.sleep(POLL)


def _stop(plan: Plan, workers: Workers, display: Display) -> None:
    """Ask the workers to checkpoint; a second Ctrl-C does not wait for them."""
    display.close()
    try:
        display.say("Stopping: the arms in training are being checkpointed (Ctrl-C again to leave at once).")
        workers.signal(signal.SIGTERM)
        gone = workers.wait(PATIENCE)
    except KeyboardInterrupt:
        gone = False
    if not gone:
        workers.signal(signal.SIGKILL)
        workers.wait(10.0)
    display.say(f"Stopped. Run `{plan.command}` again to go on from here.")


def _steps(plan: Plan, options: GridOptions, states: dict[str, ArmState]) -> int:
    """Arm-steps done so far, from the ledger and the arms' progress files."""
    done = 0
    for key, arm in plan.arms.items():
        state = states.get(key)
        if state is not None and (state.state in ("complete", "pruned") or state.permanent):
            done += arm.total_steps
        else:
            done += min(arm.total_steps, steps_done(options.arm_directory(plan.setting, key)))
    return done


def _running(plan: Plan, options: GridOptions, states: dict[str, ArmState]) -> list[Path]:
    """Directories of the arms in training."""
    keys = [key for key, state in states.items() if state.state == "running"]
    return [options.arm_directory(plan.setting, key) for key in keys]


def _settle(
    plan: Plan, options: GridOptions, ledger: Ledger, mirror: Mirror, outcome: Outcome, before: set[str]
) -> None:
    """Fill the outcome from the ledger and finish the mirror."""
    states = ledger.arms(list(plan.arms))
    for key in plan.arms:
        state = states.get(key)
        if state is not None and state.state == "complete":
            outcome.complete.append(key)
            if is_leftover(options.arm_directory(plan.setting, key), state):
                mirror.leave(options.arm_directory(plan.setting, key))
        elif state is not None and state.permanent:
            outcome.failed[key] = Failure(state.reason, state.log)
            mirror.conclude(options.arm_directory(plan.setting, key), "FAILED")
        elif state is not None and state.state == "pruned":
            outcome.pruned.append(key)
            mirror.conclude(options.arm_directory(plan.setting, key), "KILLED")
        else:
            outcome.missing.append(key)
            if state is None or state.state != "running":
                mirror.conclude(options.arm_directory(plan.setting, key), "KILLED")
    outcome.trained = len(set(outcome.complete) - before)
    outcome.stale = stale_versions(plan, options, states)
    began = time.monotonic()
    try:
        if mirror.pending():
            check_tracking(options.tracking_uri)  # an address that is dead now is not waited for
            outcome.mirrored = mirror.drain(15.0 if outcome.interrupted else 120.0)
            outcome.mirror_problem = mirror.problem
        else:
            mirror.drain(10.0)
        if outcome.mirrored:
            close_orphans(plan, options, states)
    except UserError as error:
        mirror.close()
        outcome.mirrored, outcome.mirror_problem = False, f"{error}; the results are kept, `basd sync` sends them later"
    except KeyboardInterrupt:
        mirror.close()
        outcome.interrupted, outcome.mirrored = True, not mirror.pending()
    outcome.seconds["mirror"] = time.monotonic() - began


def sync(plan: Plan, options: GridOptions, timeout: float = 600.0) -> Outcome:
    """`basd sync`: send what MLflow does not have yet; trains nothing."""
    check_tracking(options.tracking_uri)
    ledger = Ledger.of(options, plan.setting)
    outcome = Outcome()
    mirror = mirror_of(plan, options, ledger)
    states = ledger.arms(list(plan.arms))
    for key in plan.arms:
        state = states.get(key)
        if state is not None and state.state != "running":
            mirror.conclude(options.arm_directory(plan.setting, key), "FAILED" if state.permanent else "KILLED")
    outcome.complete = [key for key, state in states.items() if state.state == "complete"]
    outcome.mirrored = mirror.drain(timeout)
    outcome.mirror_problem = mirror.problem
    if outcome.mirrored:
        close_orphans(plan, options, states)
    return outcome


def close_orphans(plan: Plan, options: GridOptions, states: Mapping[str, ArmState]) -> list[str]:
    """End the MLflow runs of arms that nobody trains and whose journals are not here, for machines that never come back.

    What is told of an arm here is its mirror's business. Returns the arms' keys; UserError: MLflow cannot be written.
    """
    store = sqlite_path(options.tracking_uri)
    ended = {}
    for key in plan.arms:
        state, here = states.get(key), options.arm_directory(plan.setting, key) / JOURNAL
        if state is not None and state.state in ("waiting", "stale", "failed") and not here.exists():
            ended[key] = "FAILED" if state.permanent else "KILLED"
    if not ended or (store is not None and not store.exists()):
        return []

    def close() -> list[str]:
        with file_lock(options.setting_directory(plan.setting) / "mirror.lock"):
            return Store(options.tracking_uri, plan.setting).close_orphans(ended)

    return asked(options.tracking_uri, close)


@contextmanager
def _terminations() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does (only the main thread may set handlers)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
