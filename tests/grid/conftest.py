"""What the tests of grids share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from postgres import Server, programs


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    if programs() is None:
        pytest.skip("PostgreSQL's server is not installed")
    server = Server()
    yield server
    server.close()
