"""One layout in every format: sections, marks, figures of others, escaping, and the structure of LaTeX and HTML."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from made import make_layout

from analysis import Layout, LayoutRow, Reported, Table, build_table, metric, write_report
from analysis.escape import escape_html
from basd.errors import UserError

Frames = Callable[..., pd.DataFrame]
FIVE = {
    "basd": dict(enumerate([0.76, 0.79, 0.75, 0.78, 0.77])),
    "ce": dict(enumerate([0.38, 0.50, 0.41, 0.44, 0.45])),
}
NASTY = r"50 % of A_b & {c} $d$ #e <script>alert('f')</script> \h | `m` λ “n” \"q\""
FIGURES = (
    Reported("DeiT-Ti", "DeiT <2012.12877> & code", {"test/top1": "74.50"}, "Reported"),
    Reported("Older", "Someone_else", {"test/top1": "-1.5"}, "Controls"),
    Reported("DeiT-Ti, nothing", "DeiT <2012.12877> & code", {}, "Reported"),
)


ROWS = (LayoutRow("basd", "BASD", "", ("✓", "2")), LayoutRow("ce", NASTY, "Controls", ("–", "–")))


def layout(rows: Sequence[LayoutRow] = ROWS, **changes: Any) -> Layout:
    fields = {"title": NASTY, "question": NASTY, "marks": ("rsd", "T_&"), "reported": FIGURES, "notes": (NASTY,),
              "setting": "digits-a", "teacher": "vit, 99.1 % test top-1", "plan": "0123456789ab"}  # fmt: skip
    return make_layout(rows, **fields | changes)


@pytest.fixture
def table(frame_of: Frames) -> Table:
    return build_table(frame_of(FIVE), layout())


def test_cells_by_hand(table: Table) -> None:
    titles = ["row", "rsd", "T_&", "test top-1 (%)", "Δ [95 % interval]", "p (Holm)", "verdict", "n"]
    assert table.header() == titles
    texts = [(section, [[cell.text for cell in row] for row in rows]) for section, rows in table.blocks()]
    ce = ["–", "–", "43.60 ± 4.51"]
    assert texts[0] == ("", [["BASD", "✓", "2", "77.00 ± 1.58", "–", "–", "reference", "5"]])
    assert texts[1][0] == "Controls" and texts[1][1][0][1:4] == ce and texts[1][1][0][6:] == ["worse", "5"]
    assert texts[1][1][1] == ["Older [2]", "", "", "−1.5", "–", "–", "reported", "–"]
    assert texts[2] == (
        "Reported",
        [
            ["DeiT-Ti [1]", "", "", "74.50", "–", "–", "reported", "–"],
            ["DeiT-Ti, nothing [1]", "", "", "–", "–", "–", "reported", "–"],
        ],
    )
    styles = [{(cell.bold, cell.italic) for cell in row} for _, rows in table.blocks() for row in rows]
    assert styles == [{(False, False)}, {(False, False), (True, False)}, *[{(False, True)}] * 3]


def test_figures_of_others_change_nothing_that_is_computed(frame_of: Frames, table: Table) -> None:
    plain = build_table(frame_of(FIVE), layout(reported=()))
    assert [line.comparisons for line in plain.lines] == [line.comparisons for line in table.lines]
    assert "Holm-adjusted over the 1 compared rows" in " ".join(table.notes)


def test_notes_say_what_and_whence(table: Table) -> None:
    notes = "\n".join(table.notes)
    for said in ("Mean ± standard deviation over n seeds; seeds 0, 1, 2, 3, 4.", "paired-t 95 % interval", "Bold: ",
                 "rsd, T_&: as in each row's resolved configuration; ✓ on, – off or without effect there.",
                 "In italics: figures that others have reported, of other settings", "[1] DeiT <2012.12877> & code",
                 "[2] Someone_else", "Code version: abc1234 (10 arms).", "Plan 0123456789ab.",
                 "Setting: digits-a; teacher vit, 99.1 % test top-1."):  # fmt: skip
        assert said in notes, said


def test_a_missing_seed_is_shown_and_left_out_of_the_difference(frame_of: Frames) -> None:
    values = {"basd": FIVE["basd"], "ce": {seed: FIVE["ce"][seed] for seed in (0, 1, 2, 3)}}
    table = build_table(frame_of(values, unfinished={("ce", 4): "RUNNING"}), layout(seeds=(0, 1, 2, 3, 4)))
    row = [cell.text for cell in table.blocks()[1][1][0]]
    assert row[3] == "43.25 ± 5.12" and row[4].startswith("−33.75 [") and row[7] == "4/5"
    notes = " ".join(table.notes)
    assert (
        "seed 4 (running)." in notes and "Differences are of the seeds that a row and the reference both have." in notes
    )


def test_the_csv_keeps_figures_of_others_out_of_the_means(table: Table) -> None:
    lines = list(csv.DictReader(io.StringIO(table.to_csv())))
    ours, theirs = lines[:2], lines[2:]
    assert [line["mean"] for line in theirs] == ["", ""] and {line["row"] for line in theirs} == {""}
    assert [(line["label"], line["reported"], line["source"]) for line in theirs] == [
        ("DeiT-Ti", "74.50", "DeiT <2012.12877> & code"), ("Older", "-1.5", "Someone_else")]  # fmt: skip
    assert [(line["rsd"], line["T_&"]) for line in ours] == [("✓", "2"), ("–", "–")] and ours[0]["reported"] == ""


def test_markdown_is_one_table_whatever_the_labels(table: Table) -> None:
    rows = [line for line in table.to_markdown().splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {9}
    assert rows[1] == "| :-- | :-: | :-: | --: | --: | --: | :-- | --: |"
    assert r"| *DeiT-Ti \[1\]* |  |  | *74.50* | *–* | *–* | *reported* | *–* |" in rows


def test_terminal_shows_marks_and_figures(table: Table) -> None:
    text = table.to_text(200)
    assert "✓" in text and "DeiT-Ti [1]" in text and "[2] Someone_else" in text


# -- LaTeX -------------------------------------------------------------------------------------------------------------

KNOWN = {
    *("usepackage", "providecommand", "checkmark", "ensuremath", "surd", "begin", "end", "centering", "footnotesize"),
    *(
        "setlength",
        "tabcolsep",
        "caption",
        "label",
        "toprule",
        "midrule",
        "bottomrule",
        "multicolumn",
        "textit",
        "textbf",
    ),
    *("par", "smallskip", "linewidth", "raggedright", "textbackslash", "textless", "textgreater", "textbar"),
    *("textasciigrave", "textendash", "pm", "lambda", "Delta", "shortstack", "ifdim", "width", "else", "fi"),
    "resizebox",  # which the text itself provides where a document lacks it
}


def test_latex_by_a_small_parser(table: Table) -> None:
    """Balanced braces and environments, as many cells as columns in every row, and no macro that needs a package."""
    text = table.to_latex()
    assert text.isascii()
    bare = re.sub(r"\\[\\{}$&#%_]", lambda found: " " if found[0] != r"\\" else r"\\", text)
    assert set(re.findall(r"\\([A-Za-z]+)", bare)) <= KNOWN
    depth = 0
    for character in bare:
        depth += (character == "{") - (character == "}")
        assert depth >= 0
    assert depth == 0
    stack: list[str] = []
    for what, name in re.findall(r"\\(begin|end)\{(\w+)\}", bare):
        if what == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert stack == []
    (columns,) = re.findall(r"\\begin\{tabular\}\{(\w+)\}", bare)
    assert columns == "lccrrrlr"
    body = bare[bare.index(r"\toprule") : bare.index(r"\bottomrule")]
    rows = [line.strip() for line in body.splitlines() if line.endswith(r"\\")]
    for row in rows:
        spans = sum(int(number) - 1 for number in re.findall(r"\\multicolumn\{(\d+)\}", row))
        assert row.count("&") + 1 + spans == len(columns), row
    assert len(rows) == 1 + 2 + 5
    assert r"BASD & \checkmark{} & 2 & 77.00 $\pm$ 1.58 &" in text
    assert text.count(r"\providecommand{\checkmark}") == 1
    assert text.index(r"\providecommand{\resizebox}[3]{#3}") < text.index(r"\resizebox{\ifdim")
    assert r"\textit{DeiT-Ti {[}1{]}} &  &  & \textit{74.50}" in text


@pytest.mark.full
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
@pytest.mark.parametrize("packages", ["booktabs", "booktabs,amssymb"])
def test_latex_compiles_with_and_without_a_check_mark_of_the_document(
    table: Table, packages: str, tmp_path: Path
) -> None:
    text = f"\\documentclass{{article}}\\usepackage{{{packages}}}\\begin{{document}}\n{table.to_latex()}\\end{{document}}\n"
    (tmp_path / "t.tex").write_text(text)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.full
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_of_many_columns_fits_the_line(frame_of: Frames, tmp_path: Path) -> None:
    frame = frame_of(FIVE).assign(**{"test/nll": 1.0, "test/ece": 0.1})
    metrics = tuple(map(metric, ("test/top1", "test/nll", "test/ece")))
    text = build_table(frame, layout(metrics=metrics, reported=())).to_latex()
    for packages, overfull in (("booktabs,graphicx", False), ("booktabs", True)):
        head = f"\\documentclass{{article}}\\usepackage{{{packages}}}\\begin{{document}}\n"
        (tmp_path / "t.tex").write_text(f"{head}{text}\\end{{document}}\n")
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout[-2000:]
        assert ("Overfull" in done.stdout) == overfull
    small = (LayoutRow("basd", "a"), LayoutRow("ce", "b"))
    assert "resizebox" not in build_table(frame, layout(small, marks=(), reported=())).to_latex()


def test_latex_without_marks_defines_none(frame_of: Frames) -> None:
    rows = (LayoutRow("basd", "a"), LayoutRow("ce", "b"))
    assert "checkmark" not in build_table(frame_of(FIVE), layout(rows, marks=())).to_latex()


# -- HTML --------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Every element closed in order, the cells of every row, links, and the text of notes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.rows: list[list[str]] = []
        self.widths: list[int] = []
        self.targets: list[str] = []
        self.tags: set[str] = set()
        self.items: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        self.targets += [value or "" for name, value in attrs if name in ("href", "src")]
        assert not any(name.startswith("on") for name in given)
        if tag not in ("meta", "img"):
            self.stack.append(tag)
        if tag == "tr":
            self.rows.append([])
            self.widths.append(0)
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.widths[-1] += int(given.get("colspan") or 1)
        if tag == "li":
            self.items.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.stack or "th" in self.stack:
            self.rows[-1][-1] += data
        elif "li" in self.stack:
            self.items[-1] += data


def test_html_is_a_whole_page_with_the_same_cells(table: Table) -> None:
    text = table.to_html(["losses.pairs.png"])
    page = Page(text)
    assert page.rows[0] == table.header() and set(page.widths) == {8}
    cells = [row for row in page.rows[1:] if len(row) == 8]
    assert cells == [[cell.text for cell in row] for _, rows in table.blocks() for row in rows]
    assert tuple(page.items) == table.notes
    assert not page.tags & {"script", "link", "iframe", "object", "base", "form"}
    assert page.targets == ["../index.html", "losses.csv", "losses.runs.csv", "losses.tex", "losses.md",
                            "losses.pairs.pdf", "losses.pairs.png"]  # fmt: skip
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text and "</caption>" in text
    assert "http" not in text and "url(" not in text and "@import" not in text
    css = text[text.index("<style>") : text.index("</style>")]
    assert css.count("{") == css.count("}") and set(re.findall(r"var\((--\w+)\)", css)) <= set(
        re.findall(r"(--\w+):", css)
    )


def test_escape_html() -> None:
    for text, html in (
        ("<a> & \"b\" 'c'", "&lt;a&gt; &amp; &quot;b&quot; &#x27;c&#x27;"),
        ("x\n  y\x00", "x y\ufffd"),
        ("λ ± 中", "λ ± 中"),
    ):
        assert escape_html(text) == html


def test_every_format_is_the_same_bytes_again_and_shows_figures_beside_it(frame_of: Frames, tmp_path: Path) -> None:
    for name in ("losses.pairs.png", "losses.pairs.pdf", "losses.small.pairs.png", "other.pairs.png"):
        (tmp_path / name).write_bytes(b"")
    frame = frame_of(FIVE)
    first = {path: path.read_bytes() for path in write_report(frame, layout(), tmp_path).paths}
    assert [path.name.removeprefix("losses") for path in first] == [
        ".md",
        ".tex",
        ".csv",
        ".runs.csv",
        ".html",
        ".json",
        ".forest.pdf",
        ".forest.png",
    ]
    again = write_report(frame.sample(frac=1, random_state=3), layout(), tmp_path)
    assert {path: path.read_bytes() for path in again.paths} == first
    pictures = re.findall(r'src="([^"]+)"', (tmp_path / "losses.html").read_text())
    assert pictures == ["losses.forest.png", "losses.pairs.png"]


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_a_layout_whose_marks_or_figures_fit_no_column_is_refused() -> None:
    with pytest.raises(UserError, match="Row 'basd' .* has 2 marks for 1 columns"):
        layout(marks=("rsd",))
    with pytest.raises(
        UserError, match="'x' reports 'test/top2', which table 'losses' does not show; it shows test/top1"
    ):
        layout(reported=(Reported("x", "s", {"test/top2": "1"}),), metrics=(metric("test/top1"), metric("test/nll")))
