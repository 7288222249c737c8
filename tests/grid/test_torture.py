"""The short form of `tests/torture.py`; the long one is run by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from postgres import programs
from torture import options, run


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The numbers of the undisturbed grid do not depend on the ledger: one serves both."""
    return tmp_path_factory.mktemp("reference")


@pytest.mark.full
@pytest.mark.parametrize("ledger", ["sqlite", pytest.param("postgresql", marks=pytest.mark.rare)])
def test_a_grid_under_torture_ends_with_the_bits_of_one_that_nothing_interrupted(
    ledger: str, reference: Path, tmp_path: Path
) -> None:
    if ledger == "postgresql" and programs() is None:
        pytest.skip("PostgreSQL's server is not installed")
    table = ["--rows", "basd,ce", "--seeds", "1", "--epochs", "10", "--reference", str(reference)]
    given = options(["--ledger", ledger, "--kills", "3", *table])
    said: list[str] = []
    assert run(tmp_path / "torture", given, said.append) == [], said
