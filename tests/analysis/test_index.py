"""The index: made from what lies in the folder of reports, whole, escaped, and the same bytes again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from made import make_layout

from analysis import Layout, LayoutRow, build_table, metric, write_index, write_report
from analysis.entries import Entry, read_entries, record_problem, table_entry
from basd.errors import UserError

Frames = Callable[..., pd.DataFrame]
VALUES = {
    "basd": dict(enumerate([0.76, 0.79, 0.75, 0.78, 0.77])),
    "ce": dict(enumerate([0.38, 0.50, 0.41, 0.44, 0.45])),
    "near": dict(enumerate([0.77, 0.78, 0.76, 0.77, 0.78])),
    "few": {0: 0.9, 1: 0.9},
}


def layout(name: str = "losses", **changes: Any) -> Layout:
    rows = tuple(LayoutRow(row, row.upper()) for row in VALUES)
    fields = {"name": name, "title": name, "question": "Which <one> & why?", "setting": "digits-a",
              "plan": "0123456789ab", "seeds": (0, 1, 2, 3, 4)}  # fmt: skip
    return make_layout(rows, **fields | changes)


def sweep_of(folder: Path) -> None:
    entry = Entry("sweep", "uwso", "digits-a", "Which T?", {"best": "trial 3, val top-1 (%) 71.00", "command": "basd train 'a=[1]'"},
                  ("uwso.md", "uwso.trials.csv"), ("uwso.history.png",))  # fmt: skip
    for file in (*entry.files, *entry.figures):
        (folder / file).write_text("")
    (folder / "uwso.json").write_text(entry.to_json())


def test_the_headline_of_a_table_by_hand(frame_of: Frames) -> None:
    entry = table_entry(build_table(frame_of(VALUES), layout()), ["losses.pairs.png"])
    assert entry.facts == {
        "test top-1 (%)": "BASD 77.00 ± 1.58 (the reference)",
        # FEW is higher, of fewer seeds
        "highest mean": "NEAR 77.20 ± 0.84",
        "n": "2 to 5",
        "verdicts": "1 worse, 1 no difference shown, 1 n too small",
        "code": "abc1234",
        "plan": "0123456789ab",
    }
    assert entry.files == tuple(f"losses.{end}" for end in ("html", "md", "tex", "csv", "runs.csv"))


def test_costs_have_a_lowest_mean_and_no_verdict(frame_of: Frames) -> None:
    frame = frame_of({row: {0: 1.0} for row in VALUES})
    frame["time/step_milliseconds"] = [3.0, 2.0, 4.0, math.nan]
    shown = layout("cost", metrics=(metric("time/step_milliseconds"),), seeds=(0,), plan="")
    assert table_entry(build_table(frame, shown), []).facts == {
        "ms a step": "BASD 3.0 (the reference)", "lowest mean": "CE 2.0", "n": "0 to 1", "code": "abc1234"}  # fmt: skip


def test_a_reference_that_has_not_finished_is_told(frame_of: Frames) -> None:
    entry = table_entry(build_table(frame_of({"ce": VALUES["ce"]}), layout()), [])
    assert entry.facts["test top-1 (%)"] == "BASD – (the reference)" and "highest mean" not in entry.facts
    assert entry.facts["verdicts"] == "none"


def test_the_index_lists_settings_tables_sweeps_figures_and_problems(frame_of: Frames, tmp_path: Path) -> None:
    folder = tmp_path / "digits-a"
    folder.mkdir()
    (folder / "losses.pairs.png").write_text("")
    write_report(frame_of(VALUES), layout(), folder)
    write_report(frame_of(VALUES), layout("main", setting="cifar"), tmp_path / "cifar")
    sweep_of(folder)
    record_problem(tmp_path, "table", "views", "digits-a", "How?", "The arms <of> two\nversions.")
    record_problem(tmp_path, "table", "main", "cifar", "", "gone")
    (folder / "other.json").write_text("[1]")
    (folder / "evil.json").write_text((folder / "uwso.json").read_text().replace("uwso.md", "../../uwso.md"))
    assert [path.name for path in write_index(tmp_path)] == ["index.html", "index.md"]
    assert [(e.setting, e.name) for e in read_entries(tmp_path)] == [
        ("cifar", "main"), ("digits-a", "losses"), ("digits-a", "views"), ("digits-a", "uwso")]  # fmt: skip
    html, text = (tmp_path / "index.html").read_text(), (tmp_path / "index.md").read_text()
    for said in ("3 tables, 1 sweep.", "Which &lt;one&gt; &amp; why?", "BASD 77.00 ± 1.58 (the reference)",
                 '<a href="digits-a/losses.html">losses</a>', 'src="digits-a/losses.pairs.png"',
                 'href="digits-a/losses.pairs.pdf"', "<code>0123456789ab</code>", "<code>basd train &#x27;a=[1]&#x27;</code>",
                 '<a href="digits-a/uwso.md">uwso</a> (sweep)', 'href="digits-a/uwso.trials.csv">trials (CSV)',
                 "Could not be written: The arms &lt;of&gt; two versions.",
                 "Could not be written again, so that files below are of an earlier report: gone"):  # fmt: skip
        assert said in html, said
    for said in ("## cifar", "### uwso (sweep)", r"Which \<one\> & why?", "[CSV](<digits-a/losses.csv>)",
                 r"**Could not be written: The arms \<of\> two versions.**", "- plan: 0123456789ab",
                 "[losses.pairs](<digits-a/losses.pairs.png>)"):  # fmt: skip
        assert said in text, said
    before = {path: path.read_bytes() for path in tmp_path.glob("index.*")}
    write_index(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.glob("index.*")} == before


def test_a_report_written_again_has_no_problem_and_a_deleted_one_no_place(frame_of: Frames, tmp_path: Path) -> None:
    folder = tmp_path / "digits-a"
    record_problem(tmp_path, "table", "losses", "digits-a", "", "gone")
    write_report(frame_of(VALUES), layout(), folder)
    (entry,) = read_entries(tmp_path)
    assert entry.problem == ""
    (folder / "losses.tex").unlink()
    write_index(tmp_path)
    assert "losses.tex" not in (tmp_path / "index.html").read_text()
    (folder / "losses.json").unlink()
    write_index(tmp_path)
    assert "Nothing was reported yet." in (tmp_path / "index.md").read_text()


def test_what_is_no_entry_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    good = json.loads(Entry("table", "a", "s").to_json())
    for number, bad in enumerate(
        [{}, {**good, "kind": "x"}, {**good, "name": "../a"}, {**good, "facts": {"n": 3}}, {**good, "facts": None},
         {**good, "extra": 1}, {**good, "files": [3]}]
    ):  # fmt: skip
        (tmp_path / "s" / f"{number}.json").write_text(json.dumps(bad))
    (tmp_path / "s" / "bytes.json").write_bytes(b"\xff\xfe")
    assert read_entries(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to .*file"):
        write_index(tmp_path / "file")
