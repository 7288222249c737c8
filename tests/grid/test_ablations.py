"""Ablation files: factors become rows, a mistake is one sentence, and every file that ships can be run."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

from basd.compose import compose, overridden_keys
from basd.config import digest, normalized, without_effect
from basd.errors import UserError
from basd.grid.ablations import Ablation, ablation_files, load_ablation, merge_overrides

SHIPPED = Path(__file__).parents[2] / "experiments"
TABLES = sorted(file.stem for file in SHIPPED.glob("*.yaml"))
LOSSES = ("rsd", "rel", "attn", "spectral")

HEAD = "question: x\nreference: a\nseeds: [0]\n"
TWO = "factors:\n  u: {on: [selector=uniform], off: []}\n  w: {on: [weighting=equal], off: []}\n"


def effective(*overrides: str) -> str:
    """The computation that overrides lead to, whatever its seed."""
    return digest(normalized(compose(overrides).config))


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()

    def make(text: str, name: str = "mine") -> Ablation:
        (tmp_path / "experiments" / f"{name}.yaml").write_text(text)
        return load_ablation(name)

    return make


# -- files that ship ---------------------------------------------------------------------------------------------------


def test_the_tables_that_ship() -> None:
    axes = {"main", "losses", "selectors", "aligners", "weighting", "warmup", "views", "rsd", "rel", "attn", "spectral"}
    assert {*axes, "literal", "leave_one_out"} <= set(TABLES)
    assert set(TABLES) <= set(ablation_files())


def test_a_shipped_table_opens_with_question_command_and_cost() -> None:
    for name in TABLES:
        lines = (SHIPPED / f"{name}.yaml").read_text().splitlines()
        assert lines[0].startswith("# Question: "), name
        assert lines[1] == f"# Command:  basd grid {name}"
        assert re.match(r"# Cost:     \d+ arms of \d+ steps\b.* \d+ (minutes|seconds) on \d+ CPU cores", lines[2]), name


# rows that equal another one for the digits student, not for deeper ones
TWINS = {"selectors/every_block": "basd"}


@pytest.mark.parametrize(
    "names", [["literal", "leave_one_out"], pytest.param(TABLES, marks=pytest.mark.full)], ids=["two", "all"]
)
def test_every_row_of_a_shipped_table_can_be_trained_and_differs_from_the_others(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    problems = []
    for name in names:
        computations: dict[str, str] = {}
        for row in load_ablation(name).rows:
            place = f"{name}/{row.name}"
            try:
                config = compose(row.overrides).config
            except UserError as error:
                problems.append(f"{place}: {error}")
                continue
            problems += [f"{place}: {text}" for text in without_effect(config, overridden_keys(row.overrides))]
            twin = computations.setdefault(digest(normalized(config)), row.name)
            if twin != row.name and TWINS.get(place) != twin:
                problems.append(f"{place} is the same computation as {twin}")
    assert not problems, "\n".join(problems)


def test_losses_is_every_combination_of_four() -> None:
    ablation = load_ablation("losses")
    combinations = {tuple(row.factors[name] for name in LOSSES): row for row in ablation.rows}
    assert set(combinations) == set(itertools.product(("on", "off"), repeat=4))
    assert len(ablation.rows) == 16
    for levels, row in combinations.items():
        on = [name for name, level in zip(LOSSES, levels, strict=True) if level == "on"]
        if on and len(on) < 4:
            assert row.name == "+".join(on)
            assert row.label == " + ".join(on)
            assert row.section == f"{len(on)} of the 4 losses"
        assert compose(row.overrides).config.enabled == tuple(on)
    assert combinations["on", "on", "on", "on"].name == ablation.reference == "basd"
    assert effective(*combinations["off", "off", "off", "off"].overrides) == effective("method=ce")
    counts = [
        sum(level == "on" for level in row.factors.values()) for row in ablation.rows if row.name not in ("basd", "ce")
    ]
    assert counts == sorted(counts, reverse=True)


def test_leave_one_out_is_a_part_of_losses() -> None:
    all_of_them = {effective(*row.overrides) for row in load_ablation("losses").rows}
    assert {effective(*row.overrides) for row in load_ablation("leave_one_out").rows} <= all_of_them


def test_literal_ends_at_the_complete_method() -> None:
    """One correction a row; the last one makes `basd`."""
    rows = {row.name: row.overrides for row in load_ablation("literal").rows}
    steps = ["literal", "targets", "values", "order"]
    for before, after in itertools.pairwise(steps):
        assert len(set(rows[after]) - set(rows[before])) == 1
        assert set(rows[before]) < set(rows[after])
    assert effective(*rows["order"]) != effective(*rows["basd"])
    assert effective(*rows["order"], "weighting.scale=first") == effective(*rows["basd"]) == effective("method=basd")


# -- factors -----------------------------------------------------------------------------------------------------------


def test_factors_give_a_row_for_every_combination(load) -> None:
    ablation = load(HEAD.replace("reference: a", "reference: u+w") + TWO)
    assert {row.name: row.overrides for row in ablation.rows} == {
        "u+w": ("selector=uniform", "weighting=equal"),
        "u": ("selector=uniform",),
        "w": ("weighting=equal",),
        "none": (),
    }
    assert [row.label for row in ablation.rows] == ["u + w", "u", "w", "none"]
    assert ablation.rows[1].factors == {"u": "on", "w": "off"}
    assert ablation.factors == {"u": ("on", "off"), "w": ("on", "off")}


def test_levels_with_names_of_their_own(load) -> None:
    ablation = load(
        HEAD.replace("reference: a", "reference: T=1+scale=none")
        + "overrides: [method=basd]\nsection: sweep\nfactors:\n"
        + "  T: {1: [weighting.temperature=1], 2: [weighting.temperature=2]}\n"
        + "  scale: {first: [weighting.scale=first], none: [weighting.scale=none]}\n"
    )
    expected = [
        (f"T={t}+scale={s}", f"T={t}, scale={s}", ("method=basd", f"weighting.temperature={t}", f"weighting.scale={s}"))
        for t in (1, 2)
        for s in ("first", "none")
    ]
    assert [(row.name, row.label, row.overrides) for row in ablation.rows] == expected
    assert {row.section for row in ablation.rows} == {"sweep"}


def test_a_row_may_take_the_place_of_a_combination_and_another_stand_beside(load) -> None:
    ablation = load(
        HEAD + "overrides: [method=basd]\n" + TWO + "section: '{on} on'\nrows:\n"
        "  - {name: a, label: both, section: first, factors: {w: on, u: on}}\n"
        "  - {name: b, factors: {u: off, w: off}, overrides: [method=ce, seed_of_nothing=1]}\n"
        "  - {name: c, overrides: [weighting=fixed]}\n"
    )
    rows = {row.name: row for row in ablation.rows}
    assert list(rows) == ["a", "b", "c", "u", "w"]
    assert rows["a"].overrides == ("method=basd", "selector=uniform", "weighting=equal")
    assert list(rows["a"].factors.items()) == [("u", "on"), ("w", "on")]
    # its own override replaces the file's
    assert rows["b"].overrides == ("method=ce", "seed_of_nothing=1")
    assert rows["c"].overrides == ("method=basd", "weighting=fixed")
    assert rows["c"].factors == {}
    assert [rows[name].section for name in ("a", "b", "u", "w")] == ["first", "", "1 on", "1 on"]


def test_of_two_overrides_for_one_key_the_later_counts() -> None:
    assert merge_overrides(["a=1", "b=2"], ["c=3"], ["a=4", "c=5"]) == ["b=2", "a=4", "c=5"]
    assert merge_overrides(["a=1"], []) == ["a=1"]
    assert merge_overrides(["losses.rsd.kappa=1"], ["losses.rsd=x"]) == ["losses.rsd.kappa=1", "losses.rsd=x"]


def test_rows_of_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They keep names, labels and sections; this file's overrides come last. Files cannot name each other in a circle."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()

    def write(name: str, text: str) -> None:
        (tmp_path / "experiments" / f"{name}.yaml").write_text(text)

    write(
        "one",
        HEAD + "rows: [{name: a, overrides: [method=ce, seed_of=1]}, {name: b, label: B, section: s, overrides: []}]\n",
    )
    write(
        "two",
        HEAD
        + "metric: [test/top1, test/nll]\nrows_of: one\noverrides: [seed_of=2]\nrows: [{name: c, overrides: []}]\n",
    )
    two = load_ablation("two")
    assert [(row.name, row.label, row.section, row.overrides) for row in two.rows] == [
        ("a", "a", "", ("method=ce", "seed_of=2")),
        ("b", "B", "s", ("seed_of=2",)),
        ("c", "c", "", ("seed_of=2",)),
    ]
    assert two.metrics == ("test/top1", "test/nll") and load_ablation("one").metrics == ("test/top1",)
    write("three", HEAD + "rows_of: three\n")
    with pytest.raises(UserError, match="takes its own rows from another file"):
        load_ablation("three")
    write("four", HEAD + "rows_of: oen\n")
    with pytest.raises(UserError, match="rows_of: oen is not an ablation; did you mean one"):
        load_ablation("four")
    write("five", HEAD + "rows_of: one\n" + TWO)
    with pytest.raises(UserError, match="rows_of and factors do not go together"):
        load_ablation("five")


# -- mistakes ----------------------------------------------------------------------------------------------------------

ROW = "rows: [{name: a, overrides: []}]\n"


BROKEN = [
    ("rows: [", "is not readable as YAML"),
    ("", "it is empty"),
    ("- a\n", "it is empty"),
    ("question: x\n", "it lacks reference, seeds, rows; it needs question, reference, seeds, and rows or factors"),
    ("question: x\nreference: b\nseeds: [0]\n" + ROW, "the reference b is not a row"),
    (HEAD + "rows: [{name: a, overrides: []}, {name: a, overrides: []}]\n", "two rows are named a"),
    (
        HEAD + "rows: [{name: a, label: x, overrides: []}, {name: b, label: x, overrides: []}]\n",
        'two rows are labelled "x"',
    ),
    (HEAD + ROW + "metirc: y\n", "metirc is not known here; did you mean metric?"),
    (HEAD + ROW + "metric: test/top2\n", "test/top2 is not a final metric"),
    (HEAD + ROW + "metric: []\n", "metric must name at least one metric, each once"),
    (HEAD + ROW + "metric: [test/nll, test/nll]\n", "metric must name at least one metric, each once"),
    (HEAD.replace("[0]", "[0, 0]") + ROW, "must be different whole numbers"),
    (HEAD.replace("[0]", "3") + ROW, "must be different whole numbers"),
    (HEAD + "rows: a\n", "rows must be a list"),
    (HEAD + "rows: [a]\n", "the row 'a' lacks a name"),
    (HEAD + "rows: [{overrides: []}]\n", "lacks a name"),
    (HEAD + "rows: [{name: a}]\n", "row a lacks overrides"),
    (HEAD + "rows: [{name: a, overrides: method=basd}]\n", "row a: overrides must be a list"),
    (HEAD + "rows: [{name: a, overrides: [seed=7]}]\n", "row a: overrides sets seed"),
    (HEAD + "rows: [{name: a b, overrides: []}]\n", "the row name a b must be letters"),
    (HEAD + "rows: [{name: a, overrides: [], lable: x}]\n", "row a: lable is not known here; did you mean label?"),
    (HEAD + ROW + "overrides: [seed=1]\n", "overrides sets seed"),
    (HEAD + ROW + "overrides: x\n", "overrides must be a list"),
    (HEAD + ROW + "factors: {}\n", "factors is empty"),
    (HEAD + ROW + "factors:\n", "factors is empty"),
    (HEAD + ROW + "factors: {u: {on: []}}\n", "factor u needs at least two levels"),
    (HEAD + ROW + "factors: {u: [on, off]}\n", "factor u needs at least two levels"),
    (HEAD + ROW + "factors: {u: {on: selector=uniform, off: []}}\n", "level on: overrides must be a list"),
    (HEAD + ROW + "factors: {u: {on: [seed=1], off: []}}\n", "level on: overrides sets seed"),
    (HEAD + ROW + "factors: {u: {a b: [], off: []}}\n", "the name a b must be letters"),
    (
        HEAD + ROW + "factors: {u: {on: [x=1], off: []}, v: {on: [x=2], off: []}}\n",
        "the factors u and v both set x",
    ),
    (HEAD + "rows: [{name: a, factors: {u: on}}]\n", "row a names factors, but the file has none"),
    (HEAD + TWO + "rows: [{name: a, factors: [u]}]\n", "factors must name a level of each factor"),
    (HEAD + TWO + "rows: [{name: a, factors: {u: on}}]\n", "row a: factors lacks w"),
    (HEAD + TWO + "rows: [{name: a, factors: {u: on, ww: on}}]\n", "ww is not a factor; did you mean w?"),
    (
        HEAD + TWO + "rows: [{name: a, factors: {u: on, w: maybe}}]\n",
        "maybe is not a level of w; choose one of: off, on",
    ),
    (
        HEAD + TWO + "rows: [{name: a, factors: {u: on, w: on}}, {name: b, factors: {w: on, u: on}}]\n",
        "the rows a and b are the same combination",
    ),
    (HEAD + TWO + "rows: [{name: a, overrides: []}, {name: u, overrides: []}]\n", "two rows are named u"),
    ("!!python/object/apply:os.system ['touch ran']", "is not readable as YAML"),
]


def test_a_broken_file_is_one_sentence(load, tmp_path: Path) -> None:
    for text, said in BROKEN:
        with pytest.raises(UserError) as error:
            load(text)
        assert said in str(error.value), text
        assert str(error.value).startswith("experiments/mine.yaml") and str(error.value).endswith("."), text
        assert "\n" not in str(error.value), text
    assert not (tmp_path / "ran").exists()


def test_a_file_name_that_cannot_name_a_table(load) -> None:
    with pytest.raises(UserError, match="rename the file"):
        load(HEAD + ROW, name="a b")
