"""`torchrun … -m basd train|grid …`: the first process runs the command, the others train along.

The first process alone has the ledger, journals, MLflow, checkpoints and the screen. The others wait for a cohort, get its
arms from it, train their rows of the same batches, and wait for the next, until it says that the command has ended.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from basd import distributed
from basd.config import FrozenArm


class Silent:
    """The recorder of a process that reports nothing."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Forget them."""

    def flush(self) -> int:
        """No position."""
        return 0

    def rewind(self, position: int) -> None:
        """Nothing to take back."""


class _Asked:
    """True from the first SIGTERM or SIGINT on; the second one ends the process."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def __call__(self) -> bool:
        return self.asked

    def _on_signal(self, number: int, frame: object) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True


def together(command: Callable[[], int]) -> int:
    """Run `command` on the first process while the others follow; every one returns its exit status.

    `command` trains through `train_cohort` and reports its own errors. To be called by every process that torchrun started.
    """
    distributed.start()
    try:
        if distributed.rank() > 0:
            return _follow()
        status = 1
        try:
            status = command()
        finally:
            _dismiss(status)
        return status
    finally:
        distributed.stop()


def announce(arms: Sequence[FrozenArm]) -> None:
    """The first process tells the others what is trained next."""
    distributed.broadcast(("train", [arm.to_dict() for arm in arms]), patient=True)


def _dismiss(status: int) -> None:
    try:
        distributed.broadcast(("end", status), patient=True)
    except distributed.PeerLostError:
        pass  # nobody is left to be told


def _follow() -> int:
    """Train what the first process announces until it says that there is no more; returns the status it ends with."""
    from basd.training.cohort import train_announced

    stop = _Asked()
    # what happens to all is said by the first process
    logging.getLogger("basd").setLevel(logging.CRITICAL)
    while True:
        try:
            nothing: tuple[str, Any] = ("", None)
            word, value = distributed.broadcast(nothing, patient=True)
            if word == "end":
                return int(value)
            arms = [FrozenArm.from_dict(values) for values in value]
            here = Path(os.devnull)
            train_announced(arms, [here] * len(arms), [Silent() for _ in arms], stop=stop)
        except distributed.PeerLostError as error:
            print(f"basd: {error}", file=sys.stderr)
            return 1
        except Exception:
            continue  # raised on every process: the first one says it
