"""Files of sweeps/ and what the command line makes of them: every mistake is one sentence before any compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from basd.errors import UserError
from basd.grid.sweeps import SAMPLERS, load_sweep, sweep_files

GOOD = {
    "question": "?",
    "metric": "val/top1",
    "overrides": ["method=basd"],
    "space": {"weighting.temperature": "tag(log, interval(0.1, 10))", "weighting.scale": "choice(first, none)"},
    "sampler": {"name": "tpe", "startup": 3},
    "trials": 6,
    "batch": 3,
    "seeds": [0],
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()

    def put(name: str = "mine", **changes: object) -> None:
        values = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
        (tmp_path / "sweeps" / f"{name}.yaml").write_text(yaml.safe_dump(values))

    return put


def test_the_sweeps_that_come_with_it_can_be_run() -> None:
    names = {"uwso", "weights", "lr_entropy", "joint"}
    assert names <= set(sweep_files())
    for name in names:
        sweep = load_sweep(name)
        assert sweep.defaults is not None and sweep.question.endswith("?"), name
        assert not any(metric.startswith("test/") for metric in sweep.metrics), name
        # the larger setting too
        load_sweep(name, ["data=cifar100", "student=deit_tiny", "teacher=dinov2_vits14", "recipe=cifar"])


def test_the_command_line_adds_fixes_and_changes(write) -> None:
    write()
    sweep = load_sweep(
        "mine", ["weighting.scale=none", "losses.rsd.kappa=choice(0.01,0.1)", "trials=20", "sampler.startup=5"]
    )
    assert list(sweep.space) == ["weighting.temperature", "losses.rsd.kappa"]
    assert "weighting.scale=none" in sweep.overrides and sweep.trials == 20
    assert (sweep.sampler.name, sweep.sampler.startup) == ("tpe", 5)
    assert load_sweep("mine", ["sampler=gp"]).sampler.name == "gp"
    assert load_sweep("mine", ["seeds=[3,4]"]).seeds == (3, 4)


def test_more_trials_are_the_same_sweep_and_another_space_or_place_to_run_is_not_or_is(write) -> None:
    write()
    same = load_sweep("mine")
    assert load_sweep("mine", ["trials=60", "batch=2"]).study == same.study
    assert load_sweep("mine", ["ledger.url=postgresql://me:secret@host/x", "runtime.processes=1"]).hash == same.hash
    assert load_sweep("mine", ["weighting.temperature=interval(1,2)"]).hash != same.hash
    assert load_sweep("mine", ["seeds=[1]"]).hash != same.hash
    assert load_sweep("mine", ["recipe.lr=0.002"]).setting != same.setting


def test_the_preset_is_tried_first_where_it_lies_in_the_space(write) -> None:
    write()
    assert load_sweep("mine").defaults == {"weighting.temperature": 2.0, "weighting.scale": "first"}
    assert load_sweep("mine", ["weighting.temperature=interval(3,4)"]).defaults is None
    assert load_sweep("mine", ["defaults_first=false"]).defaults is None


def test_groups_can_be_searched(write) -> None:
    write(space={"selector": "choice(uniform, adaptive_spectral)", "weighting": "choice(uwso, equal)"})
    assert load_sweep("mine").defaults == {"selector": "adaptive_spectral", "weighting": "uwso"}


def test_a_grid_has_as_many_trials_as_combinations(write) -> None:
    write(
        space={"weighting.scale": "choice(first, none)", "student.points": "range(1, 4)"}, sampler="grid", trials=None
    )
    assert load_sweep("mine").trials == 6
    assert load_sweep("mine", ["trials=4"]).trials == 4


STAGES: list[tuple[str, list[int], list[tuple[int, ...]]]] = [
    ("none", [0, 1], [(0, 1)]),
    ("hyperband", [0], [(0,)]),
    ("hyperband", [5, 1, 2], [(5,), (1, 2)]),
    ("wilcoxon", [0, 1, 2, 3, 4, 5], [(0, 1, 2, 3), (4,), (5,)]),
    ("wilcoxon", [0, 1, 2, 3], [(0, 1, 2, 3)]),
]


def test_seeds_are_trained_in_stages_of_decisions(write) -> None:
    for pruner, seeds, stages in STAGES:
        write(pruner=pruner, seeds=seeds)
        assert load_sweep("mine").stages == stages, (pruner, seeds)


WRONG: list[tuple[dict[str, object], list[str], str]] = [
    ({"spac": {}}, [], "spac is not known here; did you mean space"),
    ({"space": None}, [], "space is empty"),
    ({"trials": None}, [], "lacks trials"),
    ({"metric": "test/top1"}, [], "the test set chooses nothing"),
    ({"metric": "val/top2"}, [], "val/top1"),
    ({"metric": []}, [], "at least one metric"),
    ({"space": {"weighting.temprature": "interval(1, 2)"}}, [], "temperature"),
    ({"space": {"weighting.scale": "choice(first, nne)"}}, [], "none"),
    ({"space": {"weighting.temperature": "interval(-1, 2)"}}, [], "at least"),
    ({"space": {"selector": "choice(uniform, adaptive)"}}, [], "adaptive_spectral"),
    ({"space": {"weighting.temperature": "2"}}, [], "one value and nothing to search"),
    ({"space": {"seed": "choice(0, 1)"}}, [], "seeds"),
    ({"space": {"data.classes": "choice(0, 1)"}}, [], "changes the data"),
    ({"space": {"runtime.threads": "choice(1, 2)"}}, [], "does not change a result"),
    ({"sampler": "tp"}, [], "did you mean tpe"),
    ({"sampler": {"name": "random", "startup": 3}}, [], "sampler.startup is not a setting"),
    ({"pruner": "hyperbnd"}, [], "did you mean hyperband"),
    ({"pruner": "wilcoxon"}, [], "at least 4"),
    ({"pruner": "hyperband", "metric": ["val/top1", "val/nll"]}, [], "judges by one metric"),
    ({"pruner": "hyperband", "space": {"recipe.duration": "choice(2 epochs,3 epochs)"}}, [], "equal epochs"),
    ({"seeds": [0, 0]}, [], "names a seed twice"),
    ({"seeds": 3}, [], "whole numbers"),
    ({"batch": 0}, [], "batch=0"),
    ({"sampler": "grid"}, [], "sampler=grid needs choice or range"),
    ({}, ["trials=many"], "trials=many"),
    ({}, ["weighting.temperature=2", "weighting.scale=none"], "nothing is left to search"),
    ({}, ["setting=x"], "setting="),
    ({}, ["seed=1"], "seeds"),
    ({}, ["selector.temperture=0.5"], "temperature"),
]  # fmt: skip


def test_what_is_wrong_is_one_sentence(write) -> None:
    for changes, overrides, said in WRONG:
        write(**changes)
        with pytest.raises(UserError) as error:
            load_sweep("mine", overrides)
        assert said in str(error.value), (changes, overrides)


def test_unknown_names_and_tables_are_told_apart(write) -> None:
    write()
    with pytest.raises(UserError, match="did you mean mine"):
        load_sweep("mien")
    with pytest.raises(UserError, match="basd grid losses"):
        load_sweep("losses")
    write("main")
    with pytest.raises(UserError, match="both a sweep and an ablation"):
        load_sweep("main")


def test_a_file_that_is_no_yaml_is_named_with_its_line(write, tmp_path: Path) -> None:
    (tmp_path / "sweeps" / "broken.yaml").write_text("space:\n  a: [1\ntrials: 3\n")
    with pytest.raises(UserError, match=r"sweeps/broken.yaml is not readable as YAML at line"):
        load_sweep("broken")


def test_every_sampler_has_a_name_of_its_own() -> None:
    assert all(kind().name == name for name, kind in SAMPLERS.items())
