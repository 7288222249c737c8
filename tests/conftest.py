"""Tiny arms on the real digits: a few seconds for everything."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import TINY

from basd.compose import compose
from basd.config import FrozenArm
from basd.grid.plan import Preparer, freeze


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def modules_are_no_garbage() -> None:
    """The million objects of the imported modules stay: without this every collection looks at each of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def preparer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preparer]:
    patch = pytest.MonkeyPatch()
    patch.setenv("BASD_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield Preparer()
    patch.undo()


@pytest.fixture(scope="session")
def tiny_arm(preparer: Preparer) -> Callable[..., FrozenArm]:
    """tiny_arm("method=ce", …, seed=1): the frozen arm of these overrides."""

    def make(*overrides: str, seed: int = 0) -> FrozenArm:
        composed = compose([*TINY, *overrides])
        composed = dataclasses.replace(composed, config=dataclasses.replace(composed.config, seed=seed))
        return freeze(composed, "tiny", preparer(composed.config))

    return make


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow store; making one takes seconds, copying it does not."""
    from basd.tracking.mlflow_store import open_client

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    open_client(f"sqlite:///{path}")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: the last files are then short, and both processes end together."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
