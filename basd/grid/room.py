"""How many arms a worker takes at a time: what is allowed, less where memory was not enough or will not be.

What an arm needs is known once it has made a step: no estimate from its settings knows the activations of every loss. So the
first cohort is as large as allowed; the arms that find no room leave it within a step or two and cost nothing but that; and
what the others held bounds the cohorts that follow.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

log = logging.getLogger("basd.worker")


class Room:
    """The memory that a worker has for arms. `available`: bytes that its process could hold, None where unknown."""

    def __init__(self, allowed: int, available: Callable[[], int | None]) -> None:
        self.most = allowed
        self._available = available
        self._peak = 0.0
        self._held: dict[str, float] = {}  # megabytes that each arm of the last cohort holds between steps
        self._said = allowed

    def begin(self) -> None:
        """Another cohort begins: what is measured from now on is its own."""
        self._peak, self._held = 0.0, {}

    def measured(self, key: str, values: Mapping[str, float]) -> None:
        """Take note of what an arm holds, and of the peak of its cohort, from the metrics of an epoch's end."""
        if "system/held_megabytes" in values and "system/peak_megabytes" in values:
            self._held[key] = values["system/held_megabytes"]
            self._peak = max(self._peak, values["system/peak_megabytes"])

    def crowded(self, arms: int) -> None:
        """A cohort of so many arms, two at least, did not fit: half as many from now on, so that in the end one is alone."""
        fewer = max(1, arms // 2)
        if fewer < self.most:
            self.most = fewer
            log.warning("memory is not enough for %d arms side by side; taking at most %d from now on", arms, fewer)

    def arms(self) -> int:
        """How many arms to claim: at least one."""
        available = self._available() if self._held else None
        largest = max(self._held.values(), default=0.0)
        if available is None or not largest:
            return self.most
        shared = self._peak - sum(self._held.values())
        arms = max(1, min(self.most, int((available / 1e6 - shared) // largest)))
        if arms < min(self.most, self._said):
            log.warning("free memory has room for %d arms side by side; taking no more", arms)
        self._said = arms
        return arms
