"""`basd bench` on tiny models: what is compared with what, the arithmetic of the ratios, and what is printed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tiny import TINY

import analysis
from basd.benchmarks import analysis as reading
from basd.benchmarks import cohort, data, step, taps
from basd.benchmarks.timing import Times, alternate
from basd.cli import main
from basd.errors import UserError
from basd.tracking.runs import ApiRuns, open_runs

SMALL = [
    *(text for text in TINY if not text.startswith(("recipe.duration", "recipe.validate_every"))),
    *("teacher=digits_vit", "teacher.weights=null", "student=digits_tiny", "recipe.batch_size=20"),
]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASD_CACHE", str(tmp_path_factory.getbasetemp() / "bench-cache"))


def test_ratios_are_of_neighbours() -> None:
    """A machine that slows down tenfold while it is measured changes no ratio."""
    times = Times({"a": [1.0, 2.0, 10.0], "b": [2.0, 4.0, 20.0]})
    assert times.ratio(lambda at: at["b"] / at["a"]) == 2.0
    assert times["a"] == 2.0
    assert [(m.name, m.least, m.most) for m in times.measures()] == [("a", 1.0, 10.0), ("b", 2.0, 20.0)]


def test_actions_alternate_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []
    times = alternate({name: lambda name=name: calls.append(name) for name in "ab"}, 3, torch.device("cpu"), warm=2)
    assert calls == ["a", "b"] * 5
    assert [len(values) for values in times.seconds.values()] == [3, 3]


def test_taps() -> None:
    report = taps.run(SMALL, 2)
    assert len(report.measures) == 4 and report.settings["blocks"] == [0, 1]
    assert all(measure.seconds > 0 and measure.least <= measure.seconds <= measure.most for measure in report.measures)
    assert [ratio.reach for ratio in report.ratios] == ["≤ 1.20", "", ""]
    assert all(math.isfinite(ratio.value) and ratio.value > 0 for ratio in report.ratios)


def test_step() -> None:
    report = step.run(SMALL, 2)
    seconds = {measure.name: measure.seconds for measure in report.measures}
    assert set(seconds) == {"plain teacher forward", "plain student forward and backward", "complete step"}
    # a complete step holds both plain passes
    assert report.ratios[0].value > 1
    throughput, unit = report.figures["throughput"]
    assert unit == "images/s" and throughput == pytest.approx(20 / seconds["complete step"])
    assert report.figures["arithmetic"][0] > 0


def test_cohort() -> None:
    report = cohort.run(SMALL, 2)
    # the least of the repeats: other programs on the machine change it least
    least = {measure.name: measure.least for measure in report.measures}
    assert least["solo step"] < least["step of two"] < least["step of 8"]
    ratios = {ratio.name: ratio for ratio in report.ratios}
    assert ratios["cohort of 8 ÷ (T + 8·S)"].reach == "≤ 1.10"
    # sharing can save the teacher, no more
    assert 1 <= ratios["speed-up that T and S allow"].value <= 8


@pytest.mark.full
def test_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # digits of the tests' size: those of `basd train` have a teacher that takes a minute
    tiny = [text for text in TINY if not text.startswith("recipe.duration")]
    monkeypatch.setattr(data, "DIGITS", [*tiny, *data.DIGITS])
    data.write_jpegs(tmp_path / "images", 9)
    assert len(list((tmp_path / "images" / "train").rglob("*.JPEG"))) == 9
    assert len(list((tmp_path / "images" / "val").rglob("*.JPEG"))) == data.CLASSES
    report = data.run([*SMALL, "runtime.workers=1"], 4)
    waits = {ratio.name: ratio.value for ratio in report.ratios}
    assert set(waits) == {"data wait of digits ÷ step", "data wait of folder of JPEGs ÷ step"}
    assert all(0 <= value <= 1 for value in waits.values())


@pytest.fixture
def copied(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark makes stores in folders of its own; making one takes seconds, copying it does not."""
    monkeypatch.setattr("basd.tracking.mlflow_store._create", lambda path: shutil.copy(store, path))


@pytest.mark.usefixtures("copied")
def test_analysis() -> None:
    """Both ways must read the same runs and, to the last bit, the same values."""
    report = reading.run([], 1, analysis.load, runs=11)
    assert [measure.name for measure in report.measures] == ["analysis.load", "mlflow.search_runs"]
    assert report.settings["runs"] == 11 and report.ratios[0].reach == "≥ 10"

    def lacks_a_run(*args: Any, **options: Any) -> pd.DataFrame:
        return analysis.load(*args, **options).head(10)

    def differs_in_a_bit(*args: Any, **options: Any) -> pd.DataFrame:
        frame = analysis.load(*args, **options)
        frame.loc[3, "test/nll"] = math.nextafter(frame.loc[3, "test/nll"], 1.0)
        return frame

    for load in (lacks_a_run, differs_in_a_bit):
        with pytest.raises(AssertionError, match="read different values"):
            reading.run([], 1, load, runs=11)
    with pytest.raises(UserError, match="selector=uniform does nothing"):
        reading.run(["selector=uniform"], 1, analysis.load)


def test_the_api_gives_all_pages_too(store: Path, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    shutil.copy(store, tmp_path / "mlflow.db")
    experiment = reading.write_store(tmp_path / "mlflow.db", 11)
    by_tables, by_api = open_runs(uri), ApiRuns(uri, page=5)
    found = by_api.runs(experiment)
    assert len(found) == 11 and found == by_tables.runs(experiment)
    by_tables.close()


def test_the_command_prints_ratios_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "taps", "--repeats", "1", *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "plain fused forward" in printed and "≤ 1.20" in printed
    assert main(["bench", "taps", "--repeats", "1", "--json", "-", *SMALL]) == 0
    assert json.loads(capsys.readouterr().out)["what"] == "taps"


def test_bad_input_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for words, said in ((["--repeats", "0"], "measures nothing"), (["student.widht=3"], "widht is not a setting")):
        assert main(["bench", "step", *words]) == 2, words
        printed = capsys.readouterr().err
        assert said in printed and "Traceback" not in printed, words
