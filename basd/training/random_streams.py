"""Random streams keyed by (seed, purpose, epoch, step); nothing else in BASD draws random numbers."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch

# Purposes: one constant per stream, so that two parts never share one.
ORDER = "order"
CLEAN_VIEW = "clean_view"
STRONG_VIEW = "strong_view"
MIXING = "mixing"
ARM_STEP = "arm_step"
STUDENT_INIT = "student_init"
COMPONENT_INIT = "component_init"
TEACHER_FIT = "teacher_fit"
TEACHER_INIT = "teacher_init"
TEACHER_ORDER = "teacher_order"
TEACHER_VIEW = "teacher_view"
PROBE = "probe"
BAND_NOISE = "band_noise"


def stream_seed(seed: int, purpose: str, epoch: int = 0, step: int = 0) -> int:
    """A 63-bit seed; equal keys give equal seeds on every machine."""
    key = f"{seed}/{purpose}/{epoch}/{step}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, epoch: int = 0, step: int = 0) -> torch.Generator:
    """A CPU generator of the stream."""
    return torch.Generator().manual_seed(stream_seed(seed, purpose, epoch, step))


@contextmanager
def isolated(seed: int, purpose: str, epoch: int = 0, step: int = 0) -> Iterator[None]:
    """Library code that draws from global state runs in here: the state is saved, seeded by the stream, and restored."""
    value = stream_seed(seed, purpose, epoch, step)
    state_python, state_numpy, state_torch = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    state_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    random.seed(value)
    numpy.random.seed(value % 2**32)
    torch.manual_seed(value)
    try:
        yield
    finally:
        random.setstate(state_python)
        numpy.random.set_state(state_numpy)
        torch.set_rng_state(state_torch)
        if state_cuda is not None:
            torch.cuda.set_rng_state_all(state_cuda)
