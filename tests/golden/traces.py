"""Golden traces: ten steps of every method preset on a stored teacher.

    python tests/golden/traces.py

writes them anew; a change of these files is a change of what the presets compute, and its commit says why.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tiny import TINY, MemoryRecorder  # noqa: E402 - the folder of the tests is not a package

from basd.compose import compose, group_choices  # noqa: E402
from basd.grid.plan import freeze, prepare  # noqa: E402
from basd.training.cohort import train_cohort  # noqa: E402

TEACHER = HERE / "teacher.safetensors"
STEPS = 10
Trace = list[dict[str, float]]


def methods() -> list[str]:
    return group_choices()["method"]


def trace(method: str) -> Trace:
    """The recorded parts of every step. Accuracies are left out: near a tie they differ between machines by an image."""
    overrides = [
        f"method={method}",
        f"teacher.weights={TEACHER}",
        f"recipe.duration={STEPS} steps",
        "runtime.log_every=1",
    ]
    composed = compose([*TINY, *overrides])
    arm = freeze(composed, "golden", prepare(composed.config))
    recorder = MemoryRecorder()
    with tempfile.TemporaryDirectory() as directory:
        (result,) = train_cohort([arm], [Path(directory)], [recorder])
    assert result.status == "complete", result.reason
    merged: dict[int, dict[str, float]] = {}
    for step, values in recorder.results:
        kept = {name: value for name, value in values.items() if not name.startswith(("val/", "test/", "cost/"))}
        merged.setdefault(step, {}).update(kept)
    return [{"step": step, **values} for step, values in sorted(merged.items())]


def store(teacher: bool) -> None:
    if teacher:
        from safetensors.torch import save_file

        save_file(prepare(compose([*TINY, "teacher.epochs=20"]).config).teacher.model.state_dict(), TEACHER)
    for method in methods():
        lines = ",\n".join(json.dumps(entry, sort_keys=True) for entry in trace(method))
        (HERE / f"{method}.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    store(teacher=not TEACHER.exists())
