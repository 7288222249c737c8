"""What training needs of a tracker; it is handed in, so that training imports none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Recorder(Protocol):
    """One arm's record. Events are appended in the same order on every repetition of the arm."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append the metrics of a step; may be buffered."""

    def flush(self) -> int:
        """Make everything durable; returns a position for `rewind`."""

    def rewind(self, position: int) -> None:
        """Forget everything recorded after a position (0: everything), because training goes back to it."""


class NullRecorder:
    """Records nothing."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def flush(self) -> int:
        return 0

    def rewind(self, position: int) -> None:
        pass
