"""What an epoch cost: throughput, waiting, load of the machine. For the log alone; nothing depends on it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass


@dataclass
class EpochClock:
    """Counts an epoch from `start` (perf_counter): seconds that waited for data, images, steps, arms of the last step."""

    start: float
    data: float = 0.0
    images: int = 0
    steps: int = 0
    arms: int = 1

    def metrics(self) -> dict[str, float]:
        elapsed = max(1e-9, time.perf_counter() - self.start)
        values = {"time/images_per_second": self.images / elapsed, "time/data_wait_share": self.data / elapsed}
        values["time/step_milliseconds"] = 1e3 * elapsed / max(1, self.steps)
        values["time/arms_in_cohort"] = float(self.arms)
        values.update(system_metrics())
        return values


def system_metrics() -> dict[str, float]:
    """CPU share and resident memory of this process, where psutil is installed."""
    try:
        import psutil
    except ImportError:
        return {}
    process = psutil.Process(os.getpid())
    return {
        "system/cpu_percent": psutil.cpu_percent(),
        "system/memory_rss_megabytes": process.memory_info().rss / 1e6,
    }
