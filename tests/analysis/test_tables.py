"""Tables: what the cells say, that the formats agree, that they are escaped, and that the bytes are stable."""

from __future__ import annotations

import csv
import io
import math
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import Layout, LayoutRow, Metric, build_table, compare, metric, write_report
from analysis.escape import escape_latex, escape_markdown
from basd.errors import UserError
from basd.grid.ablations import COSTS, PROBES

Frames = Callable[..., pd.DataFrame]
Layouts = Callable[..., Layout]
FIVE = {
    "basd": dict(enumerate([0.76, 0.79, 0.75, 0.78, 0.77])),
    "ce": dict(enumerate([0.38, 0.50, 0.41, 0.44, 0.45])),
    "near": dict(enumerate([0.77, 0.78, 0.76, 0.77, 0.78])),
}
NASTY = r"50 % of A_b & {c} $d$ #e ~f ^g \h <i> [j] *k* --l | `m` λ ± 中 é “n” é"


def cells(text: str, row: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_cells_show_points_with_intervals_and_bold_only_what_is_shown(frame_of: Frames, layout_of: Layouts) -> None:
    frame, layout = frame_of(FIVE), layout_of(list(FIVE))
    text = build_table(frame, layout).to_markdown()
    ce = compare(frame, "test/top1", reference="basd")["ce"]
    delta, low, high = (f"{100 * value:+.2f}".replace("-", "−") for value in (ce.delta, ce.low, ce.high))
    assert cells(text, "ce") == ["ce", "43.60 ± 4.51", rf"**{delta} \[{low}, {high}\]**", r"\<0.001", "worse", "5"]
    assert cells(text, "basd") == ["basd", "77.00 ± 1.58", "–", "–", "reference", "5"]
    assert "**" not in "".join(cells(text, "near")) and cells(text, "near")[4] == "no difference shown"
    assert "Holm-adjusted over the 2 compared rows" in text and "Code version: abc1234 (15 arms)." in text


def test_three_seeds_have_an_interval_but_no_verdict_and_two_have_neither(frame_of: Frames, layout_of: Layouts) -> None:
    three = {row: {seed: values[seed] for seed in range(3)} for row, values in FIVE.items()}
    text = build_table(frame_of(three), layout_of(list(FIVE))).to_markdown()
    assert cells(text, "ce")[4] == "n too small" and r"\[" in cells(text, "ce")[2] and "**" not in text
    two = {row: {seed: values[seed] for seed in range(2)} for row, values in FIVE.items()}
    text = build_table(frame_of(two), layout_of(list(FIVE))).to_markdown()
    assert cells(text, "ce")[2:] == ["−33.50", "–", "n too small", "2"] and "under 3 pairs no interval" in text
    one = {row: {0: values[0]} for row, values in FIVE.items()}
    assert cells(build_table(frame_of(one), layout_of(list(FIVE))).to_markdown(), "ce")[1:3] == ["38.00", "−38.00"]


def test_gaps_are_counted_and_explained(frame_of: Frames, layout_of: Layouts) -> None:
    values = {"basd": FIVE["basd"], "ce": {0: 0.4, 1: math.nan, 2: 0.5}}
    frame = frame_of(values, unfinished={("ce", 3): "FAILED"})
    text = build_table(frame, layout_of(["basd", "ce", "never"], seeds=(0, 1, 2, 3, 4))).to_markdown()
    assert cells(text, "ce")[5] == "2/5"
    assert cells(text, "never")[1:] == ["–", "–", "–", "–", "0/5"]
    assert "ce, seed 3 (failed), 4 (no run); never, seed 0 (no run)" in text
    assert "Without a finite value, so not in the row's mean: ce, seed 1 (test top-1)." in text


def test_a_table_without_its_reference_has_means_only(frame_of: Frames, layout_of: Layouts) -> None:
    text = build_table(frame_of({"ce": FIVE["ce"]}), layout_of(["basd", "ce"])).to_markdown()
    assert "has no finished run yet" in text and cells(text, "ce")[1:3] == ["43.60 ± 4.51", "–"]


def test_the_planned_seeds_are_the_only_ones_used(frame_of: Frames, layout_of: Layouts) -> None:
    table = build_table(frame_of(FIVE), layout_of(list(FIVE), seeds=(0, 1)))
    assert cells(table.to_markdown(), "ce")[1] == "44.00 ± 8.49" and len(table.runs) == 6


def test_several_metrics_and_lower_is_better(frame_of: Frames, layout_of: Layouts) -> None:
    frame = frame_of(FIVE)
    frame["test/nll"] = [2.0 - value for value in frame["test/top1"]]
    table = build_table(frame, layout_of(list(FIVE), metrics=(metric("test/top1"), metric("test/nll"))))
    assert "Lower is better: test NLL." in table.notes
    ce = cells(table.to_markdown(), "ce")
    assert ce[4] == ce[8] == "worse" and ce[5] == "1.5640 ± 0.0451" and len(ce) == len(table.header())


THREE_METRICS = tuple(metric(name) for name in ("test/top1", "test/nll", "probe/attention_distance"))


def test_many_metrics_stand_in_one_overview_and_in_a_table_each(frame_of: Frames, layout_of: Layouts) -> None:
    frame = frame_of(FIVE)
    frame["test/nll"] = [2.0 - value for value in frame["test/top1"]]
    frame["probe/attention_distance"] = frame["test/top1"]
    marked = [LayoutRow(row, row, marks=("✓",)) for row in FIVE]
    made = layout_of(marked, metrics=(*THREE_METRICS, metric("time/step_milliseconds")), marks=("on",))
    frame["time/step_milliseconds"] = 2.0
    table = build_table(frame, made)
    assert table.header() == ["row", "on", *(shown.heading for shown in made.metrics), "÷ reference", "n"]
    assert "Differences, p and verdicts: in a table of each metric." in table.notes
    alone = [build_table(frame, layout_of(list(FIVE), metrics=(shown,))) for shown in THREE_METRICS]
    assert [detail.sheet for detail in table.details] == [one.sheet for one in alone]
    assert alone[0].details == [] == build_table(frame, layout_of(list(FIVE), metrics=THREE_METRICS[:2])).details
    overview = {row[0].text: row for _, rows in table.blocks() for row in rows}
    for place, one in enumerate(alone):
        for line in one.lines:
            cell = overview[line.row.name][2 + place]
            assert (cell.text, cell.bold) == (one.cells(line)[1].text, line.comparisons[0].significant)
    assert any(cell.bold for cell in overview["ce"]) and not any(cell.bold for cell in overview["basd"])
    page, latex = table.to_markdown(), table.to_latex()
    places = [page.index(f"\n## {shown.label}\n") for shown in THREE_METRICS]
    assert (
        places == sorted(places) and page.index("Differences, p") < places[0] and "ms a step\n" not in page[places[0] :]
    )
    assert [latex.count(rf"\label{{tab:losses{end}}}") for end in ("", "-1", "-2", "-3", "-4")] == [1, 1, 1, 1, 0]
    assert table.to_html().count("<table>") == 4
    # every number, also where a terminal is narrow
    for width in (60, 80, 200):
        said = "".join(table.to_text(width).split())
        assert all("".join(one.cells(line)[2].text.split()[:1]) in said for one in alone for line in one.lines)
        assert "…" not in said and max(map(len, table.to_text(width).splitlines())) <= width


def test_a_metric_that_only_describes_is_neither_better_nor_worse(frame_of: Frames, layout_of: Layouts) -> None:
    frame = frame_of(FIVE)
    frame["probe/attention_distance"] = frame["test/top1"]
    table = build_table(frame, layout_of(list(FIVE), metrics=(metric("probe/attention_distance"),)))
    ce = cells(table.to_markdown(), "ce")
    assert ce[4] == "differs" and ce[2].startswith("**")
    notes = " ".join(table.notes)
    assert "Differs: significant, in a metric of which neither direction is better." in notes
    assert "Lower is better" not in notes and "Bold" in notes


def test_every_metric_that_a_file_can_name_is_known() -> None:
    for name in (*COSTS, *PROBES):
        assert metric(name).name == name and metric(name).label != Metric(name, name.replace("/", " ")).label


def test_costs_stand_beside_their_ratio_to_the_reference(frame_of: Frames, layout_of: Layouts) -> None:
    frame = frame_of({"basd": {0: 0.5, 1: 0.6}, "ce": {0: 0.4, 1: 0.4}, "part": {0: 0.4}})
    frame["time/step_milliseconds"] = [30.0, 50.0, 10.0, 20.0, 7.0]
    costs = (metric("time/step_milliseconds"), metric("system/peak_megabytes"))
    frame["system/peak_megabytes"] = math.nan
    table = build_table(frame, layout_of(["basd", "ce", "part"], reference="ce", metrics=costs, seeds=(0, 1)))
    assert table.header() == ["row", "ms a step", "÷ reference", "peak MB", "÷ reference", "n"]
    text = table.to_markdown()
    # another set of seeds has no ratio, and a metric that nobody logged none either
    assert cells(text, "basd")[:5] == ["basd", "40.0 ± 14.1", "2.67", "–", "–"]
    assert cells(text, "ce")[2] == "1.00" and cells(text, "part")[1:3] == ["7.0", "–"]
    assert "÷ reference: the mean over that of ce." in text and "Δ" not in text and "n too small" not in text
    for shown in (table.to_latex(), table.to_csv()):
        assert "ms a step" in shown or "time/step_milliseconds" in shown


def test_versions_do_not_mix_unless_allowed(frame_of: Frames, layout_of: Layouts) -> None:
    frame = frame_of(FIVE)
    frame.loc[frame["row"] == "ce", "version"] = "def5678-dirty"
    layout = layout_of(list(FIVE))
    with pytest.raises(UserError, match=r"abc1234 \(10 arms\), def5678-dirty \(5 arms\).*--allow-mixed-code"):
        build_table(frame, layout)
    notes = " ".join(build_table(frame, layout, allow_mixed_code=True).notes)
    assert "Arms of several code versions: abc1234 (10 arms), def5678-dirty (5 arms)." in notes and "-dirty." in notes
    # a row that is not shown, or an arm that has not finished, mixes nothing
    assert build_table(frame, layout_of(["basd", "near"])).notes
    frame.loc[frame["row"] == "ce", "status"] = "RUNNING"
    assert "Code version: abc1234" in " ".join(build_table(frame, layout).notes)


def test_the_csv_holds_the_numbers_and_the_runs_csv_every_run(frame_of: Frames, layout_of: Layouts) -> None:
    frame = frame_of(FIVE, unfinished={("near", 9): "RUNNING"})
    table = build_table(frame, layout_of(list(FIVE)))
    lines = {line["row"]: line for line in csv.DictReader(io.StringIO(table.to_csv()))}
    expected = compare(frame, "test/top1", reference="basd")["ce"]
    assert float(lines["ce"]["delta"]) == pytest.approx(100 * expected.delta) and lines["ce"]["unit"] == "points"
    assert float(lines["ce"]["p_holm"]) == pytest.approx(expected.p_holm) and lines["basd"]["delta"] == ""
    runs = list(csv.DictReader(io.StringIO(table.to_runs_csv())))
    assert {(run["row"], int(run["seed"])): run["run_id"] for run in runs} == {
        (row, seed): f"run-{row}-{seed}" for row, seed in zip(frame["row"], frame["seed"], strict=True)
    }
    for row, seeds in FIVE.items():  # every mean can be computed again from the runs
        numbers = [float(run["test/top1"]) for run in runs if run["row"] == row and run["status"] == "FINISHED"]
        assert numbers == list(seeds.values())


def test_reports_are_byte_identical_whatever_the_order_of_the_runs(
    frame_of: Frames, layout_of: Layouts, tmp_path: Path
) -> None:
    frame, layout = frame_of(FIVE), layout_of(list(FIVE), notes=("Plan 1234.",))
    first = write_report(frame, layout, tmp_path / "a" / "deep")
    second = write_report(frame.sample(frac=1, random_state=1), layout, tmp_path / "b")
    endings = ("md", "tex", "csv", "runs.csv", "html", "json", "forest.pdf", "forest.png")
    assert [path.name for path in first.paths] == [f"losses.{ending}" for ending in endings]
    for one, two in zip(first.paths, second.paths, strict=True):
        assert one.read_bytes() == two.read_bytes()
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == sorted(path.name for path in second.paths)


def test_a_directory_that_cannot_be_written_is_named(frame_of: Frames, layout_of: Layouts, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written to .*file"):
        write_report(frame_of(FIVE), layout_of(list(FIVE)), tmp_path / "file")
    (tmp_path / "losses.tex").mkdir()  # the second rename fails
    with pytest.raises(UserError, match="cannot be written"):
        write_report(frame_of(FIVE), layout_of(list(FIVE)), tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_a_layout_that_makes_no_sense_is_refused(layout_of: Layouts) -> None:
    with pytest.raises(UserError, match="not one of its rows"):
        layout_of(["a"], reference="b")
    with pytest.raises(UserError, match="twice"):
        layout_of(["a", "a"])
    with pytest.raises(UserError, match="cannot be named"):
        layout_of(["a"], name="../a")
    with pytest.raises(UserError, match="no metric"):
        layout_of(["a"], metrics=())


def test_sections_and_the_terminal(frame_of: Frames) -> None:
    rows = (LayoutRow("basd", "Complete"), LayoutRow("ce", "CE [only]", "Controls"), LayoutRow("near", NASTY, "Other"))
    table = build_table(frame_of(FIVE), Layout("t", "Title [red]", rows, "basd", question="Why?"))
    text = table.to_text()
    assert "CE [only]" in text and "Controls" in text and "Title [red]" in text and "77.00 ± 1.58" in text
    assert text == table.to_text() and "| *Controls* |" in table.to_markdown()
    assert max(map(len, table.to_text(60).splitlines())) <= 60


def document(body: str) -> str:
    return "\\documentclass{article}\n\\usepackage{booktabs}\n\\begin{document}\n" + body + "\n\\end{document}\n"


def nasty_table(frame_of: Frames) -> str:
    rows = (LayoutRow("basd", NASTY), LayoutRow("ce", "[x] first", NASTY), LayoutRow("near", "* second", "S"))
    layout = Layout("a_b", NASTY, rows, "basd", question=NASTY, notes=(NASTY, "--allow-mixed-code"))
    return build_table(frame_of(FIVE), layout).to_latex()


def test_latex_has_the_structure_of_a_booktabs_table(frame_of: Frames) -> None:
    text = nasty_table(frame_of)
    assert text.isascii() and text.count(r"\begin{") == text.count(r"\end{") == 3
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1 and r"\label{tab:a_b}" in text
    body = [line for line in text.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert len(body) == 4 and all(line.replace(r"\&", "").count("&") == 5 for line in body)


@pytest.mark.full
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles(frame_of: Frames, tmp_path: Path) -> None:
    (tmp_path / "t.tex").write_text(document(nasty_table(frame_of)))
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and (tmp_path / "t.pdf").exists(), done.stdout[-2000:]
    assert "Missing character" not in (tmp_path / "t.log").read_text(errors="replace")


def test_escape_latex() -> None:
    for text, latex in (
        ("a_b & 5 %", r"a\_b \& 5 \%"),
        (r"\{}$#~^", r"\textbackslash{}\{\}\$\#\textasciitilde{}\textasciicircum{}"),
        ("x\n  y", "x y"),
        ("a-b --no ---x", "a-b -{}-no -{}-{}-x"),
        ("[a] *b", "{[}a{]} {*}b"),
        ("λ ± −1 ÷ 2", r"$\lambda$ $\pm$ $-$1 $\div$ 2"),
        ("Müller, naïve, Å", r"M\"{u}ller, na\"{i}ve, \r{A}"),
        ("中", "{[}U+4E2D{]}"),
    ):
        assert escape_latex(text) == latex


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=40))
def test_escapes_never_leave_anything_active(text: str) -> None:
    latex = escape_latex(text)
    assert latex.isascii() and latex.isprintable()
    depth = 0
    for i, character in enumerate(latex):
        if character in "{}" and (i == 0 or latex[i - 1] != "\\"):
            depth += 1 if character == "{" else -1
            assert depth >= 0
    assert depth == 0
    assert "\n" not in escape_markdown(text) and "|" not in escape_markdown(text).replace(r"\|", "")


def test_metric_defaults() -> None:
    assert metric("val/top5") == Metric("val/top5", "val top-5", True, True, 2)
    assert metric("test/ece").percent and not metric("test/nll").higher_is_better
    assert metric("probe/distance").label == "probe distance" and metric("speed").label == "speed"
