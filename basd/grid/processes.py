"""Who owns an arm, and whether that process is still alive."""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Owner:
    """A process, told apart from every other one: on other hosts, after a reboot, or with a process id used twice."""

    host: str
    boot: str  # changes when the machine restarts
    space: str  # process ids mean nothing outside their namespace (containers)
    pid: int
    start: int  # when the process started, on a clock that nobody sets
    worker: str  # two ledgers in one process are two owners

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able dict."""
        return asdict(self)


def this_process() -> Owner:
    """A fresh owner for the running process."""
    pid = os.getpid()
    started = process_start(pid)
    return Owner(socket.gethostname(), _boot(), _space(), pid, started or 0, uuid.uuid4().hex[:12])


def is_alive(owner: dict[str, Any], one_machine: bool) -> bool | None:
    """Whether an owner's process lives; None when that cannot be told from here.

    `one_machine`: the ledger is a file, so that the same host name with another boot id is this machine before a restart.
    """
    if owner.get("host") != socket.gethostname():
        return None
    if owner.get("boot") != _boot():
        return False if one_machine else None
    if owner.get("space") != _space():
        return None
    started = process_start(int(owner.get("pid", -1)))
    return started is not None and abs(started - int(owner.get("start", 0))) <= _TOLERANCE


_TOLERANCE = 0 if Path("/proc/self/stat").exists() else 2


def process_start(pid: int) -> int | None:
    """When a process started (clock ticks after boot on Linux, else seconds); None when it does not live or is a zombie."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else int(fields[19])
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else int(process.create_time())
    except psutil.Error:
        return None


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return str(int(psutil.boot_time()) // 60)


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
