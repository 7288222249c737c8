"""The journal: nothing that was flushed is lost, nothing that was rewound stays."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from basd.tracking.journal import Journal, last_event, read_events


def steps(directory: Path) -> list[tuple[int, int]]:
    return [(event.index, event.step) for event in read_events(directory / "journal.jsonl")]


def test_buffers_until_flush_and_ends(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.metrics(1, {"train/loss": 2.0})
    assert steps(tmp_path) == []
    position = journal.flush()
    assert position == (tmp_path / "journal.jsonl").stat().st_size
    journal.end("complete", "", {"test/top1": 0.5})
    event = last_event(tmp_path)
    assert event is not None
    assert (event.index, event.end, event.metrics) == (1, "complete", {"test/top1": 0.5})


def test_rewind_continues_the_count(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.metrics(1, {"a": 1.0})
    position = journal.flush()
    journal.metrics(2, {"a": 2.0})
    journal.flush()
    journal.metrics(3, {"a": 3.0})
    journal.rewind(position)
    journal.metrics(2, {"a": 2.5})
    journal.close()
    assert steps(tmp_path) == [(0, 1), (1, 2)]
    again = Journal(tmp_path)
    again.rewind(0)
    assert steps(tmp_path) == []


def test_torn_line_is_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.metrics(1, {"a": 1.0})
    position = journal.flush()
    journal.close()
    with open(tmp_path / "journal.jsonl", "ab") as file:
        file.write(b'{"i": 1, "t": 17000000')
    assert steps(tmp_path) == [(0, 1)]
    again = Journal(tmp_path)
    assert again.flush() == position
    again.metrics(2, {"a": 2.0})
    again.close()
    assert steps(tmp_path) == [(0, 1), (1, 2)]


def test_an_end_is_taken_back_when_the_arm_goes_on(tmp_path: Path) -> None:
    Journal(tmp_path).end("failed", "disk full")
    journal = Journal(tmp_path)
    journal.metrics(1, {"a": 1.0})
    journal.end("stopped")
    journal.end("complete")
    journal.close()
    assert [event.end for event in read_events(tmp_path / "journal.jsonl")] == ["", "complete"]


def test_values_that_are_not_finite_survive(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.metrics(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    journal.close()
    text = (tmp_path / "journal.jsonl").read_text()
    assert '"nan"' in text and '"inf"' in text and '"-inf"' in text
    (event,) = read_events(tmp_path / "journal.jsonl")
    assert math.isnan(event.metrics["a"]) and event.metrics["b"] == math.inf and event.metrics["c"] == -math.inf


def test_positions_that_cannot_be_are_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.metrics(1, {"a": 1.0})
    position = journal.flush()
    with pytest.raises(ValueError, match="shorter"):
        journal.rewind(position + 1)
    with pytest.raises(ValueError, match="not the end of a line"):
        journal.rewind(position - 3)


def test_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    journal.metrics(1, {"a": 1.0})
    journal.flush()
    journal.metrics(2, {"a": 2.0})

    def full(descriptor: int) -> None:
        monkeypatch.undo()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        journal.flush()
    assert steps(tmp_path) == [(0, 1)]
    journal.flush()  # there is room again
    assert steps(tmp_path) == [(0, 1), (1, 2)]
