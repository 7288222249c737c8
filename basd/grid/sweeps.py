"""Sweeps: the files of sweeps/, checked, with what the command line changes in them.

    question: Which temperature and which scale of the losses does UW-SO want?
    metric: val/top1                     # or a list; the validation split alone chooses
    overrides: [method=basd]             # what every trial starts from
    space:                               # Hydra's sweep syntax (basd.grid.space)
      weighting.temperature: tag(log, interval(0.1, 20))
      weighting.scale: choice(first, first_mean, none)
    sampler: {name: tpe, startup: 8}     # tpe, gp, random, nsga2, grid
    pruner: {name: hyperband}            # none, hyperband and median (over epochs), wilcoxon (over seeds)
    trials: 32
    batch: 8                             # asked together and trained side by side
    seeds: [0]                           # a trial's value is the mean over these

On the command line `KEY=SWEEP` adds to the space, `KEY=VALUE` fixes a setting (and takes it out of the space), and `trials=`,
`batch=`, `seeds=`, `metric=`, `sampler=`, `pruner=`, `sampler.startup=` … change the rest.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from hydra.core.override_parser.types import IntervalSweep

from basd.compose import compose, setting_name, setting_words
from basd.config import NOT_SEMANTIC, Config, build, digest, join_problems, suggest
from basd.errors import UserError
from basd.grid.ablations import ablation_files, merge_overrides, named_files, read_yaml
from basd.grid.space import combinations, distribution_of, ends, parse_override, value_in

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

# What a trial may be judged by, and whether more of it is better.
METRICS = {"val/top1": True, "val/top5": True, "val/nll": False, "val/ece": False}
FILE_KEYS = (
    "question",
    "metric",
    "overrides",
    "space",
    "sampler",
    "pruner",
    "trials",
    "batch",
    "seeds",
    "defaults_first",
)
# Fewer paired seeds cannot tell two configurations apart at p = 0.1: the least one-sided p of n seeds is 2^-n.
WILCOXON_SEEDS = 4


@dataclass(frozen=True)
class TPESettings:
    """Tree-structured Parzen estimator (Bergstra et al. 2011), multivariate."""

    name: str = "tpe"
    # Random trials before the first that learns from others.
    startup: int = field(default=10, metadata={"min": 1})
    seed: int = field(default=0, metadata={"min": 0})


@dataclass(frozen=True)
class GPSettings:
    """Gaussian process with expected improvement."""

    name: str = "gp"
    startup: int = field(default=10, metadata={"min": 1})
    seed: int = field(default=0, metadata={"min": 0})


@dataclass(frozen=True)
class RandomSettings:
    name: str = "random"
    seed: int = field(default=0, metadata={"min": 0})


@dataclass(frozen=True)
class NSGA2Settings:
    """Evolution by non-dominated sorting (Deb et al. 2002), for one metric or several."""

    name: str = "nsga2"
    population: int = field(default=16, metadata={"min": 2})
    seed: int = field(default=0, metadata={"min": 0})


@dataclass(frozen=True)
class GridSettings:
    """Every combination once, in the order of the space; its last setting changes fastest."""

    name: str = "grid"


@dataclass(frozen=True)
class NoPruning:
    name: str = "none"


@dataclass(frozen=True)
class HyperbandSettings:
    """Brackets of asynchronous successive halving over the epochs of the first seed (Li et al. 2018)."""

    name: str = "hyperband"
    least_epochs: int = field(default=1, metadata={"min": 1})
    reduction_factor: int = field(default=3, metadata={"min": 2})


@dataclass(frozen=True)
class MedianSettings:
    """A trial whose first seed is below the median of the trials before it at the same epoch ends."""

    name: str = "median"
    startup: int = field(default=5, metadata={"min": 0})
    warmup_epochs: int = field(default=0, metadata={"min": 0})


@dataclass(frozen=True)
class WilcoxonSettings:
    """A trial that is worse than the best one over the seeds that both have, by Wilcoxon's signed ranks, gets no more seeds."""

    name: str = "wilcoxon"
    p: float = field(default=0.1, metadata={"min": 1e-9, "max": 1.0})


SAMPLERS: dict[str, type] = {
    "tpe": TPESettings,
    "gp": GPSettings,
    "random": RandomSettings,
    "nsga2": NSGA2Settings,
    "grid": GridSettings,
}
PRUNERS: dict[str, type] = {
    "none": NoPruning,
    "hyperband": HyperbandSettings,
    "median": MedianSettings,
    "wilcoxon": WilcoxonSettings,
}
# Those that end an arm on its way; the other one decides between arms.
OVER_EPOCHS = ("hyperband", "median")


@dataclass(frozen=True)
class Sweep:
    """A search under a setting, checked."""

    name: str
    setting: str
    question: str
    metrics: tuple[str, ...]
    seeds: tuple[int, ...]
    # of every trial: the command line's, then the file's
    overrides: tuple[str, ...]
    # setting → its values as the file writes them
    space: dict[str, str]
    sampler: Any
    pruner: Any
    trials: int
    batch: int
    # Parameters of the configuration that the overrides describe, which is tried first; None: they lie outside the space.
    defaults: dict[str, Any] | None
    distributions: dict[str, BaseDistribution]
    # overrides of the space's first values
    first: tuple[str, ...]
    # that configuration, or where it is none, the one of the space's first values: where and how the sweep runs
    config: Config
    # overrides of the command line that made the setting
    setting_words: tuple[str, ...] = ()

    @property
    def hash(self) -> str:
        """Of all that decides what a trial is and how trials are compared; more trials are the same sweep."""
        facts = {
            "metrics": self.metrics,
            "seeds": self.seeds,
            "overrides": sorted(self.effective_overrides),
            "space": self.space,
            "sampler": dataclasses.asdict(self.sampler),
            "pruner": dataclasses.asdict(self.pruner),
            "defaults": self.defaults is not None,
        }
        return digest(facts)[:12]

    @property
    def effective_overrides(self) -> list[str]:
        """Those that change results; the others say where and how the sweep runs, and may hold passwords."""
        return [text for text in self.overrides if changes_results(_key(text))]

    @property
    def study(self) -> str:
        """The name of its Optuna study, beside the setting's in the ledger."""
        return f"{self.setting} sweep {self.name} {self.hash}"

    @property
    def directions(self) -> list[Literal["maximize", "minimize"]]:
        return ["maximize" if METRICS[metric] else "minimize" for metric in self.metrics]

    @property
    def stages(self) -> list[tuple[int, ...]]:
        """The seeds that a trial trains, in the order of decisions: one that is left gets none of the later ones."""
        if self.pruner.name == "wilcoxon":
            first = self.seeds[:WILCOXON_SEEDS]
            return [first, *((seed,) for seed in self.seeds[WILCOXON_SEEDS:])]
        if self.pruner.name in OVER_EPOCHS and len(self.seeds) > 1:
            return [self.seeds[:1], self.seeds[1:]]
        return [self.seeds]

    def composed_with(self, chosen: Sequence[str]) -> list[str]:
        """The overrides of a trial that chose these values."""
        return merge_overrides(self.overrides, chosen)


def sweep_files() -> dict[str, Path]:
    """Sweeps by name."""
    return named_files("sweeps")


def load_sweep(name: str, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep's file, change it as the command line says, and check everything that can be known before training."""
    files = sweep_files()
    if name not in files:
        hint = f"; it is an ablation: basd grid {name}." if name in ablation_files() else suggest(name, files)
        raise UserError(f"{name} is not a sweep{hint}")
    if name in ablation_files():
        raise UserError(f"{name} is both a sweep and an ablation; rename sweeps/{name}.yaml.")
    values = read_yaml(files[name], f"sweeps/{name}.yaml")
    try:
        return _read(name, values, overrides)
    except _FileError as error:
        raise UserError(f"sweep {name}: {error}") from error


class _FileError(Exception):
    """A sentence about a file or what the command line makes of it."""


def _read(name: str, values: Any, overrides: Sequence[str]) -> Sweep:
    if not isinstance(values, Mapping):
        raise _FileError("it is empty; write question, metric, space and trials.")
    for key in values:
        if key not in FILE_KEYS:
            raise _FileError(f"{key} is not known here{suggest(str(key), FILE_KEYS)}")
    if not isinstance(values.get("space"), Mapping) or not values["space"]:
        raise _FileError("space is empty; name settings with their values, such as recipe.lr: interval(1e-4, 1e-2).")
    own, searched, base = _split(overrides)
    values = {**values, **{key: value for key, value in own.items() if "." not in key}}
    file_overrides = values.get("overrides", [])
    if not isinstance(file_overrides, list):
        raise _FileError("overrides must be a list, such as [method=basd].")
    fixed = {_key(text) for text in base}
    space = {str(key): str(text) for key, text in values["space"].items() if key not in fixed} | searched
    if not space:
        raise _FileError("the command line fixes every setting of the space; nothing is left to search.")
    together = [str(text) for text in file_overrides if _key(str(text)) not in fixed]
    every = tuple(merge_overrides(base, [text for text in together if _key(text) not in space]))
    if any(_key(text) == "seed" for text in every):
        raise _FileError("seed is set; the seeds of each trial stand under seeds.")
    problems: list[str] = []
    sampler = _settings("sampler", values.get("sampler", "tpe"), own, SAMPLERS, problems)
    pruner = _settings("pruner", values.get("pruner", "none"), own, PRUNERS, problems)
    metrics = _metrics(values.get("metric", "val/top1"))
    seeds = values.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise _FileError(f"seeds={seeds} must be whole numbers from 0 on, such as [0, 1, 2].")
    if len(set(seeds)) < len(seeds):
        raise _FileError(f"seeds={seeds} names a seed twice; a seed counts once.")
    for word in ("trials", "batch"):
        value = values.get(word, 8)
        if type(value) is not int or value < 1:
            raise _FileError(f"{word}={value} must be a whole number from 1 on.")
    if "trials" not in values and getattr(sampler, "name", "") != "grid":
        raise _FileError("it lacks trials, the number of configurations to try.")
    if problems:
        raise _FileError(join_problems(problems))
    _check_pruning(pruner, metrics, seeds, space)
    first = tuple(f"{key}={_first(key, text)}" for key, text in space.items())
    composed, distributions = _check_space(every, space, first)
    defaults = _defaults(composed, distributions) if values.get("defaults_first", True) else None
    trials = values.get("trials")
    if sampler.name == "grid":
        defaults, size = None, len(combinations(distributions))
        trials = min(trials or size, size)
    return Sweep(
        name=name,
        setting=setting_name(base),
        question=str(values.get("question", "")),
        metrics=metrics,
        seeds=tuple(seeds),
        overrides=every,
        space=space,
        sampler=sampler,
        pruner=pruner,
        trials=int(trials),
        batch=int(values.get("batch", 8)),
        defaults=defaults,
        distributions=distributions,
        first=first,
        config=composed,
        setting_words=tuple(setting_words(base)),
    )


def _key(text: str) -> str:
    return text.partition("=")[0]


def changes_results(key: str) -> bool:
    """Whether a setting is part of a configuration, as the method's preset is."""
    section = key.split(".")[0]
    return section == "method" or section not in NOT_SEMANTIC


def _split(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """The command line's words about the sweep, its additions to the space, and plain settings."""
    own: dict[str, Any] = {}
    searched: dict[str, str] = {}
    base: list[str] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if key == "setting":
            raise _FileError(
                "setting= chooses among finished sweeps; here data=, teacher=, student= and recipe= make it."
            )
        if equals and key.split(".")[0] in (
            "trials",
            "batch",
            "seeds",
            "metric",
            "sampler",
            "pruner",
            "defaults_first",
        ):
            try:
                own[key] = yaml.safe_load(value)
            except yaml.YAMLError:
                own[key] = value
        elif parse_override(text).is_sweep_override():
            searched[key] = value
        else:
            base.append(text)
    return own, searched, base


def _settings(section: str, given: Any, own: Mapping[str, Any], known: Mapping[str, type], problems: list[str]) -> Any:
    """The sampler or pruner of the file, or another one that the command line names, with the options of that line."""
    values = {"name": given} if isinstance(given, str) else dict(given) if isinstance(given, Mapping) else {}
    name = str(values.get("name", "none" if given is None else given))
    if name not in known:
        problems.append(f"{section}={name} is not known{suggest(name, known)}")
        return None
    prefix = f"{section}."
    values.update({key.removeprefix(prefix): value for key, value in own.items() if key.startswith(prefix)})
    return build(known[name], values, section, problems)


def _metrics(given: Any) -> tuple[str, ...]:
    metrics = tuple(str(one) for one in given) if isinstance(given, list) else (str(given),)
    for metric in metrics:
        if metric.startswith("test/"):
            raise _FileError(f"metric {metric}: the test set chooses nothing{suggest(metric, METRICS)}")
        if metric not in METRICS:
            raise _FileError(f"metric {metric} is not of the validation split{suggest(metric, METRICS)}")
    if not metrics or len(set(metrics)) < len(metrics):
        raise _FileError("metric must name at least one metric, each once.")
    return metrics


def _check_pruning(pruner: Any, metrics: Sequence[str], seeds: Sequence[int], space: Mapping[str, str]) -> None:
    if pruner.name != "none" and len(metrics) > 1:
        raise _FileError(
            f"pruner={pruner.name} judges by one metric, not by {len(metrics)}; keep one, or set pruner=none."
        )
    if pruner.name == "wilcoxon" and len(seeds) < WILCOXON_SEEDS:
        raise _FileError(
            f"pruner=wilcoxon compares over paired seeds and needs at least {WILCOXON_SEEDS} of them, better 6: below that no "
            "difference is beyond chance; set seeds=[0,1,2,3,4,5], or pruner=hyperband for one seed."
        )
    if pruner.name in OVER_EPOCHS and "recipe.duration" in space:
        raise _FileError(
            f"pruner={pruner.name} compares trials at equal epochs; take recipe.duration out of the space."
        )


def _check_space(
    every: Sequence[str], space: Mapping[str, str], first: Sequence[str]
) -> tuple[Config, dict[str, BaseDistribution]]:
    """Compose every end and choice of each setting beside the first values of the others."""
    for key in space:
        if key == "seed":
            raise _FileError("seed cannot be searched; the seeds of each trial stand under seeds.")
        if not changes_results(key):
            raise _FileError(f"{key} does not change a result; give it on the command line instead.")
        if key.split(".")[0] == "data":
            raise _FileError(f"{key} changes the data, on which trials are compared; fix it.")
    problems: list[str] = []
    distributions: dict[str, BaseDistribution] = {}
    composed = compose(merge_overrides(every, first)).config
    for key, text in space.items():
        distributions[key] = distribution_of(f"{key}={text}", whole=type(_value_at(composed, key)) is int)
    for place, (key, distribution) in enumerate(distributions.items()):
        for value in ends(distribution):
            try:
                compose(merge_overrides(every, [*first[:place], f"{key}={value}", *first[place + 1 :]]))
            except UserError as error:
                problems.append(f"{key}={value}: {error}")
    if problems:
        raise _FileError(join_problems(problems))
    try:
        default = compose(every).config
    except UserError:
        # the overrides alone need not be a configuration
        default = composed
    return default, distributions


def _first(key: str, text: str) -> str:
    override = parse_override(f"{key}={text}")
    if not override.is_sweep_override():
        raise _FileError(
            f"{key}: {text} is one value and nothing to search; give it under overrides, or several values."
        )
    if override.is_discrete_sweep():
        return next(iter(itertools.islice(override.sweep_string_iterator(), 1)), "null")
    value = override.value()
    assert isinstance(value, IntervalSweep) and value.start is not None
    # Hydra reads both ends as numbers with a fraction, which whole settings refuse
    return str(int(value.start)) if value.start == int(value.start) else str(value.start)


def _value_at(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name, None)
    # a group is chosen by its name
    return getattr(value, "name", value) if dataclasses.is_dataclass(value) else value


def _defaults(config: Config, distributions: Mapping[str, BaseDistribution]) -> dict[str, Any] | None:
    """Parameters of a configuration; None where it lies outside the space."""
    found = {key: value_in(one, _value_at(config, key)) for key, one in distributions.items()}
    return None if any(value is None for value in found.values()) else found
