"""Small file tools shared by tracking and grid: locks that die with their process, and files that are whole or absent."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class FileLock:
    """An exclusive lock on a file. The kernel drops it when the process ends, however it ends; the file itself stays."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """True while this object holds the lock."""
        return self._descriptor is not None

    def fileno(self) -> int:
        """The descriptor of a held lock; a child that inherits it holds the lock as well, until both have closed it."""
        assert self._descriptor is not None, "the lock is not held"
        return self._descriptor

    def acquire(self, timeout: float | None = None) -> bool:
        """Take the lock; wait for ever (None) or `timeout` seconds (0: one try). Returns whether it is held."""
        if self.held:
            return True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        limit = None if timeout is None else time.monotonic() + timeout
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX if limit is None else fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self._descriptor, descriptor = descriptor, -1
                    return True
                except BlockingIOError:
                    if limit is None or time.monotonic() >= limit:
                        return False
                    time.sleep(0.02)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def release(self) -> None:
        """Give the lock back; does nothing when it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


@contextmanager
def file_lock(path: Path | str, timeout: float | None = None) -> Iterator[None]:
    """Hold the lock on `path` for a block; raises TimeoutError when it is not free within `timeout` seconds."""
    lock = FileLock(path)
    if not lock.acquire(timeout):
        raise TimeoutError(f"{path} stayed locked for {timeout} s")
    try:
        yield
    finally:
        lock.release()


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a file so that a reader sees the old or the new content, never half of it; `durable` also syncs it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any, *, durable: bool = False) -> None:
    """`write_text` of a JSON value."""
    write_text(path, json.dumps(value, ensure_ascii=False), durable=durable)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None when the file is absent, cut short or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
