"""The layout in an ablation's file: marks from resolved configurations, figures of others; a mistake is one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis import metric
from basd.compose import compose
from basd.config import Config, flatten
from basd.errors import UserError
from basd.grid.ablations import FINAL, Ablation, load_ablation
from basd.grid.layout import SHARES, Reported, marks_of

HEAD = "question: x\nreference: a\nseeds: [0]\n"
ROW = "rows: [{name: a, overrides: []}]\n"
SWITCH = (
    "factors: {u: {on: [selector=uniform, weighting=equal], off: []}, T: {1: [recipe.lr=0.1], 2: [recipe.lr=0.2]}}\n"
)


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()

    def make(text: str) -> Ablation:
        (tmp_path / "experiments" / "mine.yaml").write_text(text)
        return load_ablation("mine")

    return make


def configs(**rows: list[str]) -> dict[str, Config]:
    return {row: compose(overrides).config for row, overrides in rows.items()}


# -- marks -------------------------------------------------------------------------------------------------------------


def test_marks_tell_the_resolved_configuration() -> None:
    marks = {
        "rsd": ["losses.rsd.enabled"],
        "uniform": ["selector=uniform"],
        "both": ["selector=uniform", "weighting.scale=first"],
        "T": ["weighting.temperature"],
        "selector": ["selector"],
        "lr": ["recipe.lr=1e-3"],
    }
    rows = configs(
        basd=["method=basd"],
        plain=["method=basd", "selector=uniform", "losses.rsd.enabled=false", "weighting.temperature=5"],
        equal=["method=basd", "selector=uniform", "weighting=equal", "weighting.scale=none"],
        ce=["method=ce"],
    )
    assert marks_of(marks, rows) == {
        "basd": ("✓", "–", "–", "2", "adaptive_spectral", "✓"),
        "plain": ("–", "✓", "✓", "5", "uniform", "✓"),
        # a setting that the row's weighting does not have
        "equal": ("✓", "✓", "–", "–", "uniform", "✓"),
        # and settings that are written in its configuration without an effect
        "ce": ("–", "–", "–", "–", "–", "✓"),
    }
    assert rows["ce"].to_dict()["weighting"]["name"] == rows["basd"].to_dict()["weighting"]["name"]


def test_a_label_cannot_make_a_mark(load) -> None:
    """A row that says "with rsd" and turns it off has no mark."""
    ablation = load(
        HEAD + "marks: {rsd: losses.rsd.enabled}\nrows:\n"
        "  - {name: a, label: with rsd, overrides: [method=basd, losses.rsd.enabled=false]}\n"
    )
    assert marks_of(ablation.marks, configs(a=list(ablation.rows[0].overrides))) == {"a": ("–",)}


def test_every_setting_that_changes_a_result_can_be_a_mark() -> None:
    rows = configs(basd=["method=basd"], ce=["method=ce"], deit=["method=deit_hard"], a2d=["method=a2d"])
    settings = {key for config in rows.values() for key, _ in flatten(config.to_dict())}
    outside = {key for key in settings if key.split(".")[0] in ("seed", "runtime", "tracking", "ledger", "method")}
    marks = marks_of({key: [key] for key in settings - outside}, rows)
    assert {len(shown) for shown in marks.values()} == {len(settings - outside)} and len(settings - outside) > 80
    assert len(outside) > 5
    for key in outside:
        with pytest.raises(UserError, match="is not a setting that changes a result"):
            marks_of({key: [key]}, rows)
    # a group by its name, and a setting that only another choice of the group has
    assert marks_of({"w": ["weighting"], "T": ["weighting.temperature"]}, configs(a=["weighting=equal"])) == {
        "a": ("equal", "–")
    }


def test_equal_means_equal_as_a_setting() -> None:
    rows = configs(a=["method=basd", "student.points=[0,1]", "warmup.length=0"])
    wanted = {"list": ["student.points=[0,1]"], "other": ["student.points=[1]"], "zero": ["warmup.length=0.0"],
              "truth": ["warmup.length=false"], "on": ["losses.rel.enabled=true"]}  # fmt: skip
    assert marks_of(wanted, rows)["a"] == ("✓", "–", "✓", "–", "✓")


def test_factors_can_be_the_marks(load) -> None:
    ablation = load(HEAD.replace("reference: a", "reference: u+T=1") + SWITCH + "marks: factors\n")
    assert ablation.marks == {"u": ("selector=uniform", "weighting=equal"), "T": ("recipe.lr",)}
    rows = configs(**{row.name: list(row.overrides) for row in ablation.rows})
    assert marks_of(ablation.marks, rows) == {
        "u+T=1": ("✓", "0.1"), "u+T=2": ("✓", "0.2"), "T=1": ("–", "0.1"), "T=2": ("–", "0.2")}  # fmt: skip


def test_the_marks_of_the_tables_that_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    losses, literal = load_ablation("losses"), load_ablation("literal")
    shown = marks_of(losses.marks, configs(**{row.name: list(row.overrides) for row in losses.rows}))
    assert list(losses.marks) == ["rsd", "rel", "attn", "spectral"]
    for row in losses.rows:
        assert shown[row.name] == tuple("✓" if row.factors[name] == "on" else "–" for name in losses.marks)
    shown = marks_of(literal.marks, configs(**{row.name: list(row.overrides) for row in literal.rows}))
    counts = [shown[row.name].count("✓") for row in literal.rows]
    assert counts == [0, 0, 1, 2, 3, 4] and shown["targets"] == ("✓", "–", "–", "–")


MEANINGLESS = [
    ({"x": ["losses.rsd.enabeld"]}, "marks: x: losses.rsd.enabeld is not a setting that changes a result; the nearest: losses.rsd.enabled"),
    ({"x": ["qqq"]}, "qqq is not a setting that changes a result; write a key of the command line"),
    ({"x": ["method=basd"]}, "method is not a setting that changes a result"),
    ({"x": ["seed"]}, "seed is not a setting that changes a result"),
    ({"x": ["selector=unifrom"]}, "unifrom is not a choice of selector; did you mean uniform?"),
    ({"x": ["weighting.scale=frist"]}, "frist is not a choice of weighting.scale; did you mean first?"),
    ({"x": ["selector=[a"]}, "is not KEY=VALUE as on the command line"),
]  # fmt: skip


def test_a_mark_that_means_nothing_is_one_sentence() -> None:
    rows = configs(a=["method=basd"])
    for marks, said in MEANINGLESS:
        with pytest.raises(UserError) as error:
            marks_of(marks, rows)
        assert said in str(error.value) and "\n" not in str(error.value) and str(error.value).endswith("."), marks


# -- figures of others, and mistakes -----------------------------------------------------------------------------------


def test_figures_are_kept_as_the_source_writes_them(load) -> None:
    ablation = load(
        HEAD + ROW + "metric: [test/top1, test/nll]\nnotes: [One., 'Two & three.']\nreported:\n"
        "  - {label: A, source: arXiv 1, values: {test/top1: 74.5, test/nll: 1}}\n"
        "  - {label: B, source: '2502.20760', section: S, values: {test/top1: '68.00'}}\n"
    )
    assert ablation.notes == ("One.", "Two & three.")
    assert ablation.reported == (
        Reported("A", "arXiv 1", {"test/top1": "74.5", "test/nll": "1"}, "Reported by others, of other settings"),
        Reported("B", "2502.20760", {"test/top1": "68.00"}, "S"),
    )


def test_figures_of_rows_are_the_reference_s_unless_the_file_names_others(load) -> None:
    rows = "rows: [{name: a, overrides: []}, {name: b, overrides: [method=ce]}]\n"
    assert load(HEAD + rows).figures == ("a",)
    assert load(HEAD + rows + "figures: all\n").figures == ("a", "b")
    assert load(HEAD + rows + "figures: [b]\n").figures == ("b",)
    assert load(HEAD + rows + "figures: []\n").figures == ()


def test_percent_here_is_percent_in_tables() -> None:
    for name in FINAL:
        assert metric(name).percent == (name.rpartition("/")[2] in SHARES)


def test_main_shows_figures_of_other_settings_in_sections_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main = load_ablation("main")
    sections = {row.section for row in main.rows}
    assert main.reported and all(one.section.startswith("Reported: ") for one in main.reported)
    assert not sections & {one.section for one in main.reported} and all(one.source for one in main.reported)
    # cost takes over the rows of main, not what others say of their accuracy
    assert load_ablation("cost").reported == ()


def figures(text: str) -> str:
    return HEAD + ROW + f"reported: [{text}]\n"


BROKEN = [
    (HEAD + ROW + "marsk: {}\n", "marsk is not known here; did you mean marks?"),
    (HEAD + ROW + "marks: factors\n", "marks: factors needs factors, and the file has none"),
    (HEAD + ROW + "marks: [a]\n", "marks must name settings by column title"),
    (HEAD + ROW + "marks: {a: []}\n", "marks: a must be one setting"),
    (HEAD + ROW + "marks: {a: [selector=uniform, losses.rsd.enabled]}\n", "marks: a must be one setting, or a list"),
    (HEAD + ROW + "factors: {u: {on: [], off: [x=1]}}\nmarks: factors\n", "u, whose level on sets nothing"),
    (HEAD + ROW + "factors: {u: {a: [x=1], b: [y=1]}}\nmarks: factors\n", "u, whose levels do not choose one setting"),
    (HEAD + ROW + "factors: {u: {a: [x=1], b: []}}\nmarks: factors\n", "u, whose levels do not choose one setting"),
    (HEAD + ROW + "notes: x\n", "notes must be a list of sentences"),
    (HEAD + ROW + "notes: [1]\n", "notes must be a list of sentences"),
    (HEAD + ROW + "figures: a\n", "figures must be a list of rows"),
    (HEAD + ROW + "figures: [b]\n", "figures: b is not a row"),
    (HEAD + ROW + "reported: x\n", "reported must be a list"),
    (figures("x"), "'x' needs label, source and values"),
    (figures("{label: A, values: {test/top1: 7}}"), "'A' needs label, source and values"),
    (figures("{label: A, source: 2502.20760, values: {test/top1: 7}}"), "put a number such as '2012.12877' in quotes"),
    (figures("{label: A, source: s, values: {test/top2: 7}}"), "test/top2 is not a metric of this table; did you mean test/top1?"),
    (figures("{label: A, source: s, values: {}}"), "values must name a figure"),
    (figures("{label: A, source: s, values: {test/top1: high}}"), "test/top1: high is not a number"),
    (figures("{label: A, source: s, values: {test/top1: true}}"), "is not a number"),
    (figures("{label: A, source: s, values: {test/top1: .nan}}"), "is not a number"),
    (figures("{label: A, source: s, values: {test/top1: 0.745}}"), "0.745 must be in percent, such as 74.5"),
    (figures("{label: A, source: s, values: {test/top1: 745}}"), "745 must be in percent"),
    (figures("{label: A, source: s, values: {test/top1: 7}, n: 3}"), "reported A: n is not known here"),
    (figures("{label: A, source: s, values: {test/top1: 7}}, {label: A, source: t, values: {test/top1: 8}}"), "two entries are labelled"),
]  # fmt: skip


def test_a_broken_layout_is_one_sentence(load) -> None:
    for text, said in BROKEN:
        with pytest.raises(UserError) as error:
            load(text)
        assert said in str(error.value) and str(error.value).startswith("experiments/mine.yaml"), text
        assert "\n" not in str(error.value) and str(error.value).endswith("."), text
