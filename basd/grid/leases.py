"""GPU leases: on one machine each GPU is one worker's at a time.

A lease is a lock on a file that belongs to a device; the kernel frees it when the process that has it ends, however it ends.
Where `runtime.processes` asks for more workers than there are devices, each device has as many leases as that takes: such
workers share it with whoever came first. Processes that torchrun started share out the devices by themselves, without leases.
"""

from __future__ import annotations

import ctypes
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from basd.distributed import world
from basd.errors import UserError
from basd.tracking.files import FileLock, read_json

if TYPE_CHECKING:
    from basd.grid.options import GridOptions

POLL = 1.0  # seconds between looks for a free device
DIRECTORY = "BASD_LEASES"


@dataclass(frozen=True)
class Device:
    """A CUDA device of this machine."""

    entry: str  # what CUDA_VISIBLE_DEVICES calls it
    name: str  # its UUID, which is the same in every process and container; its number where there is no NVML


class LeasedError(UserError):
    """Other workers have every device that this one may use."""


class Lease:
    """One place on a device, held by this process or by a child that it was handed to."""

    def __init__(self, device: Device, lock: FileLock) -> None:
        self.device, self.lock = device, lock
        self.sign(os.getpid())

    def sign(self, pid: int) -> None:
        """Write down who has it. Into the file that is locked: another in its place would not be."""
        holder = f'{{"host": "{socket.gethostname()}", "pid": {pid}}}\n'
        try:
            self.lock.path.write_text(holder)
        except OSError:
            pass  # on a full disk nobody is named; the lock holds all the same

    def release(self) -> None:
        """Give it up, unless a child has it."""
        self.lock.release()


class _Process:
    """How many devices this process saw before CUDA_VISIBLE_DEVICES left it the one that it leased."""

    saw: int | None = None


def names_device(options: GridOptions) -> bool:
    """Whether the user named a device by its number, which is used and no other."""
    return re.fullmatch(r"cuda:\d+", options.device) is not None


def take(options: GridOptions) -> Lease | None:
    """A lease on a free device of those that these options may use; None where none is needed. `LeasedError`: all are taken."""
    places = _places(options)
    for device, path in places:
        lock = FileLock(path)
        if lock.acquire(0):
            return Lease(device, lock)
    if not places:
        return None
    holders = ", ".join(_holder(path) for _, path in places)
    if names_device(options):
        raise LeasedError(
            f"runtime.device={options.device} is leased by {holders}; wait until that ends, or let runtime.device=cuda take a "
            "GPU that is free."
        )
    raise LeasedError(f"Every GPU here is leased, by {holders}")


@contextmanager
def leased(options: GridOptions, say: Callable[[str], object]) -> Iterator[None]:
    """Hold a GPU for a block, where these options use one: to be entered before anything initialises CUDA.

    CUDA then sees that device alone, also after the block. Where other workers have all of them, `say` is told so and the
    first that gets free is taken; a device that the user named is not waited for.
    """
    said = False
    while True:
        try:
            lease = take(options)
            break
        except LeasedError as error:
            if names_device(options):
                raise
            if not said:
                say(
                    f"{error}; waiting for the first that gets free (a larger runtime.processes has workers share them)."
                )
            said = True
        time.sleep(POLL)
    if lease is not None and not names_device(options):
        _Process.saw = _Process.saw or len(visible_devices())
        os.environ["CUDA_VISIBLE_DEVICES"] = lease.device.entry
    try:
        yield
    finally:
        if lease is not None:
            lease.release()


def visible_devices() -> list[Device]:
    """The CUDA devices that this process may use, in CUDA's order."""
    names = machine_devices()
    entries = os.environ.get("CUDA_VISIBLE_DEVICES")
    if entries is None:
        return [Device(name, name) for name in names]
    found: list[Device] = []
    for entry in (text.strip() for text in entries.split(",") if names):
        if entry.isdigit():
            matching = names[int(entry) :][:1]
        elif entry.startswith("MIG-"):
            matching = [entry]
        else:
            matching = [name for name in names if entry and name.startswith(entry)]
        if len(matching) != 1:
            break  # as CUDA does: what follows an entry that means no device is not seen
        found.append(Device(entry, matching[0]))
    return found


def machine_devices() -> list[str]:
    """Names of this machine's CUDA devices, without initialising CUDA: afterwards CUDA_VISIBLE_DEVICES changes nothing."""
    import torch

    if not torch.backends.cuda.is_built():
        return []
    try:
        # NVML's, as torch reads them: nvidia-smi without a process, and no package more
        uuids: list[str] | None = torch.cuda._raw_device_uuid_nvml()
    except (OSError, AttributeError):
        uuids = None
    return uuids if uuids is not None else [str(number) for number in range(_count_in_a_child())]


@lru_cache(maxsize=1)
def _count_in_a_child() -> int:
    """How many devices there are where NVML is not (Jetson, ROCm); counting them initialises CUDA, in a process that ends."""
    import torch

    if torch.version.hip is None:
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            return 0  # no driver, as on every machine without a GPU: no child is worth its seconds
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    counted = subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()
    return int(counted) if counted.isdigit() else 0


def _places(options: GridOptions) -> list[tuple[Device, Path]]:
    """Every lease that may be taken, the first of each device before the second of any."""
    if options.device == "cpu" or world() > 1:
        return []
    devices = visible_devices()
    shared_by = _Process.saw or len(devices)
    if names_device(options):
        devices = devices[int(options.device.removeprefix("cuda:")) :][:1]
        shared_by = 1
    if not devices:
        return []
    folder = _directory()
    slots = max(1, math.ceil(options.processes / shared_by))
    return [(device, folder / f"{device.name.replace('/', '-')}.{slot}") for slot in range(slots) for device in devices]


def _directory() -> Path:
    """Where the leases of this user lie on this machine."""
    chosen = os.environ.get(DIRECTORY)
    folder = Path(chosen) if chosen else Path(tempfile.gettempdir()) / f"basd-leases-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # in a folder that everybody writes to, somebody else may have made it
        usable = folder.is_dir() and os.access(folder, os.W_OK) and (chosen or folder.lstat().st_uid == os.getuid())
    except OSError:
        usable = False
    if not usable:
        raise UserError(f"GPU leases cannot be written to {folder}; set {DIRECTORY} to a directory of yours.")
    return folder


def _holder(path: Path) -> str:
    holder = read_json(path) or {}
    return f"process {holder['pid']} on {holder['host']}" if {"pid", "host"} <= holder.keys() else "another process"
