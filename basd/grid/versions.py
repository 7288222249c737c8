"""Arms of several code versions: which code trained an arm, and what becomes of a result that is trained again."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from basd.tracking.files import read_json, write_json
from basd.tracking.journal import NAME as JOURNAL
from basd.tracking.journal import last_event
from basd.tracking.mirror import STATE as MIRROR

if TYPE_CHECKING:
    from basd.grid.options import GridOptions
    from basd.grid.plan import Plan
    from basd.grid.trials import ArmState

WEIGHTS = "student.safetensors"


def version_in(directory: Path) -> str:
    """Code version of the training that a directory holds; "" where it holds none."""
    return str((read_json(directory / "arm.json") or {}).get("version", ""))


def trained_version(state: ArmState, directory: Path) -> str:
    """Code version that trained a complete arm; its directory is asked where an older BASD did not tell the ledger."""
    return state.trained_by or version_in(directory) or state.version


def is_leftover(directory: Path, state: ArmState) -> bool:
    """Whether a directory of a complete arm holds nothing, or a try that was overtaken elsewhere, as after a machine died."""
    if version_in(directory) != trained_version(state, directory):
        return True
    event = last_event(directory)
    return (event is None or event.end != "complete") and not (directory / WEIGHTS).exists()


def stale_versions(plan: Plan, options: GridOptions, states: Mapping[str, ArmState]) -> dict[str, int]:
    """Other code versions than the installed one -> how many complete arms of the plan each has trained."""
    complete = [state for key, state in states.items() if key in plan.arms and state.state == "complete"]
    trained = (trained_version(state, options.arm_directory(plan.setting, state.key)) for state in complete)
    return dict(Counter(version for version in sorted(trained) if version != plan.version))


def said_of_stale(plan: Plan, stale: Mapping[str, int], complete: int) -> str:
    """Which complete arms are of other code, and both ways out."""
    which = ", ".join(f"{number} of {version}" for version, number in stale.items())
    return (
        f"{sum(stale.values())} of {complete} complete arms were trained by other code than the installed {plan.version} ({which}): "
        f"`basd grid {plan.name} --retrain-stale` trains them again, `--allow-mixed-code` prints a table of several versions."
    )


def set_aside(directory: Path) -> Path | None:
    """Move the finished training of an arm's directory to one beside it, which `basd export` can name; None: there is none.

    Killed on the way, it goes on when it is called again: the student is moved last.
    """
    if not (directory / WEIGHTS).exists():
        return None
    mark = re.sub(r"[^0-9a-z]+", "-", f"of-{version_in(directory).lower()}").strip("-")
    aside, number = directory.with_name(f"{directory.name}-{mark}"), 1
    while (aside / WEIGHTS).exists():
        number += 1
        aside = directory.with_name(f"{directory.name}-{mark}-{number}")
    write_json(aside / "arm.json", read_json(directory / "arm.json") or {}, durable=True)
    for name in (JOURNAL, "config.yaml", MIRROR, "artifacts", WEIGHTS):
        if (directory / name).exists():
            os.replace(directory / name, aside / name)
    return aside
