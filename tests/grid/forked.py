"""Other processes for the tests: forked, so that everything is imported already, and killed for real."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

fork = multiprocessing.get_context("fork")


def kill_this_process(*_: Any) -> None:
    """End as a crash does: nothing is closed or said."""
    os.kill(os.getpid(), signal.SIGKILL)


def start(work: Callable[..., Any], *arguments: Any) -> BaseProcess:
    """Call a function in another process, which Ctrl-C interrupts even if the tests run in the background."""

    def run() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work(*arguments)

    process = fork.Process(target=run, daemon=True)
    process.start()
    return process


def killed_in(work: Callable[..., Any], *arguments: Any) -> None:
    """Call a function that kills its process, and wait for its end."""
    process = start(work, *arguments)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def at_once(count: int, work: Callable[[], Any]) -> list[Any]:
    """What `work` returns in each of `count` processes that start together."""
    ready = fork.Barrier(count)

    def tell(there: Any) -> None:
        ready.wait(60)
        there.send(work())

    pipes = [fork.Pipe(duplex=False) for _ in range(count)]
    processes = [start(tell, there) for _, there in pipes]
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * count
    return [here.recv() for here, _ in pipes]
