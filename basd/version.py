"""The code version that an arm was trained with."""

from __future__ import annotations

import subprocess
from functools import lru_cache
from pathlib import Path

from basd import __version__


@lru_cache(maxsize=1)
def code_version() -> str:
    """The last commit that changed BASD's source, "-dirty" if its files differ from it; the wheel's version outside a checkout.

    Commits of documents, tests or tables are no new version of the code.
    """
    source = Path(__file__).resolve().parent
    commit = _git(source, "log", "-1", "--format=%h", "--abbrev=12", "--", ".")
    # a wheel installed below some other project's checkout must not report that project's commit
    tracked = commit and _git(source, "ls-files", "--error-unmatch", "errors.py")
    if not commit or not tracked:
        return __version__
    changed = _git(source, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{commit}-dirty" if changed else commit


def _git(directory: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
