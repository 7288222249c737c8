"""`basd bench analysis`: reading the arms of a table of 10,000 runs beside `mlflow.search_runs` on the same store."""

from __future__ import annotations

import math
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from basd.benchmarks.timing import Ratio, Report, alternate, device_name
from basd.errors import UserError
from basd.tracking.mlflow_store import Store
from basd.tracking.runs import open_runs

RUNS = 10_000
SEEDS = 5
TABLE = "bench"
SETTING = "bench-setting"
PARTS = ("rsd", "rel", "attn", "logit")
METRICS = (
    *("train/loss", "train/ce", "train/lr", "train/grad_norm", "val/top1", "test/top1", "test/top5", "test/nll", "test/ece"),
    *(f"{what}/{part}" for what in ("loss", "weight") for part in PARTS),
    *("selector/entropy", "time/images_per_second", "time/data_wait_share"),
)  # fmt: skip
PARAMS = (
    *("data", "teacher", "student", "recipe", "method", "selector", "token_aligner", "head_aligner", "weighting", "warmup"),
    *("mixing", "views", "points", "lr", "batch_size", "duration", "weight_decay", "ema_decay", "clip_grad", "seed"),
)  # fmt: skip
_ENDED = 1_700_000_000_000


def run(overrides: Sequence[str], repeats: int, load: Callable[..., Any], runs: int = RUNS) -> Report:
    """`load` (`analysis.load`, handed in) and `mlflow.search_runs`, both to a frame, in turn; their values must agree."""
    if overrides:
        raise UserError(f"basd bench analysis has no settings, so {overrides[0]} does nothing; leave it out.")
    import mlflow

    before = mlflow.get_tracking_uri()
    with tempfile.TemporaryDirectory(prefix="basd-bench-") as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        experiment = write_store(Path(folder) / "mlflow.db", runs)
        frames: dict[str, Any] = {}

        def ours() -> None:
            frames["ours"] = load(TABLE, tracking_uri=uri)

        def theirs() -> None:
            frames["theirs"] = mlflow.search_runs([experiment])

        mlflow.set_tracking_uri(uri)
        try:
            device = torch.device("cpu")
            times = alternate({"analysis.load": ours, "mlflow.search_runs": theirs}, repeats, device)
            reader = open_runs(uri)
            reader.close()
        finally:
            mlflow.set_tracking_uri(before)
    _agree(frames["ours"], frames["theirs"])
    ratio = times.ratio(lambda at: at["mlflow.search_runs"] / at["analysis.load"])
    settings = {
        "runs": runs,
        "metrics of a run": len(METRICS),
        "params": len(PARAMS),
        "reader": type(reader).__name__,
        "overrides": [],
    }
    ratios = (Ratio("mlflow.search_runs ÷ analysis.load", ratio, "≥ 10"),)
    return Report("analysis", device_name(device), settings, times.measures(), ratios)


def _agree(ours: Any, theirs: Any) -> None:
    """What was timed is the same: every run, and every metric to the last bit."""
    same = sorted(ours["run_id"]) == sorted(theirs["run_id"])
    if same:
        theirs = theirs.set_index("run_id").loc[list(ours["run_id"])]
        same = all(list(ours[name]) == list(theirs[f"metrics.{name}"]) for name in METRICS)
    assert same, "analysis.load and mlflow.search_runs read different values"


def write_store(path: Path, runs: int) -> str:
    """A tracking store whose tables MLflow made and that holds `runs` finished arms, SEEDS a row; returns its experiment's number.

    Rows of the tables are written directly, with the names that BASD uses; each metric has its last point only.
    """
    experiment = Store(f"sqlite:///{path}", SETTING).experiment
    with sqlite3.connect(path) as database:

        def insert(table: str, columns: str, rows: Iterator[tuple[Any, ...]]) -> None:
            places = ", ".join("?" * len(columns.split(",")))
            database.executemany(f"INSERT INTO {table} ({columns}) VALUES ({places})", rows)

        ids = [f"{number:032x}" for number in range(runs)]
        constant = ("LOCAL", "basd", "basd", "FINISHED", "active", "")
        insert(
            "runs",
            "source_type, source_name, user_id, status, lifecycle_stage, artifact_uri, "
            "run_uuid, experiment_id, name, start_time, end_time",
            ((*constant, run, experiment, _name(i), _ENDED + i, _ENDED + i + 1) for i, run in enumerate(ids)),
        )
        tags = ((run, key, value) for i, run in enumerate(ids) for key, value in _tags(i).items())
        insert("tags", "run_uuid, key, value", tags)
        params = ((run, key, f"{key}-{i // SEEDS % 7}") for i, run in enumerate(ids) for key in PARAMS)
        insert("params", "run_uuid, key, value", params)
        for table in ("metrics", "latest_metrics"):
            points = (
                (run, key, math.sin(i * len(METRICS) + k), _ENDED + i, 1000, False)
                for i, run in enumerate(ids)
                for k, key in enumerate(METRICS)
            )
            insert(table, "run_uuid, key, value, timestamp, step, is_nan", points)
    database.close()
    return experiment


def _name(number: int) -> str:
    return f"row {number // SEEDS} seed={number % SEEDS}"


def _tags(number: int) -> dict[str, str]:
    row, seed = divmod(number, SEEDS)
    return {
        "mlflow.runName": _name(number),
        "mlflow.source.name": "basd",
        "mlflow.source.type": "LOCAL",
        "mlflow.user": "basd",
        "mlflow.parentRunId": f"{row:032x}",
        "basd.configuration_key": f"{row:016x}",
        "basd.arm_key": f"{number:016x}",
        "basd.seed": str(seed),
        "basd.version": "abc1234",
        "basd.cohort": f"{seed:016x}",
        f"basd.ablation.{TABLE}": f"row {row}",
    }
