"""From training to the frames: what an arm wrote is what the histories give back."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import analysis
from basd.config import FrozenArm, from_dict
from basd.tracking.files import write_json
from basd.tracking.journal import Journal, read_events
from basd.tracking.mirror import Mirror
from basd.training.cohort import train_cohort


def test_histories_of_a_trained_arm(tiny_arm: Callable[..., FrozenArm], store: Path, tmp_path: Path) -> None:
    arm = tiny_arm("warmup=none", "recipe.duration=2 epochs")
    directory, uri = tmp_path / "runs" / arm.arm_key, f"sqlite:///{shutil.copy(store, tmp_path / 'mlflow.db')}"
    write_json(directory / "arm.json", arm.to_dict())
    journal, calls = Journal(directory), iter(range(100))
    # stopped in the second epoch and gone on with
    train_cohort([arm], [directory], [journal], stop=lambda: next(calls) >= 7)
    (result,) = train_cohort([arm], [directory], [journal])
    assert result.status == "complete"
    journal.end("complete", "", result.metrics)
    journal.close()
    mirror = Mirror(uri)
    mirror.add(directory, labels={"tiny": "basd"})
    assert mirror.drain(60.0), mirror.problem

    logged = {
        (event.step, name): value
        for event in read_events(directory / "journal.jsonl")
        for name, value in event.metrics.items()
        if not event.end
    }
    frame = analysis.histories("tiny", ["train/*", "loss/*", "selector/*"], tracking_uri=uri)
    found = {(line.step, line.metric): line.value for line in frame.itertuples()}
    assert found == {
        place: value for place, value in logged.items() if place[1].startswith(("train/", "loss/", "selector/"))
    }
    weights = analysis.weight_history("tiny", tracking_uri=uri)
    assert set(weights["part"]) == {"attn", "rel", "rsd", "spectral"} and set(weights["row"]) == {"basd"}

    mixtures = analysis.selector_history("tiny", tracking_uri=uri)
    places = [set(mixtures[name]) for name in ("step", "point", "layer")]
    assert places == [{5, 10}, set(from_dict(arm.config).points), {0, 1}] and len(mixtures) == 8
    assert mixtures.groupby(["step", "point"])["value"].sum().sub(1).abs().max() < 1e-5
    csv = (directory / "artifacts" / "selector_history.csv").read_text().splitlines()[1:]
    assert [f"{step},{point},{layer},{value:.6g}" for *_, step, point, layer, value in mixtures.itertuples()] == csv
    assert mixtures.attrs["warnings"] == []
