"""A GPU belongs to one worker at a time, whoever started the workers and however they end. torch is told of two GPUs; the
processes are real."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import fork, start
from grid_fakes import SETTING, make_plan
from ledgers import empty_ledger
from rich.console import Console
from tiny import TINY

from basd.cli import main
from basd.errors import UserError
from basd.grid import leases, worker
from basd.grid.leases import Device, LeasedError, leased, take, visible_devices
from basd.grid.options import GridOptions
from basd.grid.plan import Plan
from basd.grid.run import Outcome, run_grid
from basd.grid.worker import OPTIONS

HERE = Path(__file__).parent
GPUS = ["GPU-aa", "GPU-ab"]


@pytest.fixture(autouse=True)
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, and leases of this test's own."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "_raw_device_uuid_nvml", lambda: GPUS)
    monkeypatch.setattr(leases, "POLL", 0.02)
    monkeypatch.setattr(leases._Process, "saw", None)  # as in a process that has leased nothing yet
    monkeypatch.setenv("BASD_LEASES", str(tmp_path / "leases"))
    # set and taken away, so that it is what it was after the test
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")


def silent(_text: str) -> None:
    raise AssertionError("nobody has to wait here")


def name_of(lease: leases.Lease | None) -> str:
    assert lease is not None
    return lease.device.name


# -- which devices there are -------------------------------------------------------------------------------------------


def test_devices_are_those_that_cuda_will_see(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = Device("GPU-aa", "GPU-aa"), Device("GPU-ab", "GPU-ab")
    cases: dict[str | None, list[Device]] = {
        None: [a, b],
        "1,0": [Device("1", "GPU-ab"), Device("0", "GPU-aa")],
        "GPU-ab": [b],
        "GPU-ab, 0": [b, Device("0", "GPU-aa")],
        "MIG-1": [Device("MIG-1", "MIG-1")],
        "": [],
        "-1": [],
        "1,7,0": [Device("1", "GPU-ab")],
        "GPU-a": [],  # two begin so
    }
    for machine in (GPUS, []):
        monkeypatch.setattr(torch.cuda, "_raw_device_uuid_nvml", lambda machine=machine: machine)
        for entries, found in cases.items():
            if entries is not None:
                monkeypatch.setenv("CUDA_VISIBLE_DEVICES", entries)
            expected = found if machine else []  # an entry makes no device
            assert visible_devices() == expected, entries
            assert GridOptions().devices() == [device.entry for device in expected], entries
            assert GridOptions(device="cpu").devices() == [], entries
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")


def test_without_a_driver_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str = "libnvidia-ml.so.1") -> None:
        raise OSError(name)

    assert leases.machine_devices() == GPUS
    monkeypatch.setattr(torch.cuda, "_raw_device_uuid_nvml", none)
    monkeypatch.setattr("ctypes.CDLL", none)
    assert leases.machine_devices() == []
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    monkeypatch.setattr(torch.cuda, "_raw_device_uuid_nvml", lambda: GPUS)
    assert leases.machine_devices() == []


def test_on_a_cpu_and_under_torchrun_nothing_is_leased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with leased(GridOptions(device="cpu"), silent):
        assert take(GridOptions(device="cpu")) is None
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with leased(GridOptions(), silent):
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert not (tmp_path / "leases").exists()


# -- who has them ------------------------------------------------------------------------------------------------------


def test_each_gpu_is_leased_once_and_several_times_where_that_is_asked_for(tmp_path: Path) -> None:
    held = [take(GridOptions()), take(GridOptions())]
    assert [name_of(lease) for lease in held] == GPUS
    assert (tmp_path / "leases").stat().st_mode & 0o777 == 0o700
    with pytest.raises(LeasedError, match=rf"Every GPU here is leased, by process {os.getpid()} on \S+, process "):
        take(GridOptions())
    # three workers on two GPUs: two each at most
    shared = GridOptions(processes=3)
    held += [take(shared), take(shared)]
    assert [name_of(lease) for lease in held[2:]] == GPUS
    with pytest.raises(LeasedError):
        take(shared)
    held[1].release()  # type: ignore[union-attr]
    assert name_of(take(GridOptions())) == "GPU-ab"


def test_a_named_device_is_leased_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    named = GridOptions(device="cuda:1")
    with leased(named, silent):
        assert "CUDA_VISIBLE_DEVICES" not in os.environ  # its number would change
        said = rf"runtime.device=cuda:1 is leased by process {os.getpid()} on \S+; wait until that ends, or let "
        with pytest.raises(UserError, match=said), leased(named, silent):
            pass
        with leased(GridOptions(), silent):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-aa"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    several = GridOptions(device="cuda:0", processes=2)
    held = [take(several), take(several)]
    assert [name_of(lease) for lease in held] == ["GPU-aa"] * 2
    assert take(GridOptions(device="cuda:7")) is None  # the trainer says that there is no such device


def test_a_process_keeps_to_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA, once it is initialised, knows no other."""
    options = GridOptions(processes=4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    with leased(options, silent):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
    with leased(options, silent), leased(options, silent):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "1"
        with pytest.raises(LeasedError):
            take(options)  # two on each of two GPUs, as before


def test_leases_that_cannot_be_written_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BASD_LEASES", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set BASD_LEASES to a directory of yours"):
        take(GridOptions())
    monkeypatch.delenv("BASD_LEASES")
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    somebody = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: somebody)
    (tmp_path / f"basd-leases-{somebody}").mkdir()
    with pytest.raises(UserError, match="set BASD_LEASES to a directory of yours"):
        take(GridOptions())


def test_the_lease_is_there_before_anything_looks_at_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def look() -> bool:
        seen.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
        raise UserError("enough")

    monkeypatch.setattr(torch.cuda, "is_available", look)
    one = ["rows=[basd]", "seeds=[0]", *TINY]
    assert main(["worker", "leave_one_out", *one]) == 2
    assert main(["train", *TINY]) == 2
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert main(["grid", "leave_one_out", *one]) == 2
    assert seen == ["GPU-aa", "GPU-aa", None]
    assert name_of(take(GridOptions())) == "GPU-aa"  # and given back


# -- real processes ----------------------------------------------------------------------------------------------------


def use(folder: Path, times: int) -> None:
    """Hold a GPU now and then; fails where another process has the same."""
    for _ in range(times):
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        with leased(GridOptions(), lambda _text: None):
            mark = folder / os.environ["CUDA_VISIBLE_DEVICES"]
            mark.touch(exist_ok=False)
            time.sleep(0.002)
            mark.unlink()


def test_never_two_holders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "POLL", 0.001)
    processes = [start(use, tmp_path, 20) for _ in range(6)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 6


def hold(ready: Any) -> None:
    with leased(GridOptions(), ready.send):
        ready.send(os.environ["CUDA_VISIBLE_DEVICES"])
        time.sleep(600)


def start_holder() -> tuple[Any, Any]:
    here, there = fork.Pipe()
    return start(hold, there), here


def test_a_killed_holder_frees_its_lease_and_who_waits_gets_it() -> None:
    holders = [start_holder() for _ in GPUS]
    waiting, said = None, None
    try:
        assert sorted(said.recv() for _, said in holders) == GPUS
        waiting, said = start_holder()
        pids = {f"process {process.pid} on" for process, _ in holders}
        sentence = said.recv()
        assert all(pid in sentence for pid in pids) and "waiting for the first that gets free" in sentence
        assert not said.poll(0.1)
        holders[1][0].kill()
        assert said.recv() in GPUS
        with pytest.raises(LeasedError, match=f"process {waiting.pid} on"):
            take(GridOptions())
    finally:
        for process in [process for process, _ in holders] + ([waiting] if waiting else []):
            process.kill()
            process.join(30)


# -- workers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def options(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> GridOptions:
    shutil.copy(store, tmp_path / "mlflow.db")
    monkeypatch.syspath_prepend(HERE / "leasing")
    # for worker processes of a grid
    path = [str(HERE / "leasing"), str(HERE), str(HERE.parents[1])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path))
    monkeypatch.setenv("FAKE_GPUS", ",".join(GPUS))
    return GridOptions(
        directory=str(tmp_path / "runs"),
        ledger_url=empty_ledger(tmp_path / "ledger.db"),
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
        trainer="leasing_trainer:train_cohort",
    )


@pytest.fixture
def started() -> Iterator[list[BaseProcess]]:
    processes: list[BaseProcess] = []
    yield processes
    for process in processes:
        process.kill()
        process.join()


def work(options: GridOptions, plan: Path, log: Path) -> None:
    """`python -m basd.grid.worker`, whose output is `log`."""
    logging.root.handlers = [logging.FileHandler(log)]
    os.environ[OPTIONS] = json.dumps(options.to_dict())
    sys.exit(worker.main(["--plan", str(plan)]))


def used(tmp_path: Path) -> list[str]:
    return [line.split()[0] for line in (tmp_path / "used").read_text().splitlines()]


def test_a_worker_waits_for_a_gpu_and_a_signal_ends_the_waiting(
    options: GridOptions, tmp_path: Path, started: list[BaseProcess]
) -> None:
    holders = {said.recv(): process for process, said in (start_holder() for _ in GPUS)}
    started += holders.values()
    plan = make_plan(2, 1).save(tmp_path / "plan.json")
    logs = [tmp_path / f"log{number}" for number in range(2)]
    workers = [start(work, options, plan, log) for log in logs]
    started += workers
    for log in logs:
        limit = time.monotonic() + 60
        while not log.exists() or "waiting for the first that gets free" not in log.read_text():
            assert time.monotonic() < limit
            time.sleep(0.02)
        assert f"process {holders['GPU-aa'].pid} on" in log.read_text()
    workers[0].terminate()
    workers[0].join(60)
    assert workers[0].exitcode not in (0, None)
    holders["GPU-ab"].kill()
    workers[1].join(60)
    assert workers[1].exitcode == 0
    assert used(tmp_path) == ["GPU-ab"]
    assert name_of(take(options)) == "GPU-ab"


def run(options: GridOptions, made: Plan) -> Outcome:
    return run_grid(made, options, console=Console(file=io.StringIO()))


@pytest.mark.full
def test_a_grid_starts_a_worker_on_each_gpu_that_is_free(options: GridOptions, tmp_path: Path) -> None:
    """None at first, then one; the second where that one is in the middle of its work."""
    held = [take(options), take(options)]
    made = make_plan(1, 6, steps=20, sleep=0.05)
    text = io.StringIO()

    def free() -> None:
        while "waiting for the first that gets free" not in text.getvalue():
            time.sleep(0.05)
        held[1].release()  # type: ignore[union-attr]
        while not (tmp_path / "used").exists():
            time.sleep(0.05)
        held[0].release()  # type: ignore[union-attr]

    thread = threading.Thread(target=free, daemon=True)
    thread.start()
    outcome = run_grid(made, options, console=Console(file=text, width=200))
    thread.join()
    assert outcome.ok and outcome.workers_started == 2 and outcome.worker_deaths == 0
    assert text.getvalue().count("waiting for the first that gets free") == 1
    assert used(tmp_path)[0] == "GPU-ab" and not (tmp_path / "clash").exists()


@pytest.mark.full
def test_two_grids_share_the_gpus_and_a_killed_worker_leaves_its_own(options: GridOptions, tmp_path: Path) -> None:
    made = [make_plan(1, 3, {(0, 0): {"kill_at": 3}} if row else None, steps=6, sleep=0.02) for row in range(2)]
    places = [
        dataclasses.replace(options, directory=str(tmp_path / f"runs{n}"), ledger_url=f"sqlite:///{tmp_path}/{n}.db")
        for n in range(2)
    ]
    with ThreadPoolExecutor() as pool:
        outcomes = list(pool.map(run, places, made))
    assert all(outcome.ok for outcome in outcomes) and outcomes[1].worker_deaths == 1
    assert set(used(tmp_path)) <= set(GPUS) and not (tmp_path / "clash").exists()


def test_a_grid_on_a_named_gpu_that_is_taken_says_so(options: GridOptions, tmp_path: Path) -> None:
    named = dataclasses.replace(options, device="cuda:0")
    held = take(named)
    with pytest.raises(UserError, match="runtime.device=cuda:0 is leased by process"):
        run(named, make_plan(1, 1))
    assert held is not None and not (tmp_path / "used").exists()
    assert not list(named.setting_directory(SETTING).glob("logs/*"))
