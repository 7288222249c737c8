"""The report of a sweep, from studies written here trial by trial: every number is known beforehand."""

from __future__ import annotations

import csv
import itertools
import math
import shlex
import statistics
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial
from PIL import Image

from analysis.escape import escape_html
from analysis.render.sweep_page import sweep_page
from analysis.sweeps import (
    LEAST_FOR_IMPORTANCE,
    command,
    load_sweep,
    ranked,
    short_names,
    sweep_entry,
    to_csv,
    to_markdown,
    to_rich,
    tracked,
    write_sweep_report,
)
from basd.errors import UserError

LR, SCALE = "recipe.lr", "weighting.scale"
DISTRIBUTIONS = {LR: FloatDistribution(1e-4, 1e-2, log=True), SCALE: CategoricalDistribution(["first", "none"])}
STUDY = "digits-a-b-c sweep mine abc"


def facts(**changes: Any) -> dict[str, Any]:
    return {
        "name": "mine", "setting": "digits-a-b-c", "question": "Which | rate?", "metrics": ["val/top1"], "seeds": [0, 1],
        "overrides": ["recipe.duration=2 epochs", "method=basd"], "space": {LR: "tag(log, interval(1e-4, 1e-2))",
        SCALE: "choice(first, none)"}, "sampler": {"name": "tpe", "startup": 3, "seed": 0},
        "pruner": {"name": "hyperband", "least_epochs": 1, "reduction_factor": 3}, "defaults": {LR: 1e-3, SCALE: "first"},
        "hash": "abc", "epochs": 4, **changes}  # fmt: skip


def value(lr: float, scale: str) -> float:
    """Nearly all of the variance is the rate's."""
    return 0.8 - 0.2 * abs(math.log10(lr) + 3) + (0.001 if scale == "none" else 0.0)


class Study:
    def __init__(self, folder: Path, **changes: Any) -> None:
        self.url = f"sqlite:///{folder}/ledger.db"
        self.facts = facts(**changes)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        directions = ["minimize" if name == "val/nll" else "maximize" for name in self.facts["metrics"]]
        self.study = optuna.create_study(study_name=STUDY, storage=self.url, directions=directions)
        self.study.set_user_attr("sweep", self.facts)

    def add(
        self,
        lr: float,
        scale: str,
        state: str = "COMPLETE",
        steps: tuple[float, ...] = (),
        version: str = "v1",
        **own: Any,
    ) -> None:
        number = len(self.study.trials)
        names = self.facts["metrics"]
        seeds = {str(seed): value(lr, scale) + (0.01 if seed else -0.01) for seed in self.facts["seeds"]}
        of_metric = {
            name: seeds if name != "val/nll" else {s: 1 + abs(v - 0.7) for s, v in seeds.items()} for name in names
        }
        complete = state == "COMPLETE"
        arms = {str(s): {"arm_key": f"{number:02d}{s}", "version": version} for s in self.facts["seeds"]}
        self.study.add_trial(
            create_trial(
                state=TrialState[state],
                values=[statistics.fmean(of_metric[name].values()) for name in names] if complete else None,
                params={LR: lr, SCALE: scale},
                distributions=DISTRIBUTIONS,
                intermediate_values=dict(enumerate(steps, 1)),
                user_attrs={"overrides": [f"{LR}={lr}", f"{SCALE}={scale}"], "arms": arms,
                            **({"values": of_metric} if complete else {}), **own},
            )
        )  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Trials of every kind; for tests that only read."""
    made = Study(tmp_path_factory.mktemp("study"))
    made.add(1e-3, "first", steps=(0.3, 0.5, 0.7))
    for lr, scale in itertools.product((2e-4, 5e-4, 2e-3, 6e-3), ("first", "none")):
        made.add(lr, scale, steps=(0.2, 0.4, 0.5))
    made.add(9e-3, "none", "PRUNED", (0.2, 0.15), reason="left by hyperband after epoch 2 of 4")
    made.add(1e-2, "none", "PRUNED", reason="the loss of step 3 is not finite (nan)", hopeless=True)
    made.add(8e-3, "none", "FAIL", reason="no space left on device")
    return made


def test_trials_are_read_as_they_were_told(study: Study) -> None:
    result = load_sweep(study.url, STUDY)
    assert [trial.state for trial in result.trials] == ["complete"] * 9 + ["pruned", "diverged", "failed"]
    assert result.best[0].number == 0 and result.first is result.trials[0]
    assert [trial.number for trial in ranked(result)][9:] == [9, 10, 11]
    values = [trial.values[0] for trial in ranked(result)[:9]]
    assert values == sorted(values, reverse=True)
    assert result.trials[3].of_seeds[0] == {
        0: pytest.approx(value(5e-4, "first") - 0.01),
        1: pytest.approx(value(5e-4, "first") + 0.01),
    }
    assert result.logarithmic == {LR}


def test_importance_is_optunas_and_finds_what_matters(study: Study) -> None:
    (shares,) = load_sweep(study.url, STUDY).importance
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    assert shares == pytest.approx(optuna.importance.get_param_importances(study.study, evaluator=evaluator))
    assert shares[LR] > 0.9 and sum(shares.values()) == pytest.approx(1)


def test_too_few_or_equal_trials_have_no_importance(tmp_path: Path) -> None:
    few = Study(tmp_path)
    for lr in (1e-3, 2e-3):
        few.add(lr, "first")
    assert load_sweep(few.url, STUDY).importance == ({},)
    for _ in range(LEAST_FOR_IMPORTANCE - 2):
        few.add(1e-3, "first")
    assert load_sweep(few.url, STUDY).importance != ({},)
    (tmp_path / "equal").mkdir()
    equal = Study(tmp_path / "equal")
    for _ in range(LEAST_FOR_IMPORTANCE):
        equal.add(1e-3, "first")
    assert load_sweep(equal.url, STUDY).importance == ({},)


def test_the_front_is_what_nothing_beats_in_both(tmp_path: Path) -> None:
    study = Study(tmp_path, metrics=["val/top1", "val/nll"])
    for lr, scale in itertools.product((2e-4, 5e-4, 1e-3, 3e-3), ("first", "none")):
        study.add(lr, scale)
    result = load_sweep(study.url, STUDY)
    points = {trial.number: trial.values for trial in result.complete}
    naive = [
        number for number, (top1, nll) in points.items()
        if not any(a >= top1 and b <= nll and (a, b) != (top1, nll) for a, b in points.values())
    ]  # fmt: skip
    assert [trial.number for trial in result.best] == naive
    assert sorted(naive) == sorted(trial.number for trial in study.study.best_trials)
    assert 1 < len(naive) < len(points)


def test_the_report_says_what_there_is_and_not_more(study: Study) -> None:
    text = to_markdown(load_sweep(study.url, STUDY))
    assert "Which \\| rate?" in text, "a bar in a text does not split a table"
    assert "12 trials: 9 complete, 1 pruned, 1 diverged, 1 failed." in text
    assert "| 9 | (15.00) |" in text and "left by hyperband after epoch 2 of 4" in text
    assert "| 10 | – |" in text and "not finite" in text
    assert "80.00 ± 1.41" in text, "the mean over two seeds and their standard deviation"
    assert "Values are of the validation split" in text and "test" not in text.lower()


def test_trials_of_several_code_versions_and_a_running_one_are_told(study: Study, tmp_path: Path) -> None:
    assert "several code versions" not in to_markdown(load_sweep(study.url, STUDY))
    assert tracked(load_sweep(study.url, STUDY))["finished"]
    other = Study(tmp_path)
    other.add(2e-3, "first")
    other.add(3e-3, "first", version="v2")
    assert "Code v1, v2" in (text := to_markdown(load_sweep(other.url, STUDY))) and "several code versions" in text
    assert tracked(load_sweep(other.url, STUDY))["finished"]
    other.add(2e-3, "first", "RUNNING")
    assert not tracked(load_sweep(other.url, STUDY))["finished"]


def test_the_command_of_a_trial_is_its_configuration(study: Study) -> None:
    result = load_sweep(study.url, STUDY)
    words = shlex.split(command(result, result.trials[1]))
    assert words == ["basd", "train", "recipe.duration=2 epochs", "method=basd", f"{LR}=0.0002", f"{SCALE}=first"]


def test_the_csv_has_a_line_for_every_arm(study: Study) -> None:
    lines = list(csv.DictReader(to_csv(load_sweep(study.url, STUDY)).splitlines()))
    assert len(lines) == 24
    assert lines[3] == {"trial": "1", "state": "complete", "seed": "1", "val/top1": repr(value(2e-4, "first") + 0.01), LR: "0.0002",
                        SCALE: "first", "arm_key": "011", "code_version": "v1", "reason": ""}  # fmt: skip
    assert lines[-1]["val/top1"] == "" and lines[-1]["reason"] == "no space left on device"


def test_the_tracker_gets_value_and_best_so_far(study: Study) -> None:
    told = tracked(load_sweep(study.url, STUDY))
    values = told["points"]["sweep/val/top1"]
    assert set(values) == set(range(9))
    best = list(itertools.accumulate(values.values(), max))
    assert list(told["points"]["sweep/best/val/top1"].values()) == best
    assert told["params"]["sampler.name"] == "tpe" and told["params"][SCALE] == "choice(first, none)"


@pytest.mark.full
def test_files_are_written_twice_alike(study: Study, tmp_path: Path) -> None:
    paths = write_sweep_report(load_sweep(study.url, STUDY), tmp_path / "one")
    again = write_sweep_report(load_sweep(study.url, STUDY), tmp_path / "two")
    assert [path.name for path in paths] == [path.name for path in again]
    assert {path.suffix for path in paths} == {".md", ".html", ".csv", ".json", ".pdf", ".png"}
    assert {path.name.split(".")[1] for path in paths if path.suffix == ".png"} == {
        "history",
        "importance",
        "slices",
        "epochs",
    }
    for path, other in zip(paths, again, strict=True):
        assert path.read_bytes() == other.read_bytes(), path.name
    for path in paths:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                low, high = picture.convert("L").getextrema()
                assert low < 100 < 200 < high, f"{path.name} is not blank"
    assert [f"![{p.stem}]({p.name})" in paths[0].read_text() for p in paths if p.suffix == ".png"] == [True] * 4


@pytest.mark.full
def test_a_front_and_seeds_in_order_are_drawn_too(tmp_path: Path) -> None:
    study = Study(
        tmp_path,
        metrics=["val/top1", "val/nll"],
        pruner={"name": "none"},
        space={LR: facts()["space"][LR], SCALE: "choice(first, none)"},
    )
    for lr in (2e-4, 5e-4, 1e-3, 3e-3):
        study.add(lr, "first")
    names = {path.name for path in write_sweep_report(load_sweep(study.url, STUDY), tmp_path / "reports")}
    assert "mine.front.png" in names and "mine.epochs.png" not in names


def test_the_page_and_the_index_know_the_best_trial(study: Study, tmp_path: Path) -> None:
    result = load_sweep(study.url, STUDY)
    html = sweep_page(result, ["mine.history.png"])
    best = result.best[0]
    assert f"Best: trial {best.number}, val top-1 (%) {100 * best.values[0]:.2f}" in html and "Which | rate?" in html
    assert f"<code>{escape_html(command(result, best))}</code>" in html and 'href="mine.history.pdf"' in html
    assert html.count("<tr>") == 1 + len(result.trials) + 1 + len(result.space)
    entry = sweep_entry(result, ["mine.history.png"])
    assert entry.facts["command"] == command(result, best) and entry.facts["study"] == STUDY
    assert entry.facts["trials"].startswith("12 trials: 9 complete") and entry.facts["code"] == "v1"
    assert entry.facts["start"].startswith("trial 0, ")


def test_nothing_complete_is_a_report_too(tmp_path: Path) -> None:
    study = Study(tmp_path)
    study.add(1e-3, "first", "RUNNING")
    result = load_sweep(study.url, STUDY)
    assert result.best == [] and result.first is None
    assert "1 running" in to_markdown(result) and to_rich(result).row_count == 1
    assert {path.suffix for path in write_sweep_report(result, tmp_path / "reports")} == {
        ".md",
        ".html",
        ".csv",
        ".json",
    }


def test_what_is_not_there_is_one_sentence(study: Study, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no study"):
        load_sweep(study.url, "another")
    (tmp_path / "text").write_text("x" * 5000)
    with pytest.raises(UserError, match="cannot be read"):
        load_sweep(f"sqlite:///{tmp_path}/text", STUDY)
    with pytest.raises(UserError, match="cannot be written"):
        write_sweep_report(load_sweep(study.url, STUDY), tmp_path / "text" / "reports")


def test_headings_are_the_shortest_that_differ() -> None:
    for keys, short in (
        (["recipe.lr", "weighting.scale"], ["lr", "scale"]),
        (["weighting.weights.rsd", "losses.rsd.kappa"], ["rsd", "kappa"]),
        (["a.x", "b.x"], ["a.x", "b.x"]),
        (["a.b.x", "c.b.x", "x"], ["a.b.x", "c.b.x", "x"]),
        (["selector"], ["selector"]),
    ):
        assert short_names(keys) == short
