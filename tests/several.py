"""Two processes and one compute the same: the body of `test_distributed.py`, run as `python several.py RANK PORT FOLDER`.

Each process first computes half of the cases alone, on the joined batch; then both compute all of them together. What they
find is written to FOLDER/report-RANK.json. Everything is float64, so that what is compared is not rounding.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tiny import TINY, MemoryRecorder
from toggles import PACKED, TOGGLES, overrides_of
from torch import Tensor, nn

from basd import distributed
from basd.components.comparison import TwoViews
from basd.compose import compose
from basd.config import Config, FrozenArm, from_dict
from basd.data.mixing import Mix, soft_labels
from basd.models.teacher import Teacher, build_digits_vit
from basd.training.arm import TrainingArm
from basd.training.cohort import train_cohort
from basd.training.team import together

WORLD, BATCH, CLASSES, SIZE = 2, 8, 10, 20
PLAIN = ["student.drop_path=0.0", "recipe.duration=10 steps", f"recipe.batch_size={BATCH}"]
# presets, and arms of several toggles by the joined names
CASES = {"+".join(names): names for names in (*((name,) for name in TOGGLES if name.startswith("method=")), *PACKED)}
Found = dict[str, Tensor]


def mixing_of(config: Config) -> Mix | None:
    kind = config.mixing.name
    if kind == "none" or getattr(config.mixing, "targets", "") == "skip":
        return None
    return Mix("mixup", 0.3) if kind == "mixup" else Mix("cutmix", 1 - 11 * 9 / SIZE**2, (9, 20, 3, 12))


def perturb(module: nn.Module, amount: float) -> None:
    """Away from zeros and symmetric starts, so that every path has a gradient."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(amount * torch.randn_like(parameter))


def write_configs(folder: Path) -> None:
    """The configurations of all cases, which Hydra takes longer to compose than the cases take to compute."""

    def composed(name: str) -> Config:
        # 8 pooled images have 28 pairs
        few = ["losses.rel.num_pairs=20"] if "vertices=pooled" in name and "pairs=all" not in name else []
        return compose([*TINY, *PLAIN, *overrides_of(*CASES[name]), *few]).config

    (folder / "configs.json").write_text(json.dumps({name: composed(name).to_dict() for name in CASES}))


@lru_cache(maxsize=1)
def configs() -> dict[str, Config]:
    written = json.loads((Path(sys.argv[3]) / "configs.json").read_text())
    return {name: from_dict(values) for name, values in written.items()}


def one_case(name: str) -> Found:
    """Gradients of every parameter, averaged over processes, and all scalars for the log, after two steps of a toggle."""
    config = configs()[name]
    torch.manual_seed(0)
    model = build_digits_vit(config.teacher, CLASSES)
    perturb(model, 0.1)
    teacher = Teacher(model, True, nn.Linear(config.teacher.width, CLASSES))
    arm = TrainingArm(config, teacher.shape, CLASSES, 2, torch.device("cpu"))
    perturb(arm.student, 0.05)
    perturb(arm.objective, 0.05)
    rows = None if distributed.world() == 1 else distributed.local_rows(BATCH, distributed.rank(), distributed.world())
    rows = torch.arange(BATCH) if rows is None else rows
    found: Found = {}
    for step in (0, 4):
        pictures = torch.randn(4, BATCH, 3, SIZE, SIZE)[:, rows]
        labels = torch.randint(CLASSES, (BATCH,))[rows]
        mix = mixing_of(config)
        strong, clean, real, seen = pictures
        targets = soft_labels(labels, CLASSES) if mix is None else mix.mix_labels(labels, CLASSES)
        student = arm.tapped(strong if mix is None else mix.mix_images(strong))
        views = None
        if arm.objective.demands.two_views:
            views = TwoViews(arm.tapped(real if mix is None else mix.mix_images(real)).logits, teacher(seen))
        output = arm.objective(student, teacher(clean), targets.double(), mix, step, generator, True, views)
        arm.optimizer.zero_grad(set_to_none=True)
        output.total.backward()
        distributed.average_gradients(arm.parameters)
        for part, value in output.parts.items():
            found[f"{step} {part}"] = torch.as_tensor(value).detach().double()
        for kind, module in (("student", arm.student), ("objective", arm.objective)):
            for key, parameter in module.named_parameters():
                if parameter.grad is not None:
                    found[f"{step} gradient of {kind}.{key}"] = parameter.grad.clone()
    return found


def generator(purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(len(purpose))


def difference(alone: Found, together: Found) -> tuple[float, str]:
    """The largest relative difference and where it is; infinite where one side has what the other lacks."""
    if alone.keys() != together.keys():
        return float("inf"), ", ".join(sorted(alone.keys() ^ together.keys()))
    largest = max(float(value.abs().max()) for name, value in alone.items() if "gradient" in name)
    worst = (0.0, "")
    for name, value in alone.items():
        # what is zero but for rounding is measured against the largest gradient
        scale = float(value.abs().max()) + 1e-6 * largest
        error = float((value - together[name]).abs().max()) / scale
        worst = max(worst, (error if error == error else float("inf"), name))
    return worst


def controls(alone: Found) -> dict[str, float]:
    """Differences of the complete method where a reduction is wrong on purpose."""
    errors = {}
    right = distributed._AllReduceSum.backward
    distributed._AllReduceSum.backward = staticmethod(lambda ctx, gradient: gradient)
    errors["raw all_reduce"] = difference(alone, one_case("basd"))[0]
    distributed._AllReduceSum.backward = right
    whole = distributed.all_reduce_sum
    distributed.all_reduce_sum = lambda value: value * WORLD
    errors["own statistics"] = difference(alone, one_case("basd"))[0]
    distributed.all_reduce_sum = whole
    return errors


def failures() -> dict[str, str]:
    """What an action that fails on both processes, on one, and in the first only becomes."""

    def fail(ranks: tuple[int, ...]) -> Callable[[], None]:
        def action() -> None:
            if distributed.rank() in ranks:
                raise ValueError("no")

        return action

    def outcome(action: Callable[[], Any]) -> str:
        try:
            action()
        except Exception as error:
            return type(error).__name__
        return "done"

    distributed.AGREEMENT = 1.0
    return {
        "both": outcome(lambda: distributed.attempt(fail((0, 1)))),
        "by the first": outcome(lambda: distributed.attempt(lambda: distributed.by_first(fail((0,))))),
        "one": outcome(lambda: distributed.attempt(fail((1,)))),
        "any": str(distributed.any_rank(distributed.rank() == 1)),
        "first": distributed.by_first(lambda: f"from {distributed.rank()}"),
    }


def absent_gradients() -> list[list[float] | None]:
    """Gradients of three parameters: one that both have, one that only the second process has, one that nobody has."""
    parameters = [torch.zeros(2, requires_grad=True) for _ in range(3)]
    parameters[0].grad = torch.full((2,), 1.0 + distributed.rank())
    if distributed.rank() == 1:
        parameters[1].grad = torch.ones(2)
    distributed.average_gradients(parameters)
    return [None if p.grad is None else p.grad.tolist() for p in parameters]


# -- whole runs: float32, as users run them ------------------------------------------------------------------------------


class Run:
    """An arm that is trained in pieces."""

    def __init__(self, arm: FrozenArm, directory: Path) -> None:
        self.arm, self.directory, self.recorder = arm, directory, MemoryRecorder()

    def train(self, steps: int | None = None) -> dict[str, Any]:
        """Train some steps, or to the end."""
        left = [steps]

        def stop() -> bool:
            if left[0] is None:
                return False
            left[0] -= 1
            return left[0] < 0

        result = train_cohort([self.arm], [self.directory], [self.recorder], stop=stop)[0]
        return {"status": result.status, "reason": result.reason, "metrics": result.metrics}

    def report(self, end: dict[str, Any]) -> dict[str, Any]:
        return {**end, "records": self.recorder.results}


def frozen(folder: Path) -> FrozenArm:
    return FrozenArm.from_dict(json.loads((folder / "arm.json").read_text()))


def runs_alone(folder: Path) -> tuple[dict[str, Any], Run, Run]:
    """A whole run, one that is to go on in two processes, and one that has not begun."""
    arm = frozen(folder)
    whole = Run(arm, folder / "whole")
    moved = Run(arm, folder / "moved")
    report = {"alone": whole.report(whole.train())}
    moved.train(3)
    return report, moved, Run(arm, folder / "joined")


SINGLE, SINGLES = torch.float32, Tensor.float


def use(kind: torch.dtype) -> None:
    """Compute in float64 what the code asks float32 for, or as it is again."""
    Tensor.float = Tensor.double if kind == torch.float64 else SINGLES  # type: ignore[method-assign]
    torch.float32 = kind  # type: ignore[misc]
    torch.set_default_dtype(kind)
    # constants that are kept from one call to the next
    for module in [module for name, module in sys.modules.items() if name.startswith("basd.")]:
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def main(own: int, port: str, folder: Path) -> None:
    torch.set_num_threads(1)
    report: dict[str, Any] = {}
    prepared = runs_alone(folder) if own == 0 else None
    use(torch.float64)
    alone = {name: one_case(name) for name in list(CASES)[own::WORLD]}
    if own == 1:
        alone["basd"] = one_case("basd")

    os.environ.update(RANK=str(own), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    distributed.start()
    report["errors"] = {}
    for name in CASES:
        found = one_case(name)
        if name in alone:
            report["errors"][name] = difference(alone[name], found)
    report["controls"] = controls(alone["basd"])
    report["absent"] = absent_gradients()
    report["failures"] = failures()

    use(SINGLE)
    if prepared is None:
        together(lambda: 1)
    else:
        finished, moved, joined = prepared

        def command() -> int:
            finished["joined"] = joined.report(joined.train())
            moved.train(3)
            return 7

        finished["status"] = together(command)
        # back in one process
        finished["moved"] = moved.report(moved.train())
        report["runs"] = finished
    (folder / f"report-{own}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
