"""Arms on few images, for what holds of any data: 216 for training, 24 and 48 to evaluate on; an epoch has 5 steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from data.stored_fakes import write_cifar10
from tiny import TINY

from basd.compose import compose
from basd.config import FrozenArm
from basd.grid.plan import Preparer, freeze

BATCH = 40


@pytest.fixture(scope="session")
def few_arm(preparer: Preparer, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., FrozenArm]:
    """few_arm("method=ce", …): as `tiny_arm`, on 32×32 noise in CIFAR-10's format instead of the digits."""
    root = tmp_path_factory.mktemp("cifar10")
    write_cifar10(root, n=48)
    common = [text for text in TINY if not text.startswith("data.image_size")]
    common += ["data=cifar10", f"data.root={root}", f"recipe.batch_size={BATCH}"]

    def make(*overrides: str, seed: int = 0) -> FrozenArm:
        composed = compose([*common, *overrides])
        composed = dataclasses.replace(composed, config=dataclasses.replace(composed.config, seed=seed))
        return freeze(composed, "tiny", preparer(composed.config))

    return make
