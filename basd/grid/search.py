"""A sweep's search: its Optuna study in the ledger's database, asked in batches, told what became of the arms.

A trial is a configuration; its arms, one a seed, are those of the setting's ledger, shared with tables and other sweeps.
Everything that a trial needs to go on is in the study, so that a search goes on after any crash, on any machine. The random
numbers of a trial follow from the sweep's seed and the trial's number alone: what was interrupted asks for the same trials.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from basd.compose import compose
from basd.config import FrozenArm, digest
from basd.errors import UserError
from basd.grid.ledger import ArmState, Ledger
from basd.grid.plan import Plan, PlanRow, Resources, freeze
from basd.grid.pruning import START, epoch_pruner
from basd.grid.space import combinations, overrides_of
from basd.grid.sweeps import OVER_EPOCHS, Sweep
from basd.training.arm import NON_FINITE
from basd.training.recipe import parse_duration
from basd.version import code_version

if TYPE_CHECKING:
    from collections.abc import Callable

    import optuna
    from optuna.trial import FrozenTrial

    from basd.config import Config
    from basd.grid.options import GridOptions

# User attributes of a trial.
ARMS, CHOSEN, REASON, SEED_VALUES, RETRY = "arms", "overrides", "reason", "values", "retry_of"
# A configuration that cannot be, or that diverged: asking for it again would end alike.
HOPELESS = "hopeless"
# Sections of a frozen arm that are the process's own: addresses, which may hold passwords.
OWN = ("tracking", "ledger")


class Search:
    """The study of a sweep. Several processes may use it at once; each change is made under the ledger's lock."""

    def __init__(self, sweep: Sweep, options: GridOptions, prepare: Callable[[Config], Resources]) -> None:
        self.sweep, self.options = sweep, options
        self._prepare = prepare
        self.ledger = Ledger.of(options, sweep.setting)
        # one lock for both, which `_settle` holds while it asks the ledger
        self._database = self.ledger.database
        self._study: optuna.Study | None = None

    # Asking

    def open_batch(self) -> None:
        """Settle what has ended; where nothing is under way, ask for the next batch."""
        with self._writing() as study:
            self._settle(study)
            trials = study.get_trials(deepcopy=False)
            under_way = [trial.number for trial in trials if not trial.state.is_finished()]
            size, batch = len(trials), self.sweep.batch
            # a batch that was interrupted while it was asked for is filled first, or later trials would know more than before
            end = (min([size, *under_way]) // batch + 1) * batch
            limit = self.sweep.trials + sum(RETRY in trial.user_attrs for trial in trials)
            for trial in trials:
                if trial.state.name == "RUNNING" and ARMS not in trial.user_attrs:
                    self._begin(study, trial.number, trial._trial_id)
            waiting = sum(trial.state.name == "WAITING" for trial in trials)
            # of those that no failed one was asked for again
            index = sum(RETRY not in trial.user_attrs for trial in trials)
            for number in range(size - waiting, min(end, limit)):
                queued = number < size
                self._ask(study, number, None if queued else self._fixed(index))
                index += not queued

    def retry_failed(self) -> int:
        """Ask again for trials that failed for a reason of the machine rather than of theirs; returns how many."""
        with self._writing() as study:
            trials = study.get_trials(deepcopy=False)
            again = {trial.user_attrs.get(RETRY) for trial in trials}
            failed = [
                trial
                for trial in trials
                if trial.state.name == "FAIL" and HOPELESS not in trial.user_attrs and trial.number not in again
            ]
            states = self.ledger.arms()
            arms = [self._arm(values) for trial in failed for values in _arms(trial).values()]
            over = [arm for arm in arms if arm.arm_key in states and states[arm.arm_key].permanent]
            self.ledger.ensure(over, {}, self.sweep.name, again=True)
            for trial in failed:
                study.enqueue_trial(trial.params, user_attrs={RETRY: trial.number})
            return len(failed)

    def _ask(self, study: optuna.Study, number: int, fixed: dict[str, Any] | None) -> None:
        if fixed is not None:
            study.enqueue_trial(fixed, user_attrs={START: True} if self.sweep.sampler.name != "grid" else None)
        study.sampler = make_sampler(self.sweep, number)
        asked = study.ask()
        self._begin(study, asked.number, asked._trial_id)

    def _fixed(self, index: int) -> dict[str, Any] | None:
        """Parameters of a trial that nothing samples: the defaults first, or the combinations of a grid."""
        if self.sweep.sampler.name == "grid":
            return combinations(self.sweep.distributions)[index]
        return self.sweep.defaults if index == 0 else None

    def _begin(self, study: optuna.Study, number: int, trial_id: int) -> None:
        """Sample what a trial lacks, and freeze its arms."""
        import optuna

        study.sampler = make_sampler(self.sweep, number)
        trial = optuna.trial.Trial(study, trial_id)
        written = trial.params.keys()
        for key, one in self.sweep.distributions.items():
            if key in written:
                _draw_again(study, trial, key, one)
            _suggest(trial, key, one)
        chosen = overrides_of(trial.params, self.sweep.distributions)
        trial.set_user_attr(CHOSEN, chosen)
        try:
            arms = self._freeze(chosen)
        except UserError as error:
            trial.set_user_attr(HOPELESS, True)
            trial.set_user_attr(REASON, " ".join(str(error).split()))
            study.tell(number, state=optuna.trial.TrialState.FAIL)
            return
        frozen = {seed: _without(arm.to_dict(), OWN) for seed, arm in arms.items()}
        trial.set_user_attr(ARMS, {str(seed): arm for seed, arm in frozen.items()})

    def _freeze(self, chosen: Sequence[str]) -> dict[int, FrozenArm]:
        composed = compose(self.sweep.composed_with(chosen))
        resources = self._prepare(composed.config)
        arms = {}
        for seed in self.sweep.seeds:
            one = replace(composed, config=replace(composed.config, seed=seed))
            arms[seed] = freeze(one, self.sweep.setting, resources, self.sweep.setting_words)
        return arms

    # Telling

    def settle(self) -> None:
        """Tell the study of every trial whose arms have ended."""
        with self._writing() as study:
            self._settle(study)

    def _settle(self, study: optuna.Study) -> None:
        running = self._running(study)
        if not running:
            return
        states = self.ledger.arms()
        for trial in running:
            arms = _arms(trial)
            became = {seed: states.get(str(arm["arm_key"])) for seed, arm in arms.items()}
            self._end(study, trial, became)

    def _running(self, study: optuna.Study) -> list[FrozenTrial]:
        trials = study.get_trials(deepcopy=False)
        return [trial for trial in trials if trial.state.name == "RUNNING" and ARMS in trial.user_attrs]

    def _end(self, study: optuna.Study, trial: FrozenTrial, became: Mapping[int, ArmState | None]) -> None:
        """Tell what became of a trial, if it has ended."""
        from optuna.trial import TrialState

        known = {seed: state for seed, state in became.items() if state is not None}
        failed = [state for state in known.values() if state.state == "failed" and state.permanent]
        pruned = [state for state in known.values() if state.state == "pruned"]
        if failed:
            diverged = NON_FINITE in failed[0].reason
            self._note(
                trial, REASON, f"{failed[0].reason} (log: {failed[0].log})" if failed[0].log else failed[0].reason
            )
            if diverged:
                self._note(trial, HOPELESS, True)
            # of a trial that diverged the sampler learns that it was bad
            study.tell(trial.number, state=TrialState.PRUNED if diverged else TrialState.FAIL)
            return
        if pruned:
            self._note(trial, REASON, pruned[0].reason)
            self._copy_reports(study, trial, pruned[0].key)
            study.tell(trial.number, state=TrialState.PRUNED)
            return
        for stage in self.sweep.stages:
            if not all(seed in known and known[seed].state == "complete" for seed in stage):
                return
            reached = [known[seed] for seed in self.sweep.seeds[: self.sweep.seeds.index(stage[-1]) + 1]]
            compared = self.sweep.pruner.name == "wilcoxon" and START not in trial.user_attrs
            if compared and self._worse(study, trial, reached):
                study.tell(trial.number, state=TrialState.PRUNED)
                return
        values = {
            metric: {str(seed): known[seed].metrics[metric] for seed in self.sweep.seeds}
            for metric in self.sweep.metrics
        }
        self._note(trial, SEED_VALUES, values)
        study.tell(trial.number, [statistics.fmean(one.values()) for one in values.values()])

    def _worse(self, study: optuna.Study, trial: FrozenTrial, reached: Sequence[ArmState]) -> bool:
        """Whether the seeds so far say that a trial is worse than the best one, by Wilcoxon's signed-rank test."""
        import optuna

        study.pruner = optuna.pruners.WilcoxonPruner(p_threshold=self.sweep.pruner.p, n_startup_steps=0)
        metric, storage = self.sweep.metrics[0], self._database.storage
        for place, state in enumerate(reached):
            if place not in trial.intermediate_values:
                storage.set_trial_intermediate_value(trial._trial_id, place, state.metrics[metric])
        fresh = storage.get_trial(trial._trial_id)
        worse = study.pruner.prune(study, fresh)
        if worse:
            self._note(
                trial, REASON, f"worse than the best over {len(reached)} paired seeds (p < {self.sweep.pruner.p:g})"
            )
        return worse

    def _copy_reports(self, study: optuna.Study, trial: FrozenTrial, key: str) -> None:
        """A trial that asked for an arm which was left in another trial: what was reported there."""
        if trial.intermediate_values:
            return
        for other in study.get_trials(deepcopy=False):
            if other.intermediate_values and any(arm["arm_key"] == key for arm in _arms(other).values()):
                for step, value in other.intermediate_values.items():
                    self._database.storage.set_trial_intermediate_value(trial._trial_id, step, value)
                return

    def _note(self, trial: FrozenTrial, name: str, value: Any) -> None:
        self._database.storage.set_trial_user_attr(trial._trial_id, name, value)

    # Looking

    def trials(self) -> list[FrozenTrial]:
        """Every trial so far, by number; none where the study does not exist."""
        with self._database.errors():
            study = self._opened(create=False)
            return [] if study is None else study.get_trials(deepcopy=False)

    def wanted(self) -> list[str]:
        """Keys of the arms that trials under way need next, those of one seed together."""
        with self._database.errors():
            study = self._opened(create=False)
            running = [] if study is None else self._running(study)
            states = self.ledger.arms() if running else {}
        found: dict[str, int] = {}
        for trial in running:
            arms = _arms(trial)
            for stage in self.sweep.stages:
                keys = {str(arms[seed]["arm_key"]): seed for seed in stage}
                left = {key: seed for key, seed in keys.items() if key not in states or states[key].state != "complete"}
                found |= left
                if left:
                    break
        return sorted(found, key=lambda key: self.sweep.seeds.index(found[key]))

    def plan(self) -> Plan:
        """The arms of the trials so far, as far as their seeds were reached; trials that failed are left out."""
        arms: dict[str, FrozenArm] = {}
        cells: dict[str, dict[int, str]] = {}
        rows = []
        shown: dict[str, list[int]] = {}
        states, wanted = self.ledger.arms(), set(self.wanted())
        for trial in self.trials():
            if trial.state.name == "FAIL" or HOPELESS in trial.user_attrs:
                continue
            frozen = {seed: self._arm(values) for seed, values in _arms(trial).items()}
            reached = {seed: arm for seed, arm in frozen.items() if arm.arm_key in states or arm.arm_key in wanted}
            if not reached:
                continue
            name, first = f"trial-{trial.number:03d}", frozen[self.sweep.seeds[0]]
            chosen = tuple(trial.user_attrs[CHOSEN])
            rows.append(PlanRow(name, f"{trial.number}: {', '.join(chosen)}", first.configuration_key, chosen))
            cells[name] = {seed: arm.arm_key for seed, arm in reached.items()}
            arms |= {arm.arm_key: arm for arm in reached.values()}
            if trial.state.name == "RUNNING":
                shown.setdefault(first.arm_key, []).append(trial._trial_id)
        if not rows:
            raise UserError(f"sweep {self.sweep.name} has no trial that could be trained; see the reasons above.")
        pruner = dataclasses.asdict(self.sweep.pruner)
        return Plan(
            name=self.sweep.name,
            setting=self.sweep.setting,
            question=self.sweep.question,
            reference=rows[0].name,
            metrics=self.sweep.metrics,
            seeds=self.sweep.seeds,
            rows=tuple(rows),
            cells=cells,
            arms=arms,
            version=code_version(),
            hash=self.sweep.hash,
            teacher_top1=self._prepare(self.sweep.config).teacher.test_top1,
            sweep={
                "study": self.sweep.study,
                "metric": self.sweep.metrics[0],
                "pruner": pruner,
                "epochs": self.epochs,
                "trials": shown if self.sweep.pruner.name in OVER_EPOCHS else {},
            },
        )

    def start(self) -> list[FrozenArm]:
        """An arm of the configuration that the sweep starts from."""
        resources = self._prepare(self.sweep.config)
        chosen = overrides_of(self.sweep.defaults or {}, self.sweep.distributions)
        composed = compose(self.sweep.composed_with(chosen or self.sweep.first))
        seed = self.sweep.seeds[0]
        return [freeze(replace(composed, config=replace(composed.config, seed=seed)), self.sweep.setting, resources)]

    def alike(self, count: int) -> Plan:
        """A plan of `count` trials that all cost what the first one costs."""
        (arm,) = self.start()
        arms = {
            f"{number}-{seed}": replace(
                arm, arm_key=f"{number}-{seed}", cohort_key=f"{number // self.sweep.batch}-{seed}"
            )
            for number in range(count)
            for seed in self.sweep.seeds
        }
        return Plan(
            name=self.sweep.name,
            setting=self.sweep.setting,
            question=self.sweep.question,
            reference="",
            metrics=self.sweep.metrics,
            seeds=self.sweep.seeds,
            rows=(),
            cells={},
            arms=arms,
            version=code_version(),
            hash=self.sweep.hash,
        )

    @property
    def epochs(self) -> int:
        """Epochs of a trial."""
        recipe = self.sweep.config.recipe
        steps = max(1, self._prepare(self.sweep.config).train_size // recipe.batch_size)
        return -(-parse_duration(recipe.duration, steps) // steps)

    def _arm(self, values: Mapping[str, Any]) -> FrozenArm:
        """A frozen arm of the study, run where this process keeps its records."""
        own = self.sweep.config.to_dict()
        return FrozenArm.from_dict({**values, "config": {**values["config"], **{name: own[name] for name in OWN}}})

    # Inside

    @contextlib.contextmanager
    def _writing(self) -> Iterator[optuna.Study]:
        with self._database.errors(), self._database.exclusive(), warnings.catch_warnings():
            # Optuna says of half of what is used here that it may change
            warnings.simplefilter("ignore")
            study = self._opened(create=True)
            assert study is not None
            yield study

    def _opened(self, *, create: bool) -> optuna.Study | None:
        import optuna

        if self._study is None:
            if not create and not self._database.exists:
                return None
            storage = self._database.storage
            try:
                storage.get_study_id_from_name(self.sweep.study)
            except KeyError:
                if not create:
                    return None
            self._study = optuna.create_study(
                study_name=self.sweep.study,
                storage=storage,
                directions=self.sweep.directions,
                load_if_exists=True,
            )
            if create and "sweep" not in self._study.user_attrs:
                self._study.set_user_attr("sweep", facts_of(self.sweep, self.epochs))
        if self.sweep.pruner.name in OVER_EPOCHS:
            # samplers look at the trials of a trial's own bracket
            self._study.pruner = epoch_pruner(dataclasses.asdict(self.sweep.pruner), self.epochs)
        return self._study


def facts_of(sweep: Sweep, epochs: int) -> dict[str, Any]:
    """What a reader of the study needs to know of its sweep."""
    return {
        "name": sweep.name,
        "setting": sweep.setting,
        "question": sweep.question,
        "metrics": list(sweep.metrics),
        "seeds": list(sweep.seeds),
        "overrides": sweep.effective_overrides,
        "space": dict(sweep.space),
        "sampler": dataclasses.asdict(sweep.sampler),
        "pruner": dataclasses.asdict(sweep.pruner),
        "defaults": sweep.defaults,
        "hash": sweep.hash,
        "epochs": epochs,
    }


def make_sampler(sweep: Sweep, number: int) -> optuna.samplers.BaseSampler:
    """The sampler of one trial, with random numbers of its own."""
    import optuna

    settings = sweep.sampler
    seed = int(digest([getattr(settings, "seed", 0), number]), 16) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if settings.name == "tpe":
            return optuna.samplers.TPESampler(
                n_startup_trials=settings.startup, multivariate=True, constant_liar=True, seed=seed
            )
        if settings.name == "gp":
            return optuna.samplers.GPSampler(n_startup_trials=settings.startup, seed=seed)
        if settings.name == "nsga2":
            return optuna.samplers.NSGAIISampler(population_size=settings.population, seed=seed)
        return optuna.samplers.RandomSampler(seed=seed)


def _suggest(trial: optuna.Trial, key: str, one: optuna.distributions.BaseDistribution) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(one, CategoricalDistribution):
        return trial.suggest_categorical(key, one.choices)
    if isinstance(one, IntDistribution):
        return trial.suggest_int(key, one.low, one.high, step=one.step, log=one.log)
    assert isinstance(one, FloatDistribution)
    return trial.suggest_float(key, one.low, one.high, step=one.step, log=one.log)


def _draw_again(study: optuna.Study, trial: optuna.Trial, key: str, one: optuna.distributions.BaseDistribution) -> None:
    """Draw what a search drew that was killed after it wrote this parameter: the random numbers that follow are then the same."""
    from optuna.pruners import _filter_study

    # the cases in which Optuna asks the sampler for a single parameter (optuna.trial.Trial._suggest)
    if not (trial._is_fixed_param(key, one) or one.single() or trial._is_relative_param(key, one)):
        frozen = trial._get_latest_trial()
        study.sampler.sample_independent(_filter_study(study, frozen), frozen, key, one)


def _arms(trial: FrozenTrial) -> dict[int, dict[str, Any]]:
    """Frozen arms of a trial by seed, as JSON."""
    return {int(seed): arm for seed, arm in trial.user_attrs.get(ARMS, {}).items()}


def _without(arm: dict[str, Any], sections: Collection[str]) -> dict[str, Any]:
    return {**arm, "config": {name: values for name, values in arm["config"].items() if name not in sections}}
