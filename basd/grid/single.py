"""`basd train`: one arm, through the same ledger and worker as a grid's."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from basd.compose import Composed, compose, overridden_keys, setting_name, setting_words
from basd.config import FrozenArm, remarks, without_effect
from basd.errors import DISK_FULL, UserError
from basd.grid.display import Display, duration
from basd.grid.leases import leased
from basd.grid.ledger import Ledger
from basd.grid.options import GridOptions
from basd.grid.plan import freeze, prepare
from basd.grid.worker import Stop, Worker, load_trainer
from basd.grid.worker import prepare as prepare_directory
from basd.tracking.journal import Journal, last_event
from basd.tracking.mirror import Mirror, check_tracking, is_mirrored
from basd.training.device import check_device

if TYPE_CHECKING:
    from rich.console import Console


def frozen_arm(
    composed: Composed, overrides: Sequence[str], teacher_progress: Callable[[int, int], None] | None = None
) -> tuple[FrozenArm, list[str]]:
    """The arm that a command line, composed, describes, and notices about overrides that change nothing."""
    setting = setting_name(overrides)
    check_device(composed.config)
    notices = [*without_effect(composed.config, overridden_keys(overrides)), *remarks(composed.config)]
    return freeze(composed, setting, prepare(composed.config, teacher_progress), setting_words(overrides)), notices


def train_one(
    overrides: Sequence[str],
    *,
    screen: Console,
    again: bool = False,
    quiet: bool = False,
    teacher_progress: Callable[[int, int], None] | None = None,
) -> tuple[int, dict[str, float]]:
    """Train one arm and print its accuracies; returns the exit status and the arm's final metrics."""
    composed = compose(overrides)
    with leased(GridOptions.from_config(composed.config), lambda text: screen.print(text, markup=False)):
        return _train_here(composed, overrides, screen, again, quiet, teacher_progress)


def _train_here(
    composed: Composed,
    overrides: Sequence[str],
    screen: Console,
    again: bool,
    quiet: bool,
    teacher_progress: Callable[[int, int], None] | None,
) -> tuple[int, dict[str, float]]:
    """`train_one` on the device that this process has."""
    arm, notices = frozen_arm(composed, overrides, teacher_progress)
    options = GridOptions.from_config(arm.config)
    for notice in notices:
        screen.print(f"Note: {notice}.", markup=False)
    screen.print(f"{arm.name} seed={arm.seed} in {arm.setting} (arm {arm.arm_key})", markup=False)
    ledger = Ledger.of(options, arm.setting)
    if not again and ledger.exists:
        state = ledger.arms([arm.arm_key]).get(arm.arm_key)
        if state is not None and state.state == "complete":
            screen.print(
                f"Finished before: {_shown(state.metrics)}. `basd train --again …` repeats it under a new run.",
                markup=False,
            )
            _send_rest(arm, options, screen)
            return 0, state.metrics
    check_tracking(options.tracking_uri)
    display = Display(screen, arm.name, arm.total_steps, 1, quiet=quiet)
    mirror = Mirror(options.tracking_uri)
    began = time.monotonic()
    try:
        metrics, reason, stopped = (_repeat if again else _enqueued)(arm, options, ledger, mirror, display)
    finally:
        display.close()
    drained = mirror.drain(120.0)
    if not drained:
        screen.print(
            f"Not everything is in MLflow yet ({mirror.problem}); the journal is kept and sent by the next call.",
            markup=False,
        )
    if stopped:
        screen.print("Stopped after a checkpoint; run the same command again to go on.", markup=False)
        return 130, {}
    if reason:
        raise UserError(f"the arm failed: {reason}")
    screen.print(f"{_shown(metrics)} after {duration(time.monotonic() - began)}. Runs: mlflow ui", markup=False)
    return 0, metrics


def _send_rest(arm: FrozenArm, options: GridOptions, screen: Console) -> None:
    """What MLflow lacks of a finished arm, after an outage."""
    directory = options.arm_directory(arm.setting, arm.arm_key)
    if is_mirrored(directory, options.tracking_uri):
        return
    check_tracking(options.tracking_uri)
    mirror = Mirror(options.tracking_uri)
    mirror.add(directory, expected=1)
    if mirror.drain(120.0):
        screen.print("MLflow has everything now.", markup=False)
    else:
        screen.print(f"Not everything is in MLflow yet ({mirror.problem}).", markup=False)


def _shown(metrics: dict[str, float]) -> str:
    names = [name for name in ("val/top1", "test/top1") if name in metrics]
    return ", ".join(f"{name} {100 * float(metrics[name]):.2f} %" for name in names)


def _enqueued(
    arm: FrozenArm, options: GridOptions, ledger: Ledger, mirror: Mirror, display: Display
) -> tuple[dict[str, float], str, bool]:
    """Claim the arm and train it here; where another process has it, wait for that one."""
    stop = Stop()
    stop.listen()
    ledger.reap_stale([arm.arm_key])
    ledger.ensure([arm], {}, "", again=True)
    mirror.add(options.arm_directory(arm.setting, arm.arm_key), expected=1)
    mirror.start()

    def train(arms, directories, recorders, *, progress, **callbacks):
        def shown(key: str, step: int, total: int) -> None:
            progress(key, step, total)
            display.update(step, 0, 0)

        return load_trainer(options.trainer)(arms, directories, recorders, progress=shown, **callbacks)

    said = False
    while True:
        Worker({arm.arm_key: arm}, ledger, options, train=train, stop=stop).work()
        state = ledger.arms([arm.arm_key])[arm.arm_key]
        if state.state == "complete":
            return state.metrics, "", False
        if stop():
            return {}, "", True
        if state.state == "failed" and state.permanent:
            return {}, state.reason, False
        if state.state == "waiting" and state.closed_to(arm.version):
            return {}, f"it is to be trained again by other code than {arm.version}, which is installed here", False
        if state.state == "running" and not said:
            said = True
            display.say("Another process is training this arm; waiting for it (Ctrl-C leaves it alone).")
        time.sleep(1.0)
        ledger.reap_stale([arm.arm_key])


def _repeat(
    arm: FrozenArm, options: GridOptions, ledger: Ledger, mirror: Mirror, display: Display
) -> tuple[dict[str, float], str, bool]:
    """Train the arm in a directory and run of its own, outside the ledger."""
    stop = Stop()
    stop.listen()
    tag = f"again-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    directory = options.arm_directory(arm.setting, f"{arm.arm_key}-{tag}")
    directory.mkdir(parents=True)
    prepare_directory(dataclasses.replace(arm), directory)
    journal = Journal(directory)
    mirror.add(directory, expected=1, run_tag=tag)
    mirror.start()
    results = load_trainer(options.trainer)(
        [arm], [directory], [journal], stop=stop, progress=lambda _key, step, _total: display.update(step, 0, 0)
    )
    result = results[0]
    journal.end(result.status, result.reason, result.metrics)
    journal.close()
    assert last_event(directory) is not None
    failed = result.status == "failed" or result.reason == DISK_FULL
    return result.metrics, result.reason if failed else "", result.status == "stopped" and not failed
