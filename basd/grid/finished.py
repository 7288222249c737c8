"""Finding a finished arm by what a person has at hand: its directory, its key or a beginning of it, or its MLflow run id."""

from __future__ import annotations

import glob
import json
import os
import re
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from basd.errors import UserError
from basd.tracking.files import read_json
from basd.tracking.journal import NAME as JOURNAL
from basd.tracking.journal import last_event
from basd.tracking.mlflow_store import SUPERSEDED, check_tracking, open_client, shown, sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

T = TypeVar("T")
WEIGHTS = "student.safetensors"
# What `python -m basd.training` records where there is no journal.
PLAIN_RECORD = "metrics.jsonl"
ARM_KEY = re.compile(r"[0-9a-f]{16}")
RUN_ID = re.compile(r"[0-9a-f]{32}")
# An arm key or a beginning of it; a repetition (`basd train --again`) has its own mark behind the key.
REFERENCE = re.compile(r"[0-9a-f]{1,16}|[0-9a-f]{16}-(?P<mark>[0-9a-z][0-9a-z-]{0,99})")


@dataclass(frozen=True)
class FinishedArm:
    """A trained student and what is known of its training."""

    arm_key: str
    configuration_key: str
    mark: str  # of a repetition; "" for the arm that tables count
    setting: str
    name: str
    seed: int
    version: str  # of the code that trained it
    student: dict[str, Any]  # sections of its configuration
    data: dict[str, Any]
    metrics: dict[str, float]  # test/*, at the end of training
    weights: Path
    place: str  # where it was found, for people

    @property
    def label(self) -> str:
        """Names the arm's directory and its export; a bare word, whatever the run is called."""
        return f"{self.arm_key}-{self.mark}" if self.mark else self.arm_key


def find_finished(reference: str, runs: Path, uri: str, setting: str | None, scratch: Path) -> FinishedArm:
    """The arm that `reference` means, from `runs` or, where its files are not there, from MLflow's artifacts.

    What MLflow hands over is put into `scratch`. `UserError`: nothing or several things bear that name, the arm is not
    finished, or files are missing or damaged.
    """
    directory = _directory(reference, runs, setting)
    if directory is None:
        if RUN_ID.fullmatch(reference):
            found = _Tracked(uri).by_id(reference, scratch)
        else:
            found = _Tracked(uri).by_key(reference, setting, scratch)
        if found is None:
            raise UserError(
                f"no arm {reference} is known in {runs}/ or in MLflow ({shown(uri)}); give an arm key (basd plan and the "
                "reports name them), an MLflow run id or an arm's directory, with runtime.directory=… or tracking.uri=… "
                "where they lie elsewhere."
            )
        return found
    arm, problem = _read_directory(directory)
    if not problem:
        return arm
    # another machine may have finished it
    try:
        tracked = _Tracked(uri).by_key(arm.label, arm.setting, scratch, finished=True)
    except UserError as error:
        raise UserError(f"{problem} MLflow cannot stand in: {error}") from error
    if tracked is None:
        raise UserError(problem)
    return tracked


# -- on disk -----------------------------------------------------------------------------------------------------------


def _directory(reference: str, runs: Path, setting: str | None) -> Path | None:
    given = Path(reference)
    if (given / "arm.json").is_file():
        return given
    if not (REFERENCE.fullmatch(reference) or RUN_ID.fullmatch(reference)):
        if given.is_dir():
            raise UserError(f"{reference} is not an arm's directory: it has no arm.json.")
        raise UserError(
            f"{reference} is neither an arm's directory nor an arm key (16 hex digits, or the first of them) nor an MLflow run "
            "id (32 hex digits)."
        )
    within = glob.escape(setting) if setting else "*"
    arms = sorted(path.parent for path in runs.glob(f"{within}/*/arm.json"))
    if RUN_ID.fullmatch(reference):
        found = [arm for arm in arms if (read_json(arm / "mirror.json") or {}).get("run_id") == reference]
    else:
        found = [arm for arm in arms if arm.name == reference]
        # repetitions are called by their full name
        found = found or [arm for arm in arms if arm.name.startswith(reference) and "-" not in arm.name]
    if len(found) > 1:
        several = [f"{arm} ({(read_json(arm / 'arm.json') or {}).get('name')})" for arm in found]
        raise _ambiguous(reference, several, "give more of the key, the directory, or setting=…")
    return found[0] if found else None


def _ambiguous(reference: str, several: list[str], way_out: str) -> UserError:
    listed = "\n".join(f"  - {one}" for one in several)
    return UserError(f"{reference} means {len(several)} arms; {way_out}:\n{listed}")


def _read_directory(directory: Path) -> tuple[FinishedArm, str]:
    """What a directory says of its arm, and a sentence about what it lacks to be exported."""
    values = read_json(directory / "arm.json")
    if values is None or not isinstance(values.get("config"), dict):
        raise UserError(f"{directory / 'arm.json'} cannot be read as a frozen arm (arm.json as a plan writes it).")
    mark = directory.name.partition("-")[2] if directory.name.startswith(f"{values.get('arm_key')}-") else ""
    metrics, problem = _outcome(directory)
    weights = directory / WEIGHTS
    if not problem and not weights.is_file():
        problem = f"{directory} is complete but its {WEIGHTS} is missing; restore it, or repeat the arm with basd train --again."
    arm = _arm(values, values["config"], mark, str(values.get("setting")), metrics, weights, str(directory))
    return arm, problem


def _outcome(directory: Path) -> tuple[dict[str, float], str]:
    """Final test metrics of an arm's directory, and a sentence where it has not ended well."""
    go_on = "run the command that trains it again to go on."
    if (directory / JOURNAL).exists():
        event = last_event(directory)
        if event is not None and event.end == "complete":
            return _test_metrics(event.metrics), ""
        if event is not None and event.end == "failed":
            return {}, f"the arm in {directory} failed and has no student: {event.reason}."
        step = event.step if event is not None and not event.end else int(_progress(directory).get("step", 0))
        total = (read_json(directory / "arm.json") or {}).get("total_steps")
        return {}, f"the arm in {directory} is not finished (about step {step} of {total}); {go_on}"
    # trained without a tracker: the student is written after the last step
    metrics: dict[str, float] = {}
    if (directory / WEIGHTS).is_file() and (directory / PLAIN_RECORD).is_file():
        with open(directory / PLAIN_RECORD, encoding="utf-8") as file:
            lines = file.read().splitlines()
        try:
            metrics = _test_metrics(json.loads(lines[-1])["metrics"]) if lines else {}
        except (ValueError, KeyError, TypeError, AttributeError):
            metrics = {}
    return metrics, "" if metrics else f"the arm in {directory} is not finished; {go_on}"


def _progress(directory: Path) -> dict[str, Any]:
    return read_json(directory / "progress.json") or {}


def _test_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in sorted(metrics.items()) if name.startswith("test/")}


def _arm(
    facts: Mapping[str, Any],
    config: Mapping[str, Any],
    mark: str,
    setting: str,
    metrics: dict[str, float],
    weights: Path,
    place: str,
) -> FinishedArm:
    """Checks what came from files and servers; the rest of the configuration may be of an older BASD."""
    key, student, data = str(facts.get("arm_key")), config.get("student"), config.get("data")
    good = ARM_KEY.fullmatch(key) and isinstance(student, dict) and isinstance(data, dict)
    if not good or (mark and not REFERENCE.fullmatch(f"{key}-{mark}")):
        raise UserError(f"{place} does not describe an arm (its key, student and data); was it written by BASD?")
    try:
        seed = int(facts["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{place} does not describe an arm (it has no seed); was it written by BASD?") from error
    assert isinstance(student, dict) and isinstance(data, dict)
    return FinishedArm(
        arm_key=key,
        configuration_key=str(facts.get("configuration_key", "")),
        mark=mark,
        setting=setting,
        name=str(facts.get("name", "")),
        seed=seed,
        version=str(facts.get("version", "")),
        student=student,
        data=data,
        metrics=metrics,
        weights=weights,
        place=place,
    )


# -- in MLflow ---------------------------------------------------------------------------------------------------------


class _Tracked:
    """The arms' runs in a tracking store; opens it when it is first asked, and never creates one."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._client: MlflowClient | None = None

    def by_id(self, run_id: str, scratch: Path) -> FinishedArm | None:
        run = self.run(run_id)
        return None if run is None else self._fetch(run, scratch)

    def by_key(
        self, reference: str, setting: str | None, scratch: Path, *, finished: bool = False
    ) -> FinishedArm | None:
        """The one arm with this key, or this beginning of a key. `finished`: only if its run is."""
        runs = self.runs(reference, setting)
        if finished:
            runs = [run for run in runs if run.info.status == "FINISHED"]
        if len(runs) > 1:
            several = [f"{run.data.tags['basd.arm_key']} ({run.info.run_name}, run {run.info.run_id})" for run in runs]
            raise _ambiguous(reference, several, "give more of the key, the run id, or setting=…")
        return self._fetch(runs[0], scratch) if runs else None

    def run(self, run_id: str) -> Run | None:
        """A run by its id; None when there is none."""
        from mlflow.exceptions import MlflowException

        client = self._open()
        if client is None:
            return None

        def get() -> Run | None:
            try:
                return client.get_run(run_id)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return None
                raise

        return asked(self.uri, get)

    def runs(self, reference: str, setting: str | None) -> list[Run]:
        """Active runs of the arms whose key begins so, without those that another code version replaced."""
        matched = REFERENCE.fullmatch(reference)
        client = self._open()
        if client is None or matched is None:
            return []
        mark = matched["mark"] or ""
        key = reference.partition("-")[0]

        def search() -> list[Run]:
            experiments = [e for e in _pages(client.search_experiments) if setting in (None, e.name)]
            if not experiments:
                return []
            ids = [experiment.experiment_id for experiment in experiments]
            found = _pages(lambda **page: client.search_runs(ids, f"tags.`basd.arm_key` LIKE '{key}%'", **page))
            tags = [(run, run.data.tags) for run in found]
            return [run for run, own in tags if SUPERSEDED not in own and own.get("basd.run", "") == mark]

        return asked(self.uri, search)

    def _open(self) -> MlflowClient | None:
        if self._client is None:
            path = sqlite_path(self.uri)
            parts = urllib.parse.urlsplit(self.uri)
            folder = Path(urllib.parse.unquote(parts.path) if parts.scheme else self.uri)
            there = path.exists() if path is not None else parts.scheme not in ("", "file") or folder.is_dir()
            if not there:
                return None
            check_tracking(self.uri)
            # two small files need no bars
            os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
            self._client = asked(self.uri, lambda: open_client(self.uri))
        return self._client

    def _fetch(self, run: Run, scratch: Path) -> FinishedArm:
        import yaml

        client, tags, run_id = self._open(), run.data.tags, run.info.run_id
        assert client is not None
        place = f"MLflow's run {run_id}"
        if "basd.arm_key" not in tags:
            if "basd.configuration_key" in tags:
                raise UserError(f"{place} gathers the seeds of a configuration; give the run of one seed below it.")
            raise UserError(f"{place} was not made by BASD; give the run of an arm.")
        if run.info.status != "FINISHED":
            raise UserError(
                f"{place} is not finished ({run.info.status}); finish the arm, then basd sync NAME sends the rest."
            )
        files = {}
        for name in ("config.yaml", WEIGHTS):
            try:
                # the names are ours, so nothing can land outside of the scratch directory
                files[name] = Path(client.download_artifacts(run_id, name, str(scratch)))
            except Exception as error:
                raise UserError(
                    f"{place} has no {name} that can be read ({first_line(error)}); basd sync NAME sends it."
                ) from error
        try:
            config = yaml.safe_load(files["config.yaml"].read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            config = None
        if not isinstance(config, dict):
            raise UserError(f"{place}: its config.yaml cannot be read; restore it from the arm's directory.")
        experiment = asked(self.uri, lambda: client.get_experiment(run.info.experiment_id))
        facts = {
            "arm_key": tags["basd.arm_key"],
            "configuration_key": tags.get("basd.configuration_key", ""),
            "seed": tags.get("basd.seed"),
            "version": tags.get("basd.version", ""),
            "name": run.info.run_name or "",
        }
        metrics = _test_metrics(run.data.metrics)
        return _arm(facts, config, tags.get("basd.run", ""), experiment.name, metrics, files[WEIGHTS], place)


def tracked_run(arm: FinishedArm, uri: str) -> Run | None:
    """The MLflow run of an arm, in its setting's experiment; None when there is none."""
    runs = [run for run in _Tracked(uri).runs(arm.label, arm.setting) if run.info.status == "FINISHED"]
    # of several the mirror follows the oldest
    return min(runs, key=lambda run: (run.info.start_time, run.info.run_id), default=None)


def asked(uri: str, ask: Callable[[], T]) -> T:
    """What a question to MLflow answers; its errors as one sentence."""
    try:
        return ask()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"MLflow at {shown(uri)} cannot be read ({first_line(error)}); check tracking.uri=…") from error


def first_line(error: BaseException) -> str:
    """The start of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _pages(search: Callable[..., Any]) -> list[Any]:
    found: list[Any] = []
    token = None
    while True:
        page = search(page_token=token)
        found += page
        token = page.token
        if not token:
            return found
