"""`basd audit`: whether ledger, journals and MLflow say the same of every arm of a table. It reads and changes nothing.

In order is an arm that one trial of the ledger completed, whose journal is whole and ends with the ledger's metrics, that one
finished MLflow run holds point by point, and that the installed code trained. The exit status is 1 for anything else, code
that changed since (stale code) included: a table of such arms says nothing about the code that is installed.
"""

from __future__ import annotations

import dataclasses
import socket
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from basd.errors import UserError
from basd.grid.audit_records import JournalRecord, Run, Tracked, compare_points, few, read_journal, same
from basd.grid.ledger import ArmState, Ledger
from basd.grid.options import GridOptions
from basd.grid.versions import is_leftover, trained_version, version_in
from basd.tracking.files import read_json
from basd.tracking.journal import NAME as JOURNAL
from basd.tracking.journal import last_event
from basd.tracking.mirror import STATE as MIRROR
from basd.tracking.mirror import is_mirrored
from basd.tracking.mlflow_store import shown

if TYPE_CHECKING:
    from rich.console import Console

    from basd.grid.plan import Plan

Kind = Literal["missing", "running", "failed", "duplicate", "differing", "unsent", "orphaned", "stale"]
COUNTED: dict[Kind, str] = {
    "missing": "missing",
    "running": "in training",
    "failed": "failed",
    "duplicate": "duplicate",
    "differing": "with records that differ",
    "unsent": "not sent to MLflow yet",
    "orphaned": "with an orphaned MLflow run",
    "stale": "of stale code",
}
UNENDED = ("RUNNING", "SCHEDULED")


@dataclass(frozen=True)
class Finding:
    """One thing that is not in order. `subject` is an arm key, or the id of a run that belongs to no arm of the plan."""

    kind: Kind
    subject: str
    row: str
    seed: int | None
    what: str
    way_out: str


@dataclass(frozen=True)
class Audit:
    """What is true of one table in one setting."""

    setting: str
    name: str
    total: int
    complete: int
    versions: dict[str, int]  # code version -> complete arms that it trained
    installed: str
    findings: list[Finding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # records that could not be read
    pruned: int = 0  # arms that the sweep has left on their way
    notes: list[str] = field(default_factory=list)

    @property
    def in_order(self) -> bool:
        """Everything could be read and nothing was found."""
        return not self.findings and not self.problems and self.complete + self.pruned == self.total

    @property
    def summary(self) -> str:
        """One line: complete, what else by number of arms, code versions."""
        subjects = {(finding.kind, finding.subject) for finding in self.findings}
        count = Counter(kind for kind, _ in subjects)
        found = [f"{count[kind]} {words}" for kind, words in COUNTED.items() if count[kind]]
        said = ", ".join(found) or "nothing missing, failed or duplicate"
        if self.problems and not found:
            said += " as far as could be read"
        codes = ", ".join(
            f"{version} ({number} arm{'s' if number > 1 else ''})" for version, number in sorted(self.versions.items())
        )
        if len(self.versions) == 1:
            codes = next(iter(self.versions))
        code = f"; {'mixed code versions' if len(self.versions) > 1 else 'code version'} {codes}" if codes else ""
        left = f"{self.pruned} left by the sweep, " if self.pruned else ""
        code += f", installed is {self.installed}" if set(self.versions) - {self.installed} else ""
        return f"{self.name} in {self.setting}: {self.complete} of {self.total} arms complete, {left}{said}{code}."


def print_audit(audit: Audit, console: Console) -> None:
    """The summary, what could not be read, a table of what is not in order (seeds of one row and reason together), notes."""
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    line(audit.summary)
    for problem in audit.problems:
        line(problem)
    if audit.findings:
        seeds: dict[tuple[str, str, str], list[int]] = {}
        for finding in audit.findings:
            group = seeds.setdefault((finding.row, finding.what, finding.way_out), [])
            group += [finding.seed] if finding.seed is not None else []
        table = Table("row", "seed", show_lines=True)
        for name in ("what", "way out"):
            table.add_column(name, overflow="fold")  # a command is never cut short
        for (row, what, way_out), numbers in seeds.items():
            table.add_row(*map(Text, (row, ", ".join(map(str, sorted(numbers))), what, way_out)))
        if not console.is_terminal:  # a file has no width
            table.width = Measurement.get(console, console.options.update(width=200), table).maximum
        console.print(table)
    for note in audit.notes:
        line(f"Note: {note}")


# -- looking -----------------------------------------------------------------------------------------------------------


def options_of(plan: Plan, path: Path, config: Any, said: Collection[str]) -> GridOptions:
    """Where a plan's records are: as the plan says, unless the command line (`config`, keys in `said`) says otherwise."""
    options = GridOptions.from_config(plan.config, directory=str(path.parents[2]))
    given = GridOptions.from_config(config)
    names = {"ledger_url": "ledger.url", "tracking_uri": "tracking.uri"}
    return dataclasses.replace(options, **{name: getattr(given, name) for name, key in names.items() if key in said})


def audit_plan(plan: Plan, options: GridOptions, installed: str | None = None) -> Audit:
    """Look at every arm of a plan. `installed`: the code version to compare with, of this code by default.

    A ledger or an MLflow that cannot be read is a sentence among the audit's problems; the rest is looked at all the same.
    UserError: ledger.url is no database address.
    """
    if installed is None:
        from basd.version import code_version

        installed = code_version()
    with closing(_Auditor(plan, options, installed)) as auditor:
        return auditor.audit()


class _Auditor:
    def __init__(self, plan: Plan, options: GridOptions, installed: str) -> None:
        self.plan, self.options, self.installed = plan, options, installed
        self.ledger = Ledger.of(options, plan.setting)
        self.findings: list[Finding] = []
        self.problems: list[str] = []
        self.versions: Counter[str] = Counter()
        self.complete = self.pruned = 0
        self.elsewhere: set[str] = set()  # keys of arms that were completed on another machine
        self.mirrored: dict[str, bool] = {}  # arm key -> whether its mirror says that all was sent
        self.unsent: set[str] = set()  # arm keys
        self.running: set[str] = set()  # arm keys
        self.states: dict[str, ArmState] | None = None  # of every arm of the setting; None: the ledger cannot be read
        self.completions: dict[str, dict[int, Mapping[str, float]]] = {}  # arm key -> trial number -> metrics
        self.tracked: Tracked | None = None  # None: MLflow cannot be read
        self.runs: dict[str, list[Run]] = {}  # arm key -> runs that count, the one that reports use first
        self.parents: dict[str, list[Run]] = {}  # configuration key -> its own runs, oldest first

    def audit(self) -> Audit:
        # in this order, what ends meanwhile contradicts nothing; the ledger again after MLflow, for what began meanwhile
        self.states = self._read_ledger()
        for key in {**self.plan.arms, **(self.states or {})}:
            directory, rows = self.options.arm_directory(self.plan.setting, key), self.plan.labels_of(key)
            labels = {self.plan.name: ", ".join(rows)} if rows else {}
            self.mirrored[key] = is_mirrored(directory, self.options.tracking_uri, labels)
        self._read_mlflow()
        for states in (self.states, self._read_ledger() if self.states else None):
            self.running |= {key for key, state in (states or {}).items() if state.state == "running"}
        for key in self.plan.arms:
            self._arm(key)
        self._configurations()
        for run in self.tracked.runs if self.tracked and self.states is not None else []:
            if run.status in UNENDED and "basd.run" not in run.tags:  # of a repetition nobody knows who owns it
                self._unended(run, self.states or {})
        return Audit(
            setting=self.plan.setting,
            name=self.plan.name,
            total=len(self.plan.arms),
            complete=self.complete,
            pruned=self.pruned,
            versions=dict(self.versions),
            installed=self.installed,
            findings=self.findings,
            problems=self.problems,
            notes=self._notes(),
        )

    def close(self) -> None:
        if self.tracked is not None:
            self.tracked.close()
            self.tracked = None

    # Reading

    def _read_ledger(self) -> dict[str, ArmState] | None:
        if not self.ledger.exists:
            self.problems.append(
                f"The ledger {self.options.ledger_url} does not exist: set ledger.url=… to where it is, or run "
                f"`{self.plan.command}`, which takes over every arm whose journal is complete."
            )
            return None
        try:
            completions = self.ledger.completions()
            self.completions = self.completions or completions or {}
            return self.ledger.arms() if completions is not None else {}
        except UserError as error:
            self.problems.append(str(error))
            return None

    def _read_mlflow(self) -> None:
        try:
            self.tracked = Tracked(self.options.tracking_uri, self.plan.setting)
        except UserError as error:
            self._without_mlflow(error)
            return
        for run in sorted(self.tracked.runs, key=lambda run: run.status != "FINISHED"):
            if "basd.arm_key" in run.tags and not run.beside:
                self.runs.setdefault(run.tags["basd.arm_key"], []).append(run)
        for run in self.tracked.runs:
            if "basd.arm_key" not in run.tags and "basd.configuration_key" in run.tags:
                self.parents.setdefault(run.tags["basd.configuration_key"], []).append(run)

    def _without_mlflow(self, error: UserError) -> None:
        self.close()
        self.problems.append(f"MLflow was not audited, or not all of it. {error}")

    # One arm

    def _arm(self, key: str) -> None:
        state = (self.states or {}).get(key)
        directory = self.options.arm_directory(self.plan.setting, key)
        event = last_event(directory)
        ended = event is not None and event.end == "complete"
        runs = self.runs.get(key, [])
        if len(runs) > 1:
            rest = " and ".join(f"`mlflow runs delete --run-id {run.run_id}`" for run in runs[1:])
            what = f"{len(runs)} MLflow runs: {few(f'{run.run_id} ({run.status})' for run in runs)}"
            self._add("duplicate", key, what, f"the first counts; {rest}")
        if not (state is not None and state.state == "complete" if self.states is not None else ended):
            if self.plan.sweep is not None and state is not None and state.state == "pruned":
                self.pruned += 1
                return
            self._incomplete(key, state, ended, runs[0] if runs else None)
            return
        self.complete += 1
        trials = self.completions.get(key, {})
        if len(trials) > 1:
            alike = all(metrics == trials[min(trials)] for metrics in trials.values())
            what = f"trials {', '.join(map(str, sorted(trials)))} of the ledger are complete, with {'the same' if alike else 'different'} metrics"
            self._add("duplicate", key, what, f"the first, {min(trials)}, counts; nothing is to be done")
        spec = read_json(directory / "arm.json") or {}
        host = ((state.owner if state else None) or {}).get("host")
        if state is not None and host != socket.gethostname() and is_leftover(directory, state):
            self.elsewhere.add(key)
        record = None if key in self.elsewhere else self._journal(key, state, directory, spec)
        version = trained_version(state, directory) if state else str(spec.get("version", ""))
        if self.tracked is not None:
            self._mirrored(key, state, record, version)
        tag = runs[0].tags.get("basd.version", "") if runs else ""
        version = version or tag or "unknown"
        self.versions[version] += 1
        if version != self.installed:
            what = f"trained with code {version}, installed is {self.installed}"
            self._add("stale", key, what, f"`basd grid {self.plan.name} --retrain-stale` trains it again")

    def _incomplete(self, key: str, state: ArmState | None, ended: bool, run: Run | None) -> None:
        grid = f"`{self.plan.command}`"
        if self.states is None:
            self._add("missing", key, "not complete by its journal", grid)
            return
        name = state.state if state else "never enqueued"
        replaced = state is not None and state.closed_to(version_in(self.options.arm_directory(self.plan.setting, key)))
        owner = (state.owner if state else None) or {}
        process = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
        if name == "running":
            self._add("running", key, f"in training by {process}", f"`basd status {self.plan.name}` says how far it is")
        elif ended and not replaced:
            what = f"its journal is complete, the ledger says {name}"
            self._add("missing", key, what, f"{grid} takes it over without training it again")
        elif state is not None and name == "failed":
            log = f"log {state.log}; " if state.log else ""
            kind: Kind = "failed" if state.permanent else "missing"
            self._add(kind, key, f"failed: {state.reason}", f"{log}{grid} tries again")
        else:
            again = (
                f"{name} to be trained again in place of code {state.replaces}" if state and state.replaces else name
            )
            what = {"stale": f"stale: its owner, {process}, is gone"}.get(name, again)
            self._add("missing", key, what, grid)
        old = state is not None and run is not None and state.closed_to(run.tags.get("basd.version", ""))
        if run is not None and run.status == "FINISHED" and not (ended or old) and name != "running":
            self._add("differing", key, f"its MLflow run is FINISHED, the ledger says {name}", grid)

    def _journal(
        self, key: str, state: ArmState | None, directory: Path, spec: Mapping[str, Any]
    ) -> JournalRecord | None:
        """The record of a complete arm's journal if it is here and whole."""
        path = directory / JOURNAL
        restore = f"restore {directory} from a copy; {self._again(key)} repeats it"
        if not path.exists():
            self._add("differing", key, f"its journal is missing: {path}", restore)
            return None
        arm = self.plan.arms[key]
        try:
            record = read_journal(path, arm.total_steps, spec.get("config") or arm.config)
        except OSError as error:
            self.problems.append(f"{path} cannot be read ({error.strerror or error}); check its permissions.")
            return None
        if state is not None and record.closing is not None and not record.defects:
            here = record.closing.metrics
            for name in sorted({*state.metrics, *here}):
                if name not in here or name not in state.metrics or not same(here[name], state.metrics[name]):
                    record.defects.append(
                        f"its journal closes with {name} {here.get(name, 'absent')}, the ledger says {state.metrics.get(name, 'nothing')}"
                    )
        if record.defects:
            self._add("differing", key, few(record.defects), restore)
        if not (directory / "student.safetensors").exists():
            self._add("differing", key, "its student.safetensors is missing", restore)
        return None if record.defects else record

    def _mirrored(self, key: str, state: ArmState | None, record: JournalRecord | None, version: str) -> None:
        """Compare a complete arm with its MLflow run. What was only not sent yet is told apart from what went wrong."""
        assert self.tracked is not None
        label, mirrored = ", ".join(self.plan.labels_of(key)), self.mirrored[key]
        here = self._has_journal(key)
        sync, anew = self._sync(key)
        runs = self.runs.get(key, [])
        if not runs:
            if mirrored:
                self._add("differing", key, "it has no MLflow run any more", anew)
            else:
                self._not_sent(key, sync)
            return
        run, late = runs[0], 0
        unfinished = []  # sending the rest or the end once more puts these right
        if run.tags.get(f"basd.ablation.{self.plan.name}") != label:
            unfinished.append(f"its MLflow run is not tagged as {self.plan.name}: {label}")
        if run.status not in ("FINISHED", *UNENDED):
            unfinished.append(f"its MLflow run is {run.status}")
        if unfinished and (mirrored or not here):
            self._add("differing", key, "; ".join(unfinished), anew)
        elif unfinished or (here and not mirrored and run.status in UNENDED):
            late += 1
        wrong = []  # these need a new run
        if run.tags.get("mlflow.parentRunId") not in [
            parent.run_id for parent in self.parents.get(self.plan.arms[key].configuration_key, [])
        ]:
            wrong.append("its MLflow run does not lie under its configuration's run")
        if version and run.tags.get("basd.version") != version:
            wrong.append(f"its MLflow run says code {run.tags.get('basd.version', 'nothing')}, trained with {version}")
        if record is not None:
            try:
                points = self.tracked.points(run)
            except UserError as error:
                self._without_mlflow(error)
                return
            behind, differences = compare_points(record, run, points, mirrored)
            late, wrong = late + behind, wrong + differences
        finals = run.finals()
        for name, value in (state.metrics if state else {}).items():
            last = finals.get(name)
            if last is None and record is None:
                wrong.append(f"its MLflow run lacks {name}")
            elif last is not None and not same(last, value) and not late:
                wrong.append(f"its MLflow run ends with {name} {last}, the ledger says {value}")
        if wrong:
            delete = f"`mlflow runs delete --run-id {run.run_id}`"
            self._add("differing", key, "; ".join(wrong), f"{delete}, {anew}")
        if late:
            self._not_sent(key, sync)

    def _not_sent(self, key: str, way_out: str) -> None:
        self.unsent.add(key)
        self._add("unsent", key, "not sent yet", way_out)

    # Runs

    def _configurations(self) -> None:
        """A configuration has one run of its own."""
        first = {arm.configuration_key: key for key, arm in reversed(self.plan.arms.items())}
        for configuration, key in first.items():
            runs = self.parents.get(configuration, [])
            if len(runs) > 1:
                arms = Counter(run.tags.get("mlflow.parentRunId") for every in self.runs.values() for run in every)
                runs = sorted(runs, key=lambda run: -arms[run.run_id])
                rest = " and ".join(f"`mlflow runs delete --run-id {run.run_id}`" for run in runs[1:])
                what = f"its configuration has {len(runs)} MLflow runs: {few(run.run_id for run in runs)}"
                self._add("duplicate", runs[1].run_id, what, rest, self._label(key))

    def _unended(self, run: Run, states: Mapping[str, ArmState]) -> None:
        """A run that is RUNNING though nobody trains its arms: its end was not sent yet, or it is orphaned."""
        configuration, key = run.tags.get("basd.configuration_key"), run.tags.get("basd.arm_key")
        if configuration is None:
            return  # somebody else's, in our experiment
        keys = [key] if key else [state.key for state in states.values() if state.configuration_key == configuration]
        known = {one: states[one].state for one in keys if one in states}
        if self.running.intersection(keys) and not run.beside:
            return
        if self.running and not key and set(known.values()) - {"complete"}:
            return  # a grid is at work that has still to come to the other arms of this configuration
        complete = [one for one, state in known.items() if state == "complete"]
        owed = [] if run.beside else [one for one in complete if self._owes(one)]
        if self.unsent.intersection(owed):
            return  # told already
        own = [one for one in keys if one in self.plan.arms]
        subject = own[0] if own and key else run.run_id
        row = self._label(own[0]) if own else run.name or run.run_id
        seed = run.tags.get("basd.seed", "")
        whose = "its MLflow run" if key else "the MLflow run of its configuration"
        whose = "a superseded MLflow run of it" if run.beside else whose
        text = f"{whose} ({run.run_id}) is {run.status}, though it is {'complete' if key and complete else 'trained by nobody'}"
        if owed:
            text = f"the end of {whose} ({run.run_id}) was not sent yet"
        kind: Kind = "unsent" if owed else "orphaned"
        self._add(kind, subject, text, self._way_to_end(run, own, complete), row, int(seed) if seed.isdigit() else None)

    def _way_to_end(self, run: Run, own: Sequence[str], complete: Sequence[str]) -> str:
        """How an unended run is ended; `own`: its arms that are in the plan."""
        if run.beside:
            return f"`mlflow runs delete --run-id {run.run_id}`"
        if own:
            ended = [key for key in own if key in complete]
            return self._sync(ended[0])[1] if ended else f"run `basd sync {self.plan.name}`"
        tables = sorted(tag.removeprefix("basd.ablation.") for tag in run.tags if tag.startswith("basd.ablation."))
        return f"`basd audit {tables[0]}` says more" if tables else "repeat its `basd train`, which sends the rest"

    def _owes(self, key: str) -> bool:
        """Whether an arm's journal is here and not all of it was sent."""
        return key in self.unsent or (self._has_journal(key) and not self.mirrored[key])

    def _has_journal(self, key: str) -> bool:
        return key not in self.elsewhere and (self.options.arm_directory(self.plan.setting, key) / JOURNAL).exists()

    def _sync(self, key: str) -> tuple[str, str]:
        """How the rest of an arm is sent to MLflow, and how all of it is sent once more."""
        sync, directory = f"run `basd sync {self.plan.name}`", self.options.arm_directory(self.plan.setting, key)
        if not self._has_journal(key):
            return f"{sync} on the machine that trained it", f"{sync} on the machine that trained it"
        # without this file the mirror asks MLflow what it has
        return sync, f"remove {directory / MIRROR}, then {sync}" if (directory / MIRROR).exists() else sync

    # Telling

    def _add(self, kind: Kind, subject: str, what: str, way_out: str, row: str = "", seed: int | None = None) -> None:
        arm = self.plan.arms.get(subject)
        row, seed = row or self._label(subject), arm.seed if arm else seed
        self.findings.append(Finding(kind, subject, row, seed, what, way_out))

    def _label(self, key: str) -> str:
        names = self.plan.labels_of(key)
        return ", ".join(row.label for row in self.plan.rows if row.name in names)

    def _again(self, key: str) -> str:
        names = self.plan.labels_of(key)
        overrides = next(row.overrides for row in self.plan.rows if row.name in names)
        return f"`{' '.join(['basd train --again', *overrides, 'seed=…'])}`"

    def _notes(self) -> list[str]:
        notes = []
        ways = [finding.way_out for finding in self.findings]
        if self.elsewhere:
            number = f"{len(self.elsewhere)} arms were" if len(self.elsewhere) > 1 else "1 arm was"
            notes.append(f"{number} trained on another machine; the journals there were not compared.")
        if any("train --again" in way for way in ways):
            notes.append(
                "`basd train --again` needs the overrides of the command line that planned the table as well. It trains "
                "a run that stands beside the table's, which goes on counting the first one."
            )
        if len(self.versions) > 1:
            notes.append(f"`basd report {self.plan.name} --allow-mixed-code` prints a table of several code versions.")
        if any(version.endswith("-dirty") for version in self.versions):
            notes.append(
                "-dirty: the files differed from the commit; two versions of that name need not be the same code."
            )
        if any("mlflow runs" in way for way in ways):
            notes.append(f"mlflow commands need MLFLOW_TRACKING_URI={shown(self.options.tracking_uri)}.")
        return notes
