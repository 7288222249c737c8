"""What a sweep found: its trials from the Optuna study in the ledger, the importance of each setting, and a report with figures."""

from __future__ import annotations

import csv
import io
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.entries import SWEEP, Entry
from analysis.escape import escape_markdown, one_line
from analysis.files import write_texts
from analysis.metrics import Metric, metric
from analysis.tables import NONE
from basd.errors import UserError

if TYPE_CHECKING:
    import optuna
    import rich.table

# Complete trials from which on an importance says something, and is computed.
LEAST_FOR_IMPORTANCE = 8
WORDS = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}


@dataclass(frozen=True)
class Trial:
    """One configuration that a sweep tried."""

    number: int
    state: str  # complete, pruned, diverged, failed, running, waiting
    values: tuple[float, ...]  # of each metric, the mean over seeds; empty unless complete
    of_seeds: tuple[dict[int, float], ...]  # of each metric, by seed
    params: dict[str, Any]
    chosen: tuple[str, ...]  # overrides
    steps: dict[int, float]  # metric on the way: after epochs, or of the seeds in their order
    reason: str
    arms: dict[int, str]  # seed → arm key
    version: str  # of the code that planned it


@dataclass(frozen=True)
class SweepResult:
    """A sweep as its study tells it."""

    name: str
    setting: str
    question: str
    study: str
    metrics: tuple[Metric, ...]
    overrides: tuple[str, ...]
    space: dict[str, str]
    sampler: dict[str, Any]
    pruner: dict[str, Any]
    seeds: tuple[int, ...]
    defaults: dict[str, Any] | None
    epochs: int  # of a complete trial
    logarithmic: frozenset[str]  # settings that were sampled in the logarithm
    trials: tuple[Trial, ...]
    # of each metric, share of the variance between trials that each setting accounts for; empty where too few trials say
    importance: tuple[dict[str, float], ...]

    @property
    def complete(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.state == "complete"]

    @property
    def best(self) -> list[Trial]:
        """The best complete trial, or with several metrics those that none is better than in all, by number."""
        return [trial for trial in self.complete if not any(self._dominates(other, trial) for other in self.complete)][
            : None if len(self.metrics) > 1 else 1
        ]

    @property
    def first(self) -> Trial | None:
        """The complete trial of the configuration that the sweep starts from."""
        return next((t for t in self.complete if self.defaults is not None and t.params == self.defaults), None)

    def better(self, place: int, one: float, other: float) -> bool:
        """Whether a value of metric `place` is better than another."""
        return one > other if self.metrics[place].higher_is_better else one < other

    def _dominates(self, one: Trial, other: Trial) -> bool:
        pairs = list(enumerate(zip(one.values, other.values, strict=True)))
        return any(self.better(p, a, b) for p, (a, b) in pairs) and not any(self.better(p, b, a) for p, (a, b) in pairs)


def load_sweep(ledger_url: str, study: str) -> SweepResult:
    """Read a sweep's study. `UserError` where the ledger has none of that name."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = ledger_url.replace("postgresql://", "postgresql+psycopg://", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = optuna.load_study(study_name=study, storage=url)
        except KeyError as error:
            raise UserError(f'the ledger has no study "{study}"; run basd sweep again.') from error
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(f"the ledger cannot be read ({said}); check ledger.url=…") from error
        facts = found.user_attrs["sweep"]
        trials = found.get_trials(deepcopy=False)
        metrics = tuple(metric(name) for name in facts["metrics"])
        distributions = {key: one for trial in trials for key, one in trial.distributions.items()}
        return SweepResult(
            name=facts["name"],
            setting=facts["setting"],
            question=facts["question"],
            study=study,
            metrics=metrics,
            overrides=tuple(facts["overrides"]),
            space=facts["space"],
            sampler=facts["sampler"],
            pruner=facts["pruner"],
            seeds=tuple(facts["seeds"]),
            defaults=facts["defaults"],
            epochs=int(facts["epochs"]),
            logarithmic=frozenset(key for key, one in distributions.items() if getattr(one, "log", False)),
            trials=tuple(_trial(trial, facts["metrics"]) for trial in trials),
            importance=tuple(importance(found, place) for place in range(len(metrics))),
        )


def _trial(trial: optuna.trial.FrozenTrial, metrics: Sequence[str]) -> Trial:
    own = trial.user_attrs
    state = WORDS[trial.state.name]
    if state == "pruned" and own.get("hopeless"):
        state = "diverged"
    arms = {int(seed): arm for seed, arm in own.get("arms", {}).items()}
    values = own.get("values", {})
    return Trial(
        number=trial.number,
        state=state,
        values=tuple(trial.values) if state == "complete" else (),
        of_seeds=tuple({int(s): v for s, v in values.get(name, {}).items()} for name in metrics),
        params=dict(trial.params),
        chosen=tuple(own.get("overrides", ())),
        steps=dict(sorted(trial.intermediate_values.items())),
        reason=str(own.get("reason", "")),
        arms={seed: str(arm["arm_key"]) for seed, arm in arms.items()},
        version=next((str(arm["version"]) for arm in arms.values()), ""),
    )


def importance(study: optuna.Study, place: int) -> dict[str, float]:
    """Share of the variance of metric `place` that each setting accounts for alone, by fANOVA (Hutter et al. 2014).

    Over complete trials; empty where they are fewer than `LEAST_FOR_IMPORTANCE` or all alike.
    """
    import optuna

    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    values = {trial.values[place] for trial in complete}
    if len(complete) < LEAST_FOR_IMPORTANCE or len(values) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    found = optuna.importance.get_param_importances(
        study, evaluator=evaluator, target=lambda trial: trial.values[place]
    )
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


# -- report ------------------------------------------------------------------------------------------------------------


def write_sweep_report(result: SweepResult, directory: Path) -> list[Path]:
    """Write NAME.md, .html, .trials.csv, .json (for the index) and the figures of a sweep; one study, the same bytes."""
    from analysis.render.sweep_page import sweep_page
    from analysis.sweep_figures import draw

    directory = Path(directory)
    figures = draw(result, directory)
    pictures = [path for path in figures if path.suffix == ".png"]
    texts = {
        f"{result.name}.md": to_markdown(result, pictures),
        f"{result.name}.html": sweep_page(result, [path.name for path in pictures]),
        f"{result.name}.trials.csv": to_csv(result),
        f"{result.name}.json": sweep_entry(result, [path.name for path in pictures]).to_json(),
    }
    return [*write_texts(directory, texts), *figures]


def sweep_entry(result: SweepResult, figures: Sequence[str]) -> Entry:
    """Best trial, the one that the sweep started from, and where the numbers come from."""
    facts = {}
    for trial in result.best[:1]:
        facts["best"] = f"trial {trial.number}, {values_text(result, trial)}"
        facts["command"] = command(result, trial)
    if len(result.best) > 1:
        facts["front"] = f"{len(result.best)} trials that none is better than in every metric"
    if result.first is not None:
        facts["start"] = f"trial {result.first.number}, {values_text(result, result.first)}"
    facts["trials"] = _states(result)
    facts["code"] = ", ".join(sorted({trial.version for trial in result.trials if trial.version}))
    facts["study"] = result.study
    files = tuple(f"{result.name}{ending}" for ending in (".html", ".md", ".trials.csv"))
    return Entry(SWEEP, result.name, result.setting, one_line(result.question), facts, files, tuple(figures))


def values_text(result: SweepResult, trial: Trial) -> str:
    """A trial's value of every metric, with its name."""
    return ", ".join(f"{header(one)} {shown_value(trial, place, one)}" for place, one in enumerate(result.metrics))


def _states(result: SweepResult) -> str:
    """How many trials there are, by what became of them."""
    count = Counter(trial.state for trial in result.trials)
    order = ("complete", "pruned", "diverged", "failed", "running")
    return f"{len(result.trials)} trials: {', '.join(f'{count[state]} {state}' for state in order if count[state])}"


def ranked(result: SweepResult) -> list[Trial]:
    """Complete trials from the best first metric on, then the others by number."""
    sign = -1 if result.metrics[0].higher_is_better else 1
    others = [trial for trial in result.trials if trial.state != "complete"]
    return [*sorted(result.complete, key=lambda t: (sign * t.values[0], t.number)), *others]


def shown_value(trial: Trial, place: int, one: Metric) -> str:
    """A trial's value of a metric, with its standard deviation over seeds where there are several."""
    if not trial.values:
        if place == 0 and trial.steps:
            return f"({one.scale * list(trial.steps.values())[-1]:.{one.digits}f})"
        return NONE
    text = f"{one.scale * trial.values[place]:.{one.digits}f}"
    seeds = list(trial.of_seeds[place].values())
    if len(seeds) > 1:
        import statistics

        text += f" ± {one.scale * statistics.stdev(seeds):.{one.digits}f}"
    return text


def header(one: Metric) -> str:
    return one.heading


def command(result: SweepResult, trial: Trial) -> str:
    """The command line that trains a trial's configuration."""
    base = [text for text in result.overrides if text.split("=")[0] not in result.space]
    return " ".join(["basd train", *(_quoted(text) for text in (*base, *trial.chosen))])


def _quoted(text: str) -> str:
    return f"'{text}'" if any(mark in text for mark in ' [](){}*?&|;<>$"') else text


def notes(result: SweepResult) -> list[str]:
    """What a reader has to know of the numbers."""
    sampler = ", ".join(f"{key} {value}" for key, value in result.sampler.items() if key != "name")
    pruner = ", ".join(f"{key} {value}" for key, value in result.pruner.items() if key != "name")
    said = [
        f"{_states(result)}. Sampler {result.sampler['name']}"
        + (f" ({sampler})" if sampler else "")
        + f", pruner {result.pruner['name']}"
        + (f" ({pruner})" if pruner else "")
        + f"; {'seed' if len(result.seeds) == 1 else 'means over seeds'} {', '.join(map(str, result.seeds))}.",
        "Values are of the validation split, which chose among the trials: that of the best one is too high by luck. Train it "
        "on other seeds, beside the configuration that the sweep started from, before you report a gain.",
    ]
    versions = sorted({trial.version for trial in result.trials if trial.version})
    said.append(f"Code {', '.join(versions)}; setting {result.setting}; study “{result.study}”.")
    if len(versions) > 1:
        said.append("Trials are of several code versions; a new sweep (another name, or other seeds) would be of one.")
    return said


def titles(result: SweepResult) -> list[str]:
    """What stands above `cells`."""
    return ["trial", *(header(one) for one in result.metrics), *result.space, "state"]


def to_markdown(result: SweepResult, pictures: Sequence[Path] = ()) -> str:
    """The report of a sweep."""
    columns = titles(result)
    lines = [f"# {result.name}", "", escape_markdown(one_line(result.question)), ""]
    for trial in result.best:
        lines += [
            f"Best: trial {trial.number}, {values_text(result, trial)}:",
            "",
            "```bash",
            command(result, trial),
            "```",
            "",
        ]
    if result.first is not None:
        values = values_text(result, result.first)
        lines += [f"The configuration that the sweep started from is trial {result.first.number}: {values}.", ""]
    for one, shares in zip(result.metrics, result.importance, strict=True):
        if shares:
            lines += [f"| setting | share of the variance of {one.label} |", "| :-- | --: |"]
            lines += [f"| {escape_markdown(key)} | {100 * share:.1f} % |" for key, share in shares.items()]
            lines += [
                "",
                f"By fANOVA over {len(result.complete)} complete trials, each setting alone; shares sum to 100 %.",
                "",
            ]
    lines += [f"| {' | '.join(escape_markdown(column) for column in columns)} |"]
    lines += ["| " + " | ".join(["--:"] * (1 + len(result.metrics)) + [":--"] * (len(result.space) + 1)) + " |"]
    for trial in ranked(result):
        lines.append("| " + " | ".join(escape_markdown(cell) for cell in cells(result, trial)) + " |")
    lines += ["", "In brackets: the last value before a trial was left.", ""]
    lines += [f"- {escape_markdown(note)}" for note in notes(result)]
    lines += [""] + [f"![{path.stem}]({path.name})" for path in pictures]
    return "\n".join(lines).rstrip() + "\n"


def tracked(result: SweepResult) -> dict[str, Any]:
    """What a tracker should know of a sweep: description, params, and value and best value by trial."""
    points: dict[str, dict[int, float]] = {}
    for place, one in enumerate(result.metrics):
        best: float | None = None
        for trial in result.complete:
            value = trial.values[place]
            best = value if best is None or result.better(place, value, best) else best
            points.setdefault(f"sweep/{one.name}", {})[trial.number] = value
            points.setdefault(f"sweep/best/{one.name}", {})[trial.number] = best
    options = {f"{part}.{key}": value for part in ("sampler", "pruner") for key, value in getattr(result, part).items()}
    params = {**result.space, **options, "seeds": result.seeds, "overrides": " ".join(result.overrides)}
    found = "; ".join(f"`{command(result, trial)}`" for trial in result.best[:5])
    return {
        "study": result.study,
        "description": "\n\n".join([result.question, f"Best: {found}" if found else "", *notes(result)]),
        "params": {key: str(value) for key, value in params.items()},
        "points": points,
        "finished": not any(trial.state in ("running", "waiting") for trial in result.trials),
    }


def cells(result: SweepResult, trial: Trial) -> list[str]:
    """Number, values, settings and state of a trial, as tables show them."""
    chosen = dict(text.split("=", 1) for text in trial.chosen)
    values = [shown_value(trial, place, one) for place, one in enumerate(result.metrics)]
    state = f"{trial.state}: {one_line(trial.reason)}" if trial.reason else trial.state
    return [str(trial.number), *values, *(chosen.get(key, NONE) for key in result.space), state]


def to_csv(result: SweepResult) -> str:
    """One line a trial and seed, with the arm's key and the code version: what every number comes from."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [one.name for one in result.metrics]
    writer.writerow(["trial", "state", "seed", *names, *result.space, "arm_key", "code_version", "reason"])
    for trial in result.trials:
        chosen = dict(text.split("=", 1) for text in trial.chosen)
        for seed in result.seeds:
            values = [repr(of_seed[seed]) if seed in of_seed else "" for of_seed in trial.of_seeds]
            settings = [chosen.get(key, "") for key in result.space]
            key, reason = trial.arms.get(seed, ""), one_line(trial.reason)
            writer.writerow([trial.number, trial.state, seed, *values, *settings, key, trial.version, reason])
    return out.getvalue()


def short_names(keys: Iterable[str]) -> list[str]:
    """Of each dotted key the last parts that tell it from the others."""
    parts = [key.split(".") for key in keys]

    def short(own: list[str]) -> str:
        for count in range(1, len(own) + 1):
            if sum(other[-count:] == own[-count:] for other in parts) == 1:
                return ".".join(own[-count:])
        return ".".join(own)

    return [short(own) for own in parts]


def to_rich(result: SweepResult, limit: int = 10) -> rich.table.Table:
    """The best trials for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for name in ("trial", *(header(one) for one in result.metrics), *short_names(result.space), "state"):
        # a number is never cut short
        table.add_column(name, overflow="fold")
    for trial in ranked(result)[:limit]:
        table.add_row(*(Text(cell) for cell in cells(result, trial)))
    return table
