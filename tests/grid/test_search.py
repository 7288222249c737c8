"""The search of a sweep: compared with Optuna's own loop, killed after its writes, shared by two, with every kind of end.

No arm is trained: the tests tell the ledger their ends, with values that are a function of their configuration.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from ledgers import empty_ledger
from tiny import TINY

from basd.grid.ledger import Ledger
from basd.grid.options import GridOptions
from basd.grid.plan import Preparer
from basd.grid.pruning import EpochPruner
from basd.grid.search import Search, make_sampler
from basd.grid.storage import Database
from basd.grid.sweeps import Sweep, load_sweep
from basd.grid.worker import pruner_of

SPACE = {"weighting.temperature": "tag(log, interval(0.1, 10))", "weighting.scale": "choice(first, none)"}
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sweep]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweeps").mkdir()

    def sweep(*overrides: str, **changes: object) -> Sweep:
        values = {"space": SPACE, "sampler": {"name": "tpe", "startup": 3}, "trials": 7, "batch": 3, **changes}
        (tmp_path / "sweeps" / "mine.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        return load_sweep("mine", [*TINY, *overrides])

    return sweep


@pytest.fixture
def options(tmp_path: Path) -> GridOptions:
    return GridOptions(directory=str(tmp_path / "runs"), ledger_url=empty_ledger(tmp_path / "ledger.db"), retries=0)


def value(temperature: float, scale: str, seed: int = 0) -> float:
    """What an arm reaches: best at temperature 1, unscaled, and a little better with each seed."""
    return 0.9 - 0.2 * abs(math.log10(temperature)) - (0.1 if scale == "first" else 0.0) + 0.001 * seed


def of_arm(config: dict[str, Any]) -> float:
    return value(config["weighting"]["temperature"], config["weighting"]["scale"], config["seed"])


def end_arms(search: Search, keys: list[str], end: Callable[[Ledger, str, dict[str, Any]], Any] | None = None) -> None:
    """Claim arms and end them, all alike or as `end` says."""
    ledger, plan = search.ledger, search.plan()
    ledger.ensure([plan.arms[key] for key in keys], {key: plan.labels_of(key) for key in keys}, plan.name)
    while True:
        claimed = ledger.claim(keys, 16)
        if not claimed:
            break
        for key in claimed:
            config = plan.arms[key].config
            if end is not None:
                end(ledger, key, config)
            else:
                ledger.complete(key, {"val/top1": of_arm(config), "val/nll": 1 - of_arm(config)})
    ledger.close()


def run(search: Search, end: Callable[[Ledger, str, dict[str, Any]], Any] | None = None) -> list[Any]:
    """The whole search."""
    for _ in range(50):
        search.open_batch()
        keys = search.wanted()
        if keys:
            end_arms(search, keys, end)
        elif not any(trial.state.name == "RUNNING" for trial in search.trials()):
            break
        search.settle()
    return search.trials()


def told(trials: list[Any]) -> list[Any]:
    """What a search is: parameters, values and ends, in order."""
    return [(t.params, t.values, t.state.name, t.user_attrs.get("overrides"), t.intermediate_values) for t in trials]


@pytest.mark.parametrize(
    "sampler", ["tpe", "nsga2", *(pytest.param(name, marks=pytest.mark.full) for name in ("random", "gp"))]
)
def test_it_is_the_search_that_optuna_makes_of_the_same_samplers(
    make, options, preparer: Preparer, sampler: str
) -> None:
    startup = {"startup": 3} if sampler in ("tpe", "gp") else {"population": 3} if sampler == "nsga2" else {}
    sweep = make(sampler={"name": sampler, **startup})
    trials = run(Search(sweep, options, preparer))

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial({"weighting.temperature": 2.0, "weighting.scale": "first"})
    for first in (0, 3, 6):
        asked = []
        for number in range(first, min(first + 3, 7)):
            study.sampler = make_sampler(sweep, number)
            trial = study.ask()
            trial.suggest_float("weighting.temperature", 0.1, 10, log=True)
            trial.suggest_categorical("weighting.scale", ["first", "none"])
            asked.append(trial)
        for trial in asked:
            # as the configuration holds it
            temperature = float(f"{trial.params['weighting.temperature']:.4g}")
            study.tell(trial, value(temperature, trial.params["weighting.scale"]))
    assert [trial.params for trial in trials] == [trial.params for trial in study.trials]
    assert [trial.values for trial in trials] == [pytest.approx(trial.values) for trial in study.trials]


def test_a_trial_has_the_mean_over_its_seeds(make, options, preparer: Preparer) -> None:
    sweep = make("seeds=[0,1,4]", trials=2, batch=2)
    for trial in run(Search(sweep, options, preparer)):
        temperature = float(trial.user_attrs["overrides"][0].split("=")[1])
        expected = [value(temperature, trial.params["weighting.scale"], seed) for seed in (0, 1, 4)]
        assert trial.values == [pytest.approx(statistics.fmean(expected))]
        assert list(trial.user_attrs["values"]["val/top1"].values()) == pytest.approx(expected)


class Killed(BaseException):
    pass


def writes(monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """Count the search's writes to the database; the one with number `after` is the last thing that the process does."""
    from optuna.storages import RDBStorage

    count = [0]
    for name in ("_create_new_trial", "_set_trial_param", "set_trial_user_attr", "set_trial_system_attr", "set_trial_state_values",
                 "set_study_user_attr", "set_trial_intermediate_value", "create_new_study"):  # fmt: skip
        original = getattr(RDBStorage, name)

        def counted(*arguments: Any, _original: Any = original, **named: Any) -> Any:
            result = _original(*arguments, **named)
            count[0] += 1
            if count[0] == after:
                raise Killed
            return result

        monkeypatch.setattr(RDBStorage, name, counted)
    return count


@pytest.mark.parametrize(
    ("trials", "writes_between"), [(2, 6), pytest.param(4, 1, marks=pytest.mark.full)], ids=["few", "many"]
)
def test_killed_after_any_write_it_asks_for_the_same_trials(
    make, options, preparer: Preparer, trials: int, writes_between: int
) -> None:
    """Only the writes of the search: the tests of the ledger kill it in its own writes."""
    sweep = make(trials=trials, batch=trials // 2)

    def searched(own: GridOptions, after: int) -> int:
        """Run it, killed once in `open_batch` or `settle`; returns the number of writes there."""
        with pytest.MonkeyPatch.context() as patch:
            count = writes(patch, after)
            for _ in range(20):
                search = Search(sweep, own, preparer)
                try:
                    search.open_batch()
                    keys = search.wanted()
                    if not keys:
                        break
                    # the ledger's are not counted
                    written, count[0] = count[0], 10**6
                    end_arms(search, keys)
                    count[0] = written
                    search.settle()
                except Killed:
                    search.ledger.close()
                    count[0] = 10**6
                    searched(own, 0)
                    return 0
            return count[0]

    total = searched(options, 0)
    expected = told(Search(sweep, options, preparer).trials())
    assert len(expected) == trials and total > 6 * trials
    for after in range(writes_between // 2 + 1, total, writes_between):
        own = replaced(options, f"killed{after}")
        searched(own, after)
        assert told(Search(sweep, own, preparer).trials()) == expected, after


def test_two_at_once_share_the_trials(make, options, preparer: Preparer) -> None:
    sweep = make(trials=4, batch=2)
    one, other = Search(sweep, options, preparer), Search(sweep, options, preparer)
    one.open_batch()
    other.open_batch()
    assert len(one.trials()) == 2 and one.wanted() == other.wanted()
    end_arms(one, one.wanted())
    other.settle()
    one.settle()
    assert [trial.state.name for trial in one.trials()] == ["COMPLETE"] * 2
    other.open_batch()
    one.open_batch()
    assert len(one.trials()) == 4
    assert told(run(one)) == told(run(Search(sweep, replaced(options, "alone"), preparer)))


def replaced(options: GridOptions, name: str) -> GridOptions:
    other = Path(options.ledger_url.removeprefix("sqlite:///")).with_name(f"{name}.db")
    return dataclasses.replace(options, ledger_url=empty_ledger(other))


def test_arms_of_tables_are_not_trained_again(make, options, preparer: Preparer) -> None:
    sweep = make(
        sampler="grid", space={"weighting.scale": "choice(first, none)", "selector": "choice(uniform, forward)"}
    )
    assert sweep.trials == 4
    search = Search(sweep, options, preparer)
    search.open_batch()
    first = search.wanted()
    end_arms(search, first[:1])
    # a table has trained it before: nothing of it is wanted
    assert search.wanted() == first[1:]
    trials = run(search)
    assert [tuple(t.params.values()) for t in trials] == [
        ("first", "uniform"), ("first", "forward"), ("none", "uniform"), ("none", "forward")]  # fmt: skip


def test_equal_configurations_share_their_arms(make, options, preparer: Preparer) -> None:
    # with equal weights the temperature has no effect, and a loss alone makes every temperature the same
    off = [f"losses.{name}.enabled=false" for name in ("rel", "attn", "spectral")]
    sweep = make(*off, space={"weighting.temperature": "interval(1, 2)"}, trials=3, batch=3)
    search = Search(sweep, options, preparer)
    search.open_batch()
    assert len(search.trials()) == 3 and len(search.wanted()) == 1
    assert len({trial.values[0] for trial in run(search)}) == 1


def test_a_trial_that_diverged_tells_the_sampler_and_one_that_failed_is_tried_again(
    make, options, preparer: Preparer
) -> None:
    space = {"weighting.scale": "choice(first, none)", "weighting.temperature": "choice(1, 9)"}
    sweep = make(space=space, sampler="grid", batch=4)
    broken = [True]

    def end(ledger: Ledger, key: str, config: dict[str, Any]) -> None:
        if config["weighting"]["scale"] == "none" and broken[0]:
            ledger.fail(key, "no space left on device", "x.log")
        elif config["weighting"]["temperature"] > 5:
            ledger.fail(key, "the loss of step 3 is not finite (nan)")
        else:
            ledger.complete(key, {"val/top1": of_arm(config)})

    search = Search(sweep, options, preparer)
    trials = run(search, end)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "FAIL", "FAIL"]
    failed = trials[2:]
    assert all("x.log" in trial.user_attrs["reason"] for trial in failed)
    assert "not finite" in trials[1].user_attrs["reason"]
    # the next call tries again what the machine spoiled, with the same settings, and nothing else
    broken[0] = False
    search = Search(sweep, options, preparer)
    assert search.retry_failed() == len(failed)
    assert search.retry_failed() == 0
    trials = run(search, end)
    assert [trial.params for trial in trials[4:]] == [trial.params for trial in failed]
    assert [trial.state.name for trial in trials[4:]] == ["COMPLETE", "PRUNED"]


def test_a_combination_that_cannot_be_is_told_and_not_tried_again(make, options, preparer: Preparer) -> None:
    # each value is possible beside the other's first, not both together
    space = {"selector": "choice(uniform, static)", "head_aligner": "choice(conv, a2d)"}
    alone = [f"losses.{name}.enabled=false" for name in ("rsd", "rel", "spectral")]
    sweep = make(*alone, space=space, sampler="grid", batch=4)
    search = Search(sweep, options, preparer)
    trials = run(search)
    assert [trial.state.name for trial in trials].count("FAIL") == 1
    assert "head_aligner=a2d" in next(t for t in trials if t.state.name == "FAIL").user_attrs["reason"]
    assert search.retry_failed() == 0


# -- pruning -----------------------------------------------------------------------------------------------------------


def pruned_over_epochs(
    search: Search, epochs: int, curve: Callable[[dict[str, Any], int], float]
) -> Callable[[Ledger, str, dict[str, Any]], None]:
    """Ends of arms whose epochs are reported to the sweep's pruner, as a worker does."""

    def end(ledger: Ledger, key: str, config: dict[str, Any]) -> None:
        plan = search.plan()
        prune = pruner_of(plan, ledger, search.options)
        for epoch in range(1, epochs):
            reason = prune(key, epoch, {"val/top1": curve(config, epoch)}) if prune is not None else ""
            if reason:
                ledger.prune(key, reason)
                return
        ledger.complete(key, {"val/top1": curve(config, epochs)})

    return end


def test_hyperband_leaves_the_trials_that_optunas_leaves(make, options, preparer: Preparer) -> None:
    sweep = make("recipe.duration=9 epochs", pruner="hyperband", trials=6, batch=6, sampler="random")
    search = Search(sweep, options, preparer)
    assert search.epochs == 9

    def curve(config: dict[str, Any], epoch: int) -> float:
        return of_arm(config) * (1 - 0.5**epoch)

    trials = run(search, pruned_over_epochs(search, 9, curve))

    study = optuna.create_study(
        study_name=sweep.study, direction="maximize", pruner=optuna.pruners.HyperbandPruner(1, 9, 3)
    )
    study.enqueue_trial({"weighting.temperature": 2.0, "weighting.scale": "first"})
    order = []
    for number in range(6):
        study.sampler = make_sampler(sweep, number)
        trial = study.ask(sweep.distributions)
        reached = value(float(f"{trial.params['weighting.temperature']:.4g}"), trial.params["weighting.scale"])
        for epoch in range(1, 9):
            trial.report(reached * (1 - 0.5**epoch), epoch)
            # the configuration that the sweep starts from is never left, but others compete with it
            if trial.should_prune() and number > 0:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                order.append(epoch)
                break
        else:
            study.tell(trial, reached * (1 - 0.5**9))
    assert [t.state for t in trials] == [t.state for t in study.trials]
    assert [t.intermediate_values.keys() for t in trials] == [t.intermediate_values.keys() for t in study.trials]
    assert order, "something was left"
    assert all("left by hyperband after epoch" in t.user_attrs["reason"] for t in trials if t.state.name == "PRUNED")


def test_the_start_is_never_left(make, options, preparer: Preparer) -> None:
    sweep = make("recipe.duration=4 epochs", "weighting.scale=first", pruner={"name": "median", "startup": 0}, trials=3, batch=1,
                 sampler="random")  # fmt: skip
    search = Search(sweep, options, preparer)
    end = pruned_over_epochs(
        search, 4, lambda config, epoch: -abs(config["weighting"]["temperature"] - 9.0) + epoch / 100
    )
    trials = run(search, end)
    assert trials[0].params == {"weighting.temperature": 2.0} and trials[0].state.name == "COMPLETE"
    wilcoxon = make("seeds=[0,1,2,3]", "weighting.scale=first", pruner="wilcoxon", trials=2, batch=2)
    assert run(Search(wilcoxon, replaced(options, "w"), preparer))[0].state.name == "COMPLETE"


def test_later_seeds_are_for_those_that_are_left(make, options, preparer: Preparer) -> None:
    sweep = make("recipe.duration=4 epochs", "seeds=[0,1]", pruner={"name": "median", "startup": 1}, trials=5, batch=3)
    search = Search(sweep, options, preparer)
    assert sweep.stages == [(0,), (1,)]
    trials = run(search, pruned_over_epochs(search, 4, lambda config, epoch: of_arm(config) * epoch))
    states = search.ledger.arms()
    for trial in trials:
        kinds = [
            states[a["arm_key"]].state if a["arm_key"] in states else "" for a in trial.user_attrs["arms"].values()
        ]
        assert kinds == (["complete", "complete"] if trial.state.name == "COMPLETE" else ["pruned", ""])
    assert {trial.state.name for trial in trials} == {"COMPLETE", "PRUNED"}


@pytest.fixture
def started(make, options, preparer: Preparer) -> Iterator[tuple[Search, list[str], EpochPruner]]:
    sweep = make("recipe.duration=4 epochs", pruner={"name": "median", "startup": 1}, trials=4, batch=2)
    search = Search(sweep, options, preparer)
    search.open_batch()
    end_arms(search, search.wanted(), pruned_over_epochs(search, 4, lambda config, epoch: 0.1 * epoch))
    search.open_batch()
    keys = search.wanted()
    plan = search.plan()
    search.ledger.ensure([plan.arms[key] for key in keys], {}, "mine")
    assert search.ledger.claim(keys, 2) == keys
    prune = pruner_of(plan, search.ledger, options)
    assert prune is not None
    yield search, keys, prune
    search.ledger.close()


def test_a_decision_outlives_its_process(started) -> None:
    search, keys, prune = started
    assert prune(keys[0], 1, {"val/top1": 0.1}) == ""
    assert prune.decided(keys[0]) == ""
    assert "after epoch 2" in prune(keys[0], 2, {"val/top1": 0.1})
    # killed here and begun again from its first epoch, beside what others reported since
    again = pruner_of(search.plan(), search.ledger, search.options)
    assert "after epoch 2" in again.decided(keys[0]) and again.decided(keys[1]) == ""
    assert again(keys[1], 1, {"val/top1": 0.9}) == ""
    assert again(keys[1], 1, {"val/top1": 0.1}) == "", "an epoch is decided on once"


def test_an_arm_that_a_table_needs_is_not_left_and_one_that_was_left_is_taken_up(started) -> None:
    search, keys, prune = started
    arms = search.plan().arms
    search.ledger.ensure([arms[keys[0]]], {keys[0]: ["a row"]}, "a_table", again=True)
    assert prune(keys[0], 2, {"val/top1": 0.1}) == ""
    reason = prune(keys[1], 2, {"val/top1": 0.1})
    assert reason and search.ledger.prune(keys[1], reason)
    state = search.ledger.arms()[keys[1]]
    assert (state.state, state.reason) == ("pruned", reason)
    assert search.ledger.ensure([arms[keys[1]]], {keys[1]: ["a row"]}, "mine") == []
    assert search.ledger.ensure([arms[keys[1]]], {keys[1]: ["a row"]}, "a_table", again=True) == [keys[1]]


def test_what_decides_nothing(started) -> None:
    """A metric that is not the sweep's, an arm that nobody knows, and a locked ledger."""
    search, keys, _ = started
    prune = pruner_of(search.plan(), search.ledger, dataclasses.replace(search.options, ledger_timeout=0.1))
    assert prune is not None
    assert prune(keys[0], 1, {"train/loss": 3.0}) == ""
    assert prune("0" * 16, 1, {"val/top1": 0.0}) == ""
    with Database(search.options.ledger_url).exclusive():
        assert prune(keys[0], 2, {"val/top1": 0.1}) == ""
    assert "after epoch 2" in prune(keys[0], 2, {"val/top1": 0.1})


@pytest.mark.parametrize(("p", "count"), [(None, 4), pytest.param(0.05, 5, marks=pytest.mark.full)])
def test_wilcoxon_gives_no_more_seeds_to_what_is_worse(
    make, options, preparer: Preparer, p: float | None, count: int
) -> None:
    """The first trial is the best there can be; the second is worse with every seed: p = 1/16 with four, 1/32 with five."""
    pruner = "wilcoxon" if p is None else {"name": "wilcoxon", "p": p}
    space = {"weighting.temperature": "choice(1, 3)"}
    sweep = make("seeds=[0,1,2,3,4,5]", sampler="grid", pruner=pruner, batch=1, space=space)
    trials = run(Search(sweep, options, preparer))
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED"]
    assert sorted(trials[1].intermediate_values) == list(range(count))
    assert f"{count} paired seeds" in trials[1].user_attrs["reason"]


def test_several_metrics(make, options, preparer: Preparer) -> None:
    sweep = make(metric=["val/top1", "val/nll"], sampler={"name": "nsga2", "population": 3}, trials=4)
    trials = run(Search(sweep, options, preparer))
    assert sweep.directions == ["maximize", "minimize"]
    assert all(trial.values[1] == pytest.approx(1 - trial.values[0]) for trial in trials)


def test_passwords_stay_out_of_the_study(make, options, preparer: Preparer) -> None:
    sweep = make("tracking.uri=http://me:secret@host", trials=1)
    search = Search(sweep, options, preparer)
    search.open_batch()
    study = optuna.load_study(study_name=sweep.study, storage=options.ledger_url)
    assert study.trials
    assert "secret" not in str(study.user_attrs) and "secret" not in str([trial.user_attrs for trial in study.trials])
    assert next(iter(search.plan().arms.values())).config["tracking"]["uri"] == "http://me:secret@host"
