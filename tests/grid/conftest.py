"""What the tests of grids share."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from audit_fakes import Table
from postgres import Server, programs

from basd.tracking.files import read_json, write_json
from basd.tracking.mlflow_store import fingerprint


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    if programs() is None:
        pytest.skip("PostgreSQL's server is not installed")
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished table that nobody broke. Making a store takes seconds, copying it does not."""
    table = Table(tmp_path_factory.mktemp("intact"))
    table.work()
    table.send()
    return table.root


@pytest.fixture
def table(intact: Path, tmp_path: Path) -> Table:
    """A copy of it, to be broken."""
    root = tmp_path / "table"
    shutil.copytree(intact, root)
    copied = Table(root)
    for path in root.glob("runs/*/*/mirror.json"):
        write_json(path, {**(read_json(path) or {}), "store": fingerprint(copied.options.tracking_uri)})
    return copied
