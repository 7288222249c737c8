"""Ablations become frozen arms; every mistake is told before anything is fitted or trained."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from tiny import TINY

from basd.compose import compose
from basd.errors import UserError
from basd.grid.ledger import Ledger
from basd.grid.plan import Plan, Preparer, effective_differences, make_plan


@pytest.fixture
def tiny_plan(preparer: Preparer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Plans in an empty directory. The teacher is fitted once: `preparer` names its cache."""
    monkeypatch.chdir(tmp_path)

    def make(name: str = "leave_one_out", *overrides: str) -> Plan:
        return make_plan(name, [*TINY, *overrides])

    return make


@pytest.fixture(scope="module")
def leave_one_out(preparer: Preparer) -> Plan:
    return make_plan("leave_one_out", TINY)


def test_leave_one_out_is_six_rows_by_three_seeds(leave_one_out: Plan) -> None:
    plan = leave_one_out
    assert [row.name for row in plan.rows] == [
        "basd",
        "without_rsd",
        "without_rel",
        "without_attn",
        "without_spectral",
        "ce",
    ]
    assert plan.reference == "basd"
    assert plan.seeds == (0, 1, 2)
    assert len(plan.arms) == 18
    assert len({arm.configuration_key for arm in plan.arms.values()}) == 6
    assert len({arm.cohort_key for arm in plan.arms.values()}) == 3
    for row in plan.rows:
        for seed, key in plan.cells[row.name].items():
            assert plan.arms[key].seed == seed == plan.arms[key].config["seed"]
            assert plan.labels_of(key) == [row.name]
    assert plan.arms[plan.cells["without_rsd"][0]].config["losses"]["rsd"]["enabled"] is False
    # no name says what the whole setting shares
    assert plan.arms[plan.cells["ce"][0]].name == "ce"
    assert "without rel" in plan.arms[plan.cells["without_rel"][0]].name


def test_plan_survives_its_file(leave_one_out: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = leave_one_out.save()
    assert Plan.load(path) == leave_one_out
    assert path.name == f"leave_one_out-{leave_one_out.hash}.json"
    path.write_text(path.read_text()[:200])
    with pytest.raises(UserError, match="is not a plan"):
        Plan.load(path)


def test_a_directory_that_is_a_file_is_one_sentence(
    leave_one_out: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot be written .*; run in a directory that can be"):
        leave_one_out.save()


def test_two_tables_share_their_arms_and_one_study(tiny_plan, tmp_path: Path) -> None:
    losses, fewer = tiny_plan("losses", "seeds=[0]"), tiny_plan("leave_one_out", "seeds=[0]")
    assert len(losses.arms) == 16
    assert len(fewer.arms) == 6
    assert set(fewer.arms) < set(losses.arms)
    assert fewer.setting == losses.setting
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db", losses.setting)
    first = ledger.ensure(fewer.arms.values(), {key: fewer.labels_of(key) for key in fewer.arms}, fewer.name)
    second = ledger.ensure(losses.arms.values(), {key: losses.labels_of(key) for key in losses.arms}, losses.name)
    assert (len(first), len(second)) == (6, 10)
    states = ledger.arms()
    assert len(states) == 16
    shared = losses.cells["rel+attn+spectral"][0]
    assert states[shared].labels == {"leave_one_out": ["without_rsd"], "losses": ["rel+attn+spectral"]}
    assert optuna.get_all_study_names(f"sqlite:///{tmp_path}/ledger.db") == [losses.setting]


def test_factor_levels_stay_in_the_plan(tiny_plan) -> None:
    plan = tiny_plan("losses", "seeds=[0]", "rows=[basd,rsd+rel,ce]")
    assert [row.name for row in plan.rows] == ["basd", "ce", "rsd+rel"]
    assert plan.rows[2].factors == {"rsd": "on", "rel": "on", "attn": "off", "spectral": "off"}
    assert set(plan.rows[1].factors.values()) == {"off"}
    assert Plan.load(plan.save()).rows == plan.rows


def test_the_layout_stays_in_the_plan_and_marks_are_those_of_its_arms(tiny_plan, tmp_path: Path) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "laid_out.yaml").write_text(
        "question: x\nreference: a\nseeds: [0]\nnotes: [One.]\nmarks: {rsd: losses.rsd.enabled, lr: recipe.lr}\n"
        "reported: [{label: R, source: S, values: {test/top1: 74.5}}]\nrows:\n"
        "  - {name: a, overrides: [method=basd]}\n  - {name: b, label: with rsd, overrides: [method=ce]}\n"
    )
    plan = Plan.load(tiny_plan("laid_out", "recipe.lr=0.01").save())
    assert plan.row_marks == {"a": ("✓", "0.01"), "b": ("–", "0.01")}
    assert plan.notes == ("One.",) and plan.reported[0].values == {"test/top1": "74.5"}
    # a table is the same plan however it is laid out
    assert plan.hash == tiny_plan("laid_out", "recipe.lr=0.01").hash


def test_plans_written_before_there_were_factors_or_several_metrics_still_load(tiny_plan) -> None:
    plan = tiny_plan("leave_one_out", "seeds=[0]", "rows=[basd,ce]")
    values = plan.to_dict()
    (values["metric"],) = values.pop("metrics")
    for row in values["rows"]:
        del row["factors"]
    for layout in ("marks", "reported", "notes"):
        del values[layout]
    assert Plan.from_dict(values) == plan


DIFFERENCES = [
    ([], [], []),
    ([], ["losses.rel.enabled=false", "losses.attn.enabled=false"], ["without rel, attn"]),
    # consequences are not said: one loss is not weighted, none reads no teacher
    ([], [f"losses.{name}.enabled=false" for name in ("rsd", "rel", "attn")], ["without rsd, rel, attn"]),
    ([], ["method=ce"], ["without rsd, rel, attn, spectral"]),
    (["method=ce"], ["losses.rsd.enabled=false"], ["with rel, attn, spectral"]),
    ([], ["selector=uniform"], ["selector: adaptive_spectral → uniform"]),
    ([], ["selector.entropy=none"], ["selector.entropy: sparsify → none"]),
    ([], ["selector.temperature=0.5"], ["selector.temperature: 1 → 0.5"]),
    ([], ["weighting=fixed", "weighting.weights.rel=3"], ["weighting: uwso → fixed", "weighting.weights.rel: 3"]),
    ([], ["losses.rsd.kappa=0.1"], ["losses.rsd.kappa: 0.01 → 0.1"]),
    ([], ["student.points=1"], ["student.points: [1,2] → [2]"]),
    ([], ["recipe.lr=0.002", "views=single"], ["recipe.lr: 0.001 → 0.002", "views: dual → single"]),
    # another form of the same computation
    ([], ["student.points=[1,2]"], []),
    (["losses.attn.enabled=false"], ["losses.attn.enabled=false", "head_aligner=none"], []),
]


def test_differences_are_said_in_words() -> None:
    for reference, row, words in DIFFERENCES:
        found = effective_differences(compose([*TINY, *reference]).config, compose([*TINY, *row]).config)
        assert sorted(found) == sorted(words), row


def test_a_teacher_of_its_own_is_said(tiny_plan, tmp_path: Path) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "two.yaml").write_text(
        "question: x\nreference: a\nseeds: [0, 1]\nrows:\n  - {name: a, overrides: []}\n"
        "  - {name: b, overrides: [teacher.image_size=15]}\n"
        "  - {name: c, overrides: [method=ce, teacher.image_size=15]}\n"
    )
    plan = tiny_plan("two")
    assert len([notice for notice in plan.notices if "a teacher of its own" in notice]) == 1
    assert next(n for n in plan.notices if "own" in n).startswith("row b has a teacher of its own, ")
    keys = {row: {plan.arms[key].cohort_key for key in cell.values()} for row, cell in plan.cells.items()}
    assert not keys["a"] & keys["b"]
    assert {len(cell) for cell in keys.values()} == {2}


def test_command_line_changes_the_setting_and_every_row(tiny_plan) -> None:
    plain, changed = tiny_plan(), tiny_plan("leave_one_out", "recipe.lr=0.01", "seeds=[5]", "rows=[basd,ce]")
    assert changed.setting != plain.setting
    assert len(changed.arms) == 2
    assert {arm.config["recipe"]["lr"] for arm in changed.arms.values()} == {0.01}
    assert not set(plain.arms) & set(changed.arms)
    assert tiny_plan("leave_one_out", "runtime.cohort_size=2").hash == plain.hash


def test_rows_that_are_one_computation_share_arms(tiny_plan, tmp_path: Path) -> None:
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "folded.yaml").write_text(
        "question: do they fold?\nreference: a\nseeds: [0, 1]\nrows:\n"
        "  - {name: a, overrides: [method=basd, weighting=equal]}\n"
        "  - {name: b, overrides: [method=basd, weighting=fixed]}\n"
        "  - {name: c, overrides: [method=ce, losses.rsd.kappa=0.5]}\n"
    )
    plan = tiny_plan("folded")
    assert plan.cells["a"] == plan.cells["b"]
    assert len(plan.arms) == 4
    assert plan.labels_of(plan.cells["a"][0]) == ["a", "b"]
    assert plan.notices == ("row c: losses.rsd.kappa has no effect in this combination",)


BAD_INPUT = [
    ("leave_one_ot", [], "leave_one_ot is not an ablation; did you mean leave_one_out?"),
    (
        "leave_one_out",
        ["rows=[basd,without_rsdd]"],
        "without_rsdd is not a row of leave_one_out; did you mean without_rsd?",
    ),
    ("leave_one_out", ["rows=[ce]"], "the reference row basd must be among"),
    ("leave_one_out", ["seeds=[]"], "seeds must name at least one whole number"),
    ("leave_one_out", ["seeds=[a]"], "seeds must name at least one whole number"),
    ("leave_one_out", ["seeds=[1,1]"], "names a seed twice"),
    ("leave_one_out", ["seed=1"], "write seeds=[0,1,2] instead"),
    ("leave_one_out", ["selctor=uniform"], "did you mean selector?"),
    ("leave_one_out", ["student.points=[0,7]"], "student.points holds block 7"),
    ("leave_one_out", ["setting=x"], "setting= chooses among finished tables"),
]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a fitted teacher would be: nothing is there as long as none is."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("BASD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_bad_input_stops_before_anything_is_fitted(cache: Path) -> None:
    for name, overrides, said in BAD_INPUT:
        with pytest.raises(UserError) as error:
            make_plan(name, overrides)
        assert said in str(error.value), overrides
    assert list(Path.cwd().iterdir()) == [] and not cache.exists()


BAD_ROWS = [
    ("question: x\nreference: a\nseeds: []\nrows: [{name: a, overrides: []}]\n", "has no seeds"),
    (
        "question: x\nreference: a\nseeds: [0]\nrows: [{name: a, overrides: [selector=none]}]\n",
        "row a: selector=none is not known",
    ),
    (
        "question: x\nreference: a\nseeds: [0]\nrows: [{name: a, overrides: [no override]}]\n",
        'row a: "no override" is not an override',
    ),
    (
        "question: x\nreference: a\nseeds: [0]\nmarks: {x: losses.rsd.enabeld}\nrows: [{name: a, overrides: []}]\n",
        "experiments/mine.yaml: marks: x: losses.rsd.enabeld is not a setting that changes a result",
    ),
    (
        "question: x\nreference: none\nseeds: [0]\noverrides: [method=basd]\nfactors:\n"
        "  all: {on: [], off: [losses.rsd.enabled=false, losses.rel.enabled=false, losses.attn.enabled=false, "
        "losses.spectral.enabled=false]}\n",
        "row none: method=basd has every loss off",
    ),
]


def test_a_row_that_cannot_be_composed_is_one_sentence(cache: Path) -> None:
    Path("experiments").mkdir()
    for text, said in BAD_ROWS:
        Path("experiments/mine.yaml").write_text(text)
        with pytest.raises(UserError) as error:
            make_plan("mine")
        assert said in str(error.value), text
    assert not cache.exists()


def test_every_row_trains_at_least_one_step(tiny_plan, tmp_path: Path) -> None:
    """The second row is the wrong one: every row must be looked at."""
    (tmp_path / "experiments").mkdir()
    for override, said in (
        ("recipe.batch_size=5000", "more than the 1197 training images"),
        ("recipe.duration=0.01 epochs", "is less than one step"),
    ):
        (tmp_path / "experiments" / "short.yaml").write_text(
            "question: x\nreference: a\nseeds: [0]\nrows:\n"
            f"  - {{name: a, overrides: [method=basd]}}\n  - {{name: b, overrides: [{override}]}}\n"
        )
        with pytest.raises(UserError, match=said):
            tiny_plan("short")
