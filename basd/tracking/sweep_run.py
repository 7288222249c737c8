"""A sweep's own MLflow run, above the runs of the configurations that it tried: values by trial, report and figures."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from basd.tracking.files import file_lock
from basd.tracking.mlflow_store import Store
from basd.tracking.published import publish_run

STUDY = "basd.sweep_study"
PARENT = "mlflow.parentRunId"


def publish_sweep(
    uri: str,
    setting: str,
    lock: Path,
    *,
    name: str,
    study: str,
    description: str,
    params: Mapping[str, str],
    points: Mapping[str, Mapping[int, float]],
    configurations: Collection[str],
    files: Sequence[Path],
    finished: bool,
) -> str:
    """Bring the run of a sweep up to date and return its id; what it has already is not sent again.

    `points`: metric → trial → value; a point's step is the number of its trial. `configurations`: keys of those that were
    tried; their runs are put below the sweep's, unless they stand below another one. `lock`: held meanwhile, so that of
    several processes one makes the run.
    """
    now = time.time_ns() // 1_000_000
    with file_lock(lock):
        store = Store(uri, setting)
        run_id = publish_run(
            store,
            (STUDY, study),
            name=f"sweep {name}",
            description=description,
            tags={"basd.sweep": name},
            params=params,
            files={(f"figures/{f.name}" if f.suffix in (".png", ".pdf") else f.name): f.read_bytes() for f in files},
        )
        for metric, values in points.items():
            known = {point.step for point in store.client.get_metric_history(run_id, metric)}
            store.log_all(run_id, [(metric, value, now, step) for step, value in values.items() if step not in known])
        for key in configurations:
            for run in store.runs(basd__configuration_key=key):
                if "basd.arm_key" not in run.data.tags and PARENT not in run.data.tags:
                    store.tag(str(run.info.run_id), {PARENT: run_id})
        if finished:
            store.close(run_id, "FINISHED", now)
        return run_id
