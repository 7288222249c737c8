"""Write the files of a report, each by a temporary file and a rename, so that a reader never sees half of one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from basd.errors import UserError

# What stands in the file names of figures, in the order of a page.
_ORDER = (
    *("forest", "shapley", "interactions", "front", "history", "importance", "slices", "epochs"),
    *("curves", "cost", "losses", "selector", "distance", "attention", "spectra", "radial", "cka"),
)


def write_texts(directory: Path, texts: Mapping[str, str]) -> list[Path]:
    """Write files by name into `directory` (made if missing), none before all could be written; returns their paths."""
    renames: list[tuple[Path, Path]] = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            renames.append((directory / f".{name}.{os.getpid()}.tmp", directory / name))
            renames[-1][0].write_text(text, encoding="utf-8", newline="\n")
        for fresh, target in renames:
            os.replace(fresh, target)
    except OSError as error:
        for fresh, _ in renames:
            fresh.unlink(missing_ok=True)
        raise UserError(
            f"The report cannot be written to {directory} ({error.strerror or error}): choose a directory that can."
        ) from error
    return [target for _, target in renames]


def figures_of(name: str, directory: Path) -> list[str]:
    """File names of the figures NAME.WHAT.png that lie in a directory: the results, training, models, then any others by name."""
    pattern = re.compile(rf"{re.escape(name)}\.[A-Za-z0-9_-]+\.png")

    def place(file: str) -> tuple[int, str]:
        kind = re.split(r"[.-]", file.removeprefix(f"{name}."))[0]
        return _ORDER.index(kind) if kind in _ORDER else len(_ORDER), file

    return sorted((path.name for path in directory.glob("*.png") if pattern.fullmatch(path.name)), key=place)


def same_text(path: Path, text: str) -> bool:
    """Whether a file holds exactly this text."""
    try:
        return path.read_bytes() == text.encode()
    except OSError:
        return False
