import json

import pytest
from traces import HERE, STEPS, methods, trace


@pytest.mark.parametrize("method", methods())
def test_ten_steps_of_a_preset(method: str) -> None:
    """The stored values within 1e-4 on any machine and torch release."""
    first = trace(method)
    stored = json.loads((HERE / f"{method}.json").read_text())
    assert len(stored) == len(first) == STEPS
    for expected, got in zip(stored, first, strict=True):
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_every_preset_has_a_trace() -> None:
    assert {file.stem for file in HERE.glob("*.json")} == set(methods())
