"""The code version: what a table's arms must share."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import basd
from basd.version import code_version


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of its own that `basd` seems to be imported from."""
    (tmp_path / "basd").mkdir()
    monkeypatch.setattr("basd.version.__file__", str(tmp_path / "basd" / "version.py"))
    git(tmp_path, "init", "--quiet")
    return tmp_path


def git(folder: Path, *arguments: str) -> None:
    settings = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(folder), *settings, *arguments], check=True)


def commit(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    git(folder, "add", name)
    git(folder, "commit", "--quiet", "-m", name)


@pytest.fixture
def version() -> Iterator[Callable[[], str]]:
    def read() -> str:
        code_version.cache_clear()
        return code_version()

    yield read
    code_version.cache_clear()


def test_it_changes_with_the_source_alone(checkout: Path, version: Callable[[], str]) -> None:
    commit(checkout, "basd/errors.py", "one")
    first = version()
    assert len(first) == 12
    commit(checkout, "README.md", "a document")
    assert version() == first
    (checkout / "basd" / "errors.py").write_text("two")
    assert version() == f"{first}-dirty"
    commit(checkout, "basd/errors.py", "two")
    assert version() not in (first, f"{first}-dirty") and len(version()) == 12


def test_a_wheel_below_another_checkout_has_its_own(checkout: Path, version: Callable[[], str]) -> None:
    commit(checkout, "README.md", "of another project")
    (checkout / "basd" / "errors.py").write_text("installed here, not tracked")
    assert version() == basd.__version__
