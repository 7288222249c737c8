"""Loading from a real MLflow database in SQLite."""

from __future__ import annotations

import math
import shutil
import socket
import sqlite3
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

import analysis
from basd.errors import UserError

TAG = "basd.ablation.losses"


class Store:
    """A tracking database with the names of BASD."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uri = f"sqlite:///{path}"
        self.client = MlflowClient(tracking_uri=self.uri)
        self.experiments: dict[str, str] = {}

    def arm(self, rows: str, seed: int, *, setting: str = "digits", value: float = 0.5, **changes: object) -> str:
        if setting not in self.experiments:
            self.experiments[setting] = self.client.create_experiment(setting)
        key = str(changes.get("key", f"c-{rows.split(',')[0]}"))
        tags = {
            "basd.arm_key": f"{key}-{seed}",
            "basd.configuration_key": key,
            "basd.seed": str(seed),
            "basd.version": "abc1234",
            str(changes.get("tag", TAG)): rows,
            **changes.get("tags", {}),  # type: ignore[dict-item]
        }
        start = int(changes.get("start", 1000))  # type: ignore[call-overload]
        run: str = self.client.create_run(self.experiments[setting], start_time=start, tags=tags).info.run_id
        self.client.log_metric(run, "test/top1", value, step=int(changes.get("step", 10)))  # type: ignore[call-overload]
        if status := str(changes.get("status", "FINISHED")):
            self.client.set_terminated(run, status)
        return run


@pytest.fixture
def empty(store: Path, tmp_path: Path) -> Path:
    """A copy of an empty database."""
    return Path(shutil.copy(store, tmp_path / "mlflow.db"))


@pytest.fixture
def runs(empty: Path) -> Store:
    return Store(empty)


def test_arms_rows_and_columns(runs: Store) -> None:
    shared = runs.arm("basd, complete", 1, value=0.75)
    runs.arm("basd,complete", 0, value=0.25)
    runs.arm("ce", 0, status="FAILED")
    parent = runs.client.create_run(runs.experiments["digits"], tags={TAG: "basd", "basd.configuration_key": "c-basd"})
    frame = analysis.load("losses", tracking_uri=runs.uri)
    assert list(frame.columns) == [
        "row", "seed", "run_id", "arm_key", "configuration_key", "version", "status", "test/top1",
    ]  # fmt: skip
    assert list(zip(frame["row"], frame["seed"], frame["test/top1"], frame["status"], strict=True)) == [
        ("basd", 0, 0.25, "FINISHED"),
        ("basd", 1, 0.75, "FINISHED"),
        ("ce", 0, 0.5, "FAILED"),
        ("complete", 0, 0.25, "FINISHED"),
        ("complete", 1, 0.75, "FINISHED"),
    ]
    assert frame["run_id"].tolist()[1] == frame["run_id"].tolist()[4] == shared
    assert parent.info.run_id not in set(frame["run_id"])
    assert frame.attrs == {"ablation": "losses", "setting": "digits", "warnings": []}


def test_no_page_is_lost(runs: Store) -> None:
    for seed in range(7):
        runs.arm("basd", seed, start=1000 + seed // 3)
    assert analysis.load("losses", tracking_uri=runs.uri, page_size=2)["seed"].tolist() == list(range(7))
    assert len(analysis.load("losses", tracking_uri=runs.uri, page_size=7)) == 7


def test_runs_beside_the_ledger_and_deleted_ones_are_left_out(runs: Store) -> None:
    kept = runs.arm("basd", 0)
    for tag in ("basd.again", "basd.superseded", "basd.run"):
        runs.arm("basd", 0, start=1, tags={tag: "true"})
    runs.client.delete_run(runs.arm("basd", 0, start=2))
    frame = analysis.load("losses", tracking_uri=runs.uri)
    assert frame["run_id"].tolist() == [kept] and frame.attrs["warnings"] == []


def test_of_duplicates_the_first_finished_is_kept_and_it_is_said(runs: Store) -> None:
    runs.arm("basd", 0, start=1, status="FAILED")
    runs.arm("basd", 0, start=3)
    kept = runs.arm("basd", 0, start=2)
    runs.arm("basd", 1, start=1, status="FAILED")
    running = runs.arm("basd", 1, start=2, status="")
    frame = analysis.load("losses", tracking_uri=runs.uri)
    assert frame["run_id"].tolist() == [kept, running]
    assert [w.split(";")[0] for w in frame.attrs["warnings"]] == [
        "Row 'basd', seed 0: 3 runs, 2 of them finished",
        "Row 'basd', seed 1: 2 runs, 0 of them finished",
    ]


def test_the_setting_is_chosen_when_there_are_several(runs: Store) -> None:
    runs.arm("basd", 0, setting="small")
    runs.arm("basd", 1, setting="large")
    with pytest.raises(UserError, match="setting=NAME out of large, small"):
        analysis.load("losses", tracking_uri=runs.uri)
    assert analysis.load("losses", tracking_uri=runs.uri, setting="large")["seed"].tolist() == [1]
    with pytest.raises(UserError, match="in setting 'huge'; the settings that have some: large, small"):
        analysis.load("losses", tracking_uri=runs.uri, setting="huge")
    with pytest.raises(UserError, match="No runs of 'main' .*basd grid main"):
        analysis.load("main", tracking_uri=runs.uri)


def test_with_cells_arms_are_found_by_key_whatever_their_tags(runs: Store) -> None:
    """Trained for another table, they carry only its tag; a former configuration keeps this table's tag."""
    mine = runs.arm("x", 0, key="k1", tag="basd.ablation.main")
    runs.arm("x", 1, key="k1", tag="basd.ablation.main")
    runs.arm("basd", 0, key="old")
    cells = {"second": {0: "k1-0"}, "basd": {0: "k1-0"}, "ce": {0: "k2-0"}}
    frame = analysis.load("losses", tracking_uri=runs.uri, setting="digits", rows=cells)
    assert frame["row"].tolist() == ["second", "basd"] and frame["run_id"].tolist() == [mine, mine]
    assert frame.attrs["warnings"] == ["Row 'basd': 1 run of a former configuration of this row left out."]
    by_configuration = analysis.load("losses", tracking_uri=runs.uri, rows={"basd": "k1"})
    assert by_configuration["seed"].tolist() == [0, 1]
    with pytest.raises(UserError, match="No runs of 'losses' in setting 'digits'"):
        analysis.load("losses", tracking_uri=runs.uri, setting="digits", rows={"ce": {0: "k2-0"}})


def test_two_configurations_are_never_one_row(runs: Store) -> None:
    runs.arm("basd", 0, key="old")
    runs.arm("basd", 1, key="new")
    with pytest.raises(UserError, match="runs of 2 configurations .new, old."):
        analysis.load("losses", tracking_uri=runs.uri)


def test_values_that_are_not_finite_stay_so(runs: Store) -> None:
    runs.arm("basd", 0, value=math.inf)
    runs.arm("basd", 1, value=math.nan)
    runs.arm("basd", 2, value=0.5, step=10, tags={"basd.nonfinite.test/top1": "nan at step 20"})
    runs.arm("basd", 3, value=0.5, step=30, tags={"basd.nonfinite.test/top1": "nan at step 20"})
    runs.arm("basd", 4, tags={"basd.nonfinite.test/nll": "-inf at step 20"})
    frame = analysis.load("losses", tracking_uri=runs.uri)
    inf, nan, ended, passed, _ = frame["test/top1"].tolist()
    assert inf == math.inf and math.isnan(nan) and math.isnan(ended) and passed == 0.5
    assert frame["test/nll"].tolist()[4] == -math.inf


def test_stores_that_cannot_be_read_are_one_sentence(runs: Store, tmp_path: Path) -> None:
    missing = tmp_path / "none.db"
    with pytest.raises(UserError, match=r"none.db, which does not exist: train them with `basd grid losses`"):
        analysis.load("losses", tracking_uri=f"sqlite:///{missing}")
    assert not missing.exists()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port, start = taken.getsockname()[1], time.monotonic()
        with pytest.raises(UserError, match="cannot be read") as caught:
            analysis.load("losses", tracking_uri=f"http://me:secret@127.0.0.1:{port}")
        assert time.monotonic() - start < 10 and "secret" not in str(caught.value)
    (tmp_path / "bad.db").write_text("no database " * 500)
    with pytest.raises(UserError, match="cannot be read .*not a database"):
        analysis.load("losses", tracking_uri=f"sqlite:///{tmp_path / 'bad.db'}")
    with pytest.raises(UserError, match="no name of an ablation"):
        analysis.load("a`b", tracking_uri=runs.uri)


def test_a_database_of_another_mlflow_is_named(empty: Path) -> None:
    with sqlite3.connect(empty) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    connection.close()
    with pytest.raises(UserError, match="another version of MLflow"):
        analysis.load("losses", tracking_uri=f"sqlite:///{empty}")


def test_from_runs_to_report(runs: Store, tmp_path: Path) -> None:
    for seed in range(3):
        runs.arm("basd", seed, value=0.76 + 0.01 * seed)
        runs.arm("ce", seed, value=0.40 + 0.02 * seed)
    rows = (analysis.LayoutRow("basd", "BASD"), analysis.LayoutRow("ce", "CE"))
    layout = analysis.Layout("losses", "Losses", rows, "basd", seeds=(0, 1, 2))
    frame = analysis.load("losses", tracking_uri=runs.uri)
    report = analysis.write_report(frame, layout, tmp_path / "reports")
    assert "| CE | 42.00 ± 2.00 |" in report.paths[0].read_text()
    before = [path.read_bytes() for path in report.paths]
    again = analysis.write_report(analysis.load("losses", tracking_uri=runs.uri), layout, tmp_path / "reports")
    assert [path.read_bytes() for path in again.paths] == before
