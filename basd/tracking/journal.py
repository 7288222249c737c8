"""The journal of one arm: an append-only file of JSON lines that holds everything the arm reported.

    {"i": 0, "t": 1700000000000, "step": 1, "metrics": {"train/loss": 2.3}}
    {"i": 1, "t": 1700000000500, "end": "complete", "reason": "", "metrics": {"test/top1": 0.71}}

`i` counts lines from 0, `t` is Unix time in milliseconds. JSON has no infinities, so a value that is not finite is written as
"nan", "inf" or "-inf". A line cut short by a crash is dropped when the journal is opened again.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

NAME = "journal.jsonl"
End = Literal["complete", "failed", "stopped"]


@dataclass(frozen=True)
class Event:
    """One line of a journal. `end` is "" for metrics; `next` is the byte position after the line."""

    index: int
    milliseconds: int
    step: int
    metrics: dict[str, float] = field(default_factory=dict)
    end: str = ""
    reason: str = ""
    next: int = 0


class Journal:
    """Writes the journal of one arm; it is the `Recorder` that training is handed."""

    def __init__(self, directory: Path | str) -> None:
        self.path = Path(directory) / NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._buffer: list[bytes] = []
        self._file = open(self.path, "ab")  # noqa: SIM115 - kept open as long as the arm trains
        self._count = 0
        self._end_at: int | None = None  # where the closing line starts, if there is one
        self._position = 0
        self._scan()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append values that belong to `step`; kept in memory until `flush`."""
        if self._end_at is not None:  # the arm goes on: an end that was not the end is taken back
            self.rewind(self._end_at)
        self._append({"step": int(step), "metrics": _encode(values)})

    def flush(self) -> int:
        """Put everything on disk and return the journal's length in bytes."""
        if self._buffer:
            data = b"".join(self._buffer)
            try:
                self._file.write(data)
                self._file.flush()
                os.fsync(self._file.fileno())
            except OSError:  # disk full: drop what was half written, so that the next flush starts on a whole line
                self._reopen(self._position)
                raise
            self._buffer.clear()
            self._position += len(data)
        return self._position

    def rewind(self, position: int) -> None:
        """Drop everything after `position` (from an earlier `flush`; 0 is a fresh start)."""
        self._buffer.clear()
        if position > self._position:
            raise ValueError(
                f"{self.path} is {self._position} bytes long, shorter than the {position} its checkpoint knows"
            )
        self._reopen(position)
        self._scan()
        if self._position != position:
            raise ValueError(f"byte {position} of {self.path} is not the end of a line")

    def end(self, status: End, reason: str = "", metrics: Mapping[str, float] | None = None) -> None:
        """Close the arm's account: "complete", "failed" (with the reason) or "stopped" (given back, goes on later)."""
        if self._end_at is not None:
            self.rewind(self._end_at)
        self.flush()
        start = self._position
        self._append({"end": status, "reason": reason, "metrics": _encode(metrics or {})})
        self.flush()
        self._end_at = start

    def close(self) -> None:
        """Flush and close the file."""
        if not self._file.closed:
            try:
                self.flush()
            finally:
                self._file.close()

    def _append(self, fields: dict[str, Any]) -> None:
        line = json.dumps({"i": self._count, "t": time.time_ns() // 1_000_000, **fields}, ensure_ascii=False)
        self._buffer.append(line.encode() + b"\n")
        self._count += 1

    def _reopen(self, position: int) -> None:
        try:
            self._file.close()
        except OSError:
            pass  # close flushes what the disk had no room for; it is cut off below
        os.truncate(self.path, position)
        self._file = open(self.path, "ab")  # noqa: SIM115 - kept open as long as the arm trains
        os.fsync(self._file.fileno())

    def _scan(self) -> None:
        """Count whole lines and cut off a torn one."""
        self._count, self._end_at, self._position = 0, None, 0
        for event in read_events(self.path):
            self._end_at = self._position if event.end else None
            self._count, self._position = event.index + 1, event.next
        if self.path.stat().st_size > self._position:
            self._reopen(self._position)


def read_events(path: Path, position: int = 0) -> Iterator[Event]:
    """The whole lines of a journal from a byte position on; stops at a line that is torn or no event."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        file.seek(position)
        for line in file:
            position += len(line)
            event = _parse(line, position) if line.endswith(b"\n") else None
            if event is None:
                return
            yield event


def last_event(directory: Path | str) -> Event | None:
    """The last whole line of a directory's journal, read from the file's tail."""
    path = Path(directory) / NAME
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            for tail in (1 << 16, size):
                start = max(0, size - tail)
                file.seek(start)
                data = file.read()
                lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)[1 if start else 0 :]
                if lines:
                    return _parse(lines[-1], start + data.rfind(b"\n") + 1)
    except FileNotFoundError:
        pass
    return None


def _parse(line: bytes, end: int) -> Event | None:
    try:
        raw = json.loads(line)
        metrics = {str(name): float(value) for name, value in raw.get("metrics", {}).items()}
        return Event(
            index=int(raw["i"]),
            milliseconds=int(raw["t"]),
            step=int(raw.get("step", 0)),
            metrics=metrics,
            end=str(raw.get("end", "")),
            reason=str(raw.get("reason", "")),
            next=end,
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _encode(values: Mapping[str, float]) -> dict[str, float | str]:
    numbers = {name: float(value) for name, value in values.items()}
    return {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}
