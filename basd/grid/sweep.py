"""`basd sweep`: ask a batch of configurations, train their arms as a grid, tell the search what became of them, and go on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from basd.errors import UserError
from basd.grid.options import GridOptions
from basd.grid.plan import Resources
from basd.grid.run import Outcome, mirror_of, run_grid, sync
from basd.grid.search import HOPELESS, REASON, Search
from basd.grid.sweeps import OVER_EPOCHS, Sweep
from basd.training.device import check_device

if TYPE_CHECKING:
    from rich.console import Console

    from basd.config import Config
    from basd.grid.plan import Plan

# Seconds for a tracking store that was away to take the rest.
PATIENCE = 120.0


@dataclass
class SweepOutcome:
    """What became of a sweep: trials by state, and whether it came to its end."""

    states: Counter[str] = field(default_factory=Counter)  # COMPLETE, PRUNED, FAIL, RUNNING
    failures: dict[int, str] = field(default_factory=dict)  # trial → reason
    trained: int = 0  # arms completed by this call
    pruned: int = 0  # arms that it has left on their way
    interrupted: bool = False
    stuck: str = ""  # why it ended before its last trial
    mirrored: bool = True
    mirror_problem: str = ""
    plan: Plan | None = None


def run_sweep(
    sweep: Sweep,
    options: GridOptions,
    prepare: Callable[[Config], Resources],
    *,
    console: Console,
    quiet: bool = False,
    here: bool = False,
) -> SweepOutcome:
    """Search until every trial of the sweep has ended, however often this was interrupted before.

    Several calls at once, on one machine or several, share the work. `here`: train in this process.
    """
    check_device(sweep.config)
    search = Search(sweep, options, prepare)
    check_epochs(sweep, search.epochs, console)
    outcome, begun = SweepOutcome(), False
    again = search.retry_failed()
    if again:
        console.print(f"{again} trials failed before and are tried again.", markup=False)
    while True:
        search.open_batch()
        wanted = search.wanted()
        if not wanted:
            if any(trial.state.name == "RUNNING" for trial in search.trials()):
                # the arms of a trial ended meanwhile
                search.settle()
                continue
            break
        outcome.plan = search.plan()
        numbers = [trial.number for trial in search.trials() if trial.state.name == "RUNNING"]
        of_all = f" of {sweep.trials}" if max(numbers) < sweep.trials else ""
        which = f"{'Trial' if len(numbers) == 1 else 'Trials'} {_listed(numbers)}{of_all}"
        console.print(f"{which}: {len(wanted)} {'arm' if len(wanted) == 1 else 'arms'}.", markup=False)
        done = run_grid(outcome.plan, options, only=wanted, here=here, untracked=begun, console=console, quiet=quiet)
        begun = True
        search.settle()
        _take_over(outcome, done)
        if outcome.interrupted or outcome.stuck:
            break
    trials = search.trials()
    outcome.states = Counter(trial.state.name for trial in trials)
    outcome.failures = {
        trial.number: str(trial.user_attrs.get(REASON, ""))
        for trial in trials
        if trial.state.name == "FAIL" or HOPELESS in trial.user_attrs
    }
    if any("arms" in trial.user_attrs for trial in trials):
        try:
            outcome.plan = search.plan()
        except UserError as error:
            outcome.stuck = outcome.stuck or str(error)
        else:
            outcome.plan.save()
            # of earlier batches and earlier calls too
            if not outcome.interrupted and mirror_of(outcome.plan, options, search.ledger).pending():
                _send_rest(outcome, outcome.plan, options)
    return outcome


def _send_rest(outcome: SweepOutcome, plan: Plan, options: GridOptions) -> None:
    """What the tracking store did not take while it was away."""
    try:
        sent = sync(plan, options, PATIENCE)
    except UserError as error:
        outcome.mirrored = False
        outcome.mirror_problem = f"{error}; the results are kept, `basd sync {plan.name}` sends them later"
    else:
        outcome.mirrored, outcome.mirror_problem = sent.mirrored, sent.mirror_problem


def print_sweep(console: Console, search: Search, *, probing: bool) -> None:
    """What a sweep will search, how far it is, and what the rest costs at most (nothing pruned)."""
    from rich.table import Table
    from rich.text import Text

    from basd.grid.display import print_prediction

    sweep, options = search.sweep, search.options
    console.print(f"{sweep.name} in {sweep.setting}: {sweep.question}", markup=False)
    shown = Table("setting", "values", "starts from")
    for key, values in sweep.space.items():
        shown.add_row(*map(Text, (key, values, str((sweep.defaults or {}).get(key, "")))))
    console.print(shown)
    check_epochs(sweep, search.epochs, console)
    trials = search.trials()
    states = Counter(trial.state.name.lower() for trial in trials)
    so_far = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none yet"
    console.print(
        f"{sweep.trials} trials in batches of {sweep.batch}, seeds {', '.join(map(str, sweep.seeds))}, by {sweep.sampler.name}, "
        f"pruner {sweep.pruner.name}, for {' and '.join(sweep.metrics)}; so far {so_far}.",
        markup=False,
    )
    left = sweep.trials - sum(trial.state.is_finished() for trial in trials)
    if not probing or left < 1:
        return
    from basd.grid.probe import measure

    console.print(
        "Measuring a few steps of the configuration that it starts from (--no-probe leaves this out).", markup=False
    )
    plan = search.alike(left)
    print_prediction(
        console, plan, {key: arm.total_steps for key, arm in plan.arms.items()}, measure(search.start()), options
    )
    if sweep.pruner.name != "none":
        console.print("Arms that are pruned make it shorter.", markup=False)


def check_epochs(sweep: Sweep, epochs: int, console: Console) -> None:
    """`UserError` where a pruner over epochs has nothing to decide on; a note where it seldom has."""
    if sweep.pruner.name not in OVER_EPOCHS:
        return
    every = sweep.config.recipe.validate_every
    least = getattr(sweep.pruner, "least_epochs", getattr(sweep.pruner, "warmup_epochs", 0))
    if not any(epoch >= least for epoch in range(every, epochs, every)):
        raise UserError(
            f"pruner={sweep.pruner.name} has nothing to decide on: the {epochs} epochs are validated every {every}; set "
            "recipe.validate_every=1, more epochs, or pruner=none."
        )
    if every > 1:
        console.print(
            f"Note: arms are validated, and left, every {every} epochs; recipe.validate_every=1 decides at each.",
            markup=False,
        )


def _take_over(outcome: SweepOutcome, done: Outcome) -> None:
    outcome.trained += done.trained
    outcome.pruned += len(done.pruned)
    outcome.interrupted = done.interrupted
    if not done.mirrored:
        outcome.mirrored, outcome.mirror_problem = False, done.mirror_problem
    if done.missing and not done.interrupted:
        outcome.stuck = f"{len(done.missing)} arms were not trained to their end"


def _listed(numbers: list[int]) -> str:
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}–{numbers[-1]}"
    return ", ".join(str(number) for number in numbers)
