"""Which tests run, and tiny arms on the real digits: a few seconds for everything."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# torch, MLflow and basd are imported in the fixtures: the process that hands out the tests needs none of them
if TYPE_CHECKING:
    from project import Project

    from basd.config import FrozenArm
    from basd.grid.plan import Preparer

LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("basd")
    group.addoption(
        "--full",
        action="store_true",
        help="also run the tests that take long, kill processes, start services and launchers, and run notebooks",
    )
    group.addoption("--rare", action="store_true", help="run everything: --full, and each choice by itself")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = 0


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what no option asks for; long files first, so that both processes end together."""
    rare = config.getoption("--rare")
    skipped = set() if rare else {"rare"} if config.getoption("--full") else {"rare", "full"}
    left = [item for item in items if any(item.get_closest_marker(name) for name in skipped)]
    if left:
        items[:] = [item for item in items if item not in set(left)]
        config.hook.pytest_deselected(items=left)
    config.stash[LEFT_OUT] = len(left)
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = len(left)
    long = {item.path for item in items if item.get_closest_marker("full")}
    items.sort(key=lambda item: item.path not in long)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Each process of pytest-xdist collects everything, and so leaves out the same tests."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", node.config.stash[LEFT_OUT])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    left = config.stash[LEFT_OUT]
    if left:
        option, what = ("--rare", "exhaustive") if config.getoption("--full") else ("--full", "long")
        tests = "test was" if left == 1 else "tests were"
        terminalreporter.write_line(f"{left} {what} {tests} left out; `pytest {option}` runs them too.")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors: more threads only slow them down, and the bits of a result depend on their number."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def modules_are_no_garbage() -> None:
    """The million objects of the imported modules stay: without this every collection looks at each of them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def preparer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Preparer]:
    from basd.grid.plan import Preparer

    patch = pytest.MonkeyPatch()
    patch.setenv("BASD_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield Preparer()
    patch.undo()


def arms_with(common: Sequence[str], preparer: Preparer) -> Callable[..., FrozenArm]:
    """make("method=ce", …, seed=1): the frozen arm of these overrides after the common ones."""
    import dataclasses

    from basd.compose import compose
    from basd.grid.plan import freeze

    def make(*overrides: str, seed: int = 0) -> FrozenArm:
        composed = compose([*common, *overrides])
        composed = dataclasses.replace(composed, config=dataclasses.replace(composed.config, seed=seed))
        return freeze(composed, "tiny", preparer(composed.config))

    return make


@pytest.fixture(scope="session")
def tiny_arm(preparer: Preparer) -> Callable[..., FrozenArm]:
    """tiny_arm("method=ce", …, seed=1): the frozen arm of these overrides, on the digits."""
    from tiny import TINY

    return arms_with(TINY, preparer)


@pytest.fixture(scope="session")
def few_arm(preparer: Preparer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FrozenArm]:
    """As `tiny_arm`, on few images in CIFAR-10's format, for what holds of any data: 216 for training, 24 and 48 to evaluate on.

    The images are noise, 32×32; an epoch has 5 steps.
    """
    from data.stored_fakes import write_cifar10
    from tiny import TINY

    root = tmp_path_factory.mktemp("cifar10")
    write_cifar10(root, n=48)
    common = [text for text in TINY if not text.startswith("data.image_size")]
    make = arms_with([*common, "data=cifar10", f"data.root={root}", "recipe.batch_size=40"], preparer)
    # tests that watch a training do not see the teacher's
    make()
    return make


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that the first process which needs it makes for all processes of this pytest run."""
    from basd.tracking.files import file_lock

    base = tmp_path_factory.getbasetemp()
    # a process of pytest-xdist has a folder of its own below the one of the run
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "made-once" / name
    folder.parent.mkdir(exist_ok=True)
    with file_lock(folder.with_suffix(".lock"), timeout=600.0):
        # not made aside and renamed: MLflow keeps absolute paths of artifacts
        done = folder.with_suffix(".done")
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow store; making one takes seconds, copying it does not."""
    from basd.tracking.mlflow_store import open_client

    return (
        made_once(tmp_path_factory, "store", lambda folder: open_client(f"sqlite:///{folder}/mlflow.db")) / "mlflow.db"
    )


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Project:
    """Two tables that the commands trained; tests only read it, or copy it."""
    from project import Project

    return Project(made_once(tmp_path_factory, "project", lambda folder: Project(folder).make(store)))
