"""Pruning over epochs: a worker reports the validation metric of each epoch to the sweep's study and asks whether to go on."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from basd.errors import UserError
from basd.grid.storage import Database

if TYPE_CHECKING:
    import optuna

log = logging.getLogger("basd.pruning")
# User attribute of a trial: the epoch after which it was left.
DECIDED = "pruned_after_epoch"
# User attribute of the trial of the configuration that a sweep starts from: the others are compared with it to its end.
START = "start"


def epoch_pruner(settings: Mapping[str, Any], epochs: int) -> optuna.pruners.BasePruner:
    """Optuna's pruner for `hyperband` or `median` over this many epochs."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if settings["name"] == "hyperband":
            return optuna.pruners.HyperbandPruner(
                min_resource=settings["least_epochs"],
                max_resource=epochs,
                reduction_factor=settings["reduction_factor"],
            )
        return optuna.pruners.MedianPruner(
            n_startup_trials=settings["startup"], n_warmup_steps=settings["warmup_epochs"]
        )


class EpochPruner:
    """Decides at the ends of epochs which arms of a sweep are left.

    `facts`: the sweep's part of a plan, with the trials under way by the arm that they are judged by. An arm that a table needs
    as well is never left. A decision is written down before the arm acts on it and made once for each epoch, so that an arm
    that was killed and goes on from an earlier checkpoint decides as before.
    """

    def __init__(
        self, facts: Mapping[str, Any], ledger_url: str, timeout: float, in_tables: Callable[[str], bool]
    ) -> None:
        self._facts = facts
        self._database = Database(ledger_url, timeout)
        self._in_tables = in_tables
        self._study: optuna.Study | None = None

    def __call__(self, key: str, epoch: int, values: Mapping[str, float]) -> str:
        """Report what an arm reached after `epoch` epochs; returns why it is left, "" where it goes on."""
        metric = self._facts["metric"]
        trials = self._facts["trials"].get(key, [])
        if not trials or metric not in values:
            return ""
        try:
            with self._database.errors(), self._database.exclusive(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                verdicts = [self._judge(trial, epoch, values[metric]) for trial in trials]
        except UserError as error:
            # it may be pruned later; what it trains until then is not lost
            log.warning("arm %s goes on undecided: %s", key, error)
            return ""
        return verdicts[0] if all(verdicts) and not self._needed(key) else ""

    def decided(self, key: str) -> str:
        """Why an arm was left before its process could say so; "" where it was not."""
        trials = self._facts["trials"].get(key, [])
        if not trials:
            return ""
        with self._database.errors():
            found = [self._database.storage.get_trial(trial) for trial in trials]
        running = [trial.user_attrs for trial in found if trial.state.name == "RUNNING"]
        if not running or not all(DECIDED in own for own in running) or self._needed(key):
            return ""
        return self._sentence(int(running[0][DECIDED]))

    def _judge(self, trial_id: int, epoch: int, value: float) -> str:
        storage, study = self._database.storage, self._opened()
        trial = storage.get_trial(trial_id)
        if trial.state.name != "RUNNING":
            return ""
        if DECIDED in trial.user_attrs:
            return self._sentence(trial.user_attrs[DECIDED])
        if epoch in trial.intermediate_values:
            return ""
        storage.set_trial_intermediate_value(trial_id, epoch, value)
        # asked for the start too: others compete with what it reached
        if not study.pruner.prune(study, storage.get_trial(trial_id)) or START in trial.user_attrs:
            return ""
        storage.set_trial_user_attr(trial_id, DECIDED, epoch)
        return self._sentence(epoch)

    def _needed(self, key: str) -> bool:
        try:
            return self._in_tables(key)
        except UserError:
            return True

    def _sentence(self, epoch: int) -> str:
        return f"left by {self._facts['pruner']['name']} after epoch {epoch} of {self._facts['epochs']}"

    def _opened(self) -> optuna.Study:
        import optuna

        if self._study is None:
            pruner = epoch_pruner(self._facts["pruner"], self._facts["epochs"])
            self._study = optuna.load_study(
                study_name=self._facts["study"],
                storage=self._database.storage,
                sampler=optuna.samplers.RandomSampler(),
                pruner=pruner,
            )
        return self._study
