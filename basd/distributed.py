"""Several processes that train as one: `torchrun … -m basd …`. Without them everything here is the identity and costs nothing.

Every rank holds an equal part of each batch. The convention that all of BASD keeps: the MEAN over ranks of the gradients of
the ranks' losses is the gradient of the one-process loss on the joined batch. A local mean over the batch keeps it as it
is; what is not a mean (a variance, a ratio of sums, a quantile) is computed from statistics that `all_reduce_sum` or
`average` have joined, and then is the same number on every rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from basd.errors import UserError

T = TypeVar("T")

# How long a rank waits for the others within a cohort; a checkpoint or an evaluation lies between two meetings at most.
MEETING = timedelta(minutes=10)
# How long followers wait for the next cohort: planning, fitting a teacher or another worker's arms may take days.
PATIENCE = timedelta(days=30)
# Seconds that a rank that failed waits for the others to have failed at the same place.
AGREEMENT = 30.0


class PeerLostError(RuntimeError):
    """The processes of this run are no longer in step; this one cannot go on alone."""


class _Links:
    """What `start` sets up besides torch's default group."""

    store: Any = None
    # waits for PATIENCE where the default group waits for MEETING
    patient: Any = None
    attempts = 0


# -- who is there ------------------------------------------------------------------------------------------------------


def launched() -> bool:
    """Whether torchrun started several processes, of which this is one."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in os.environ


def world() -> int:
    """How many processes train together; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def local_device(kind: torch.device) -> torch.device:
    """This rank's device of a kind: the CUDA device of its number on this machine. `UserError` with too few devices."""
    if world() == 1 or kind.type != "cuda":
        return kind
    if kind.index is not None:
        raise UserError(
            f"runtime.device={kind} is one device, but {world()} processes train together; choose runtime.device=cuda."
        )
    here, devices = int(os.environ.get("LOCAL_WORLD_SIZE", world())), torch.cuda.device_count()
    if here > devices:
        raise UserError(
            f"torchrun started {here} processes on this machine, which has {devices} CUDA device{'s' * (devices != 1)}; "
            f"start it with --nproc_per_node={devices}, or choose runtime.device=cpu."
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", rank())))


# -- start and end -----------------------------------------------------------------------------------------------------


def start() -> None:
    """Join the process group that torchrun's environment describes: gloo for CPU tensors, nccl for CUDA ones."""
    if dist.is_initialized():
        return
    if not dist.is_available():
        raise UserError("this torch was built without torch.distributed; start one process, without torchrun.")
    nccl = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        store, own, count = next(iter(dist.rendezvous("env://", timeout=MEETING)))
        backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
        dist.init_process_group(backend, store=store, rank=own, world_size=count, timeout=MEETING)
        _Links.store = dist.PrefixStore("basd", store)
        _Links.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"the processes of this run do not find each other ({first}); start them with torchrun."
        ) from error
    _Links.attempts = 0


def stop() -> None:
    """Leave the process group."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    _Links.store = _Links.patient = None


@contextmanager
def _meeting() -> Iterator[None]:
    """A collective call in here raises `PeerLostError` where another rank has ended or does not answer."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise PeerLostError(
            f"another of the {world()} processes of this run has ended or does not answer ({first}); "
            "run the same command again to go on from the last checkpoint."
        ) from error


# -- tensors -----------------------------------------------------------------------------------------------------------


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _summed(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # every rank's loss reads the sum: without this a rank would see its own share of the gradient only
        return _summed(gradients[0])


def _summed(value: Tensor) -> Tensor:
    joined = value.detach().clone(memory_format=torch.contiguous_format)
    with _meeting():
        dist.all_reduce(joined)
    return joined


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over ranks, the same on each; its backward sums the ranks' gradients. The identity for one process."""
    return value if world() == 1 else _AllReduceSum.apply(value)


def average(*values: Tensor) -> tuple[Tensor, ...]:
    """The means over ranks of some tensors of one type, in one reduction with autograd; unchanged for one process."""
    if world() == 1:
        return values
    joined = all_reduce_sum(torch.cat([value.flatten() for value in values])) / world()
    parts = joined.split([value.numel() for value in values])
    return tuple(part.view(value.shape) for part, value in zip(parts, values, strict=True))


def local_rows(batch_size: int, rank: int, world: int) -> Tensor:
    """Positions within a batch of the rows that one rank has, int64, ascending.

    A rank has pairs of positions i and B−1−i, so that `flip` of its rows pairs the same images as `flip` of the batch.
    """
    if batch_size % (2 * world):
        raise UserError(
            f"recipe.batch_size={batch_size} cannot be split into {world} parts of whole pairs of images (processes times "
            f"recipe.accumulation); choose a multiple of {2 * world}."
        )
    half = batch_size // (2 * world)
    first = torch.arange(rank * half, (rank + 1) * half)
    return torch.cat([first, (batch_size - 1 - first).flip(0)])


def join_rows(value: Tensor, dim: int = 0) -> Tensor:
    """The whole batch in its own order, on every rank, of a tensor that holds this rank's rows; with autograd."""
    if world() == 1:
        return value
    shape = list(value.shape)
    shape[dim] *= world()
    rows = local_rows(shape[dim], rank(), world()).to(value.device)
    return all_reduce_sum(value.new_zeros(shape).index_copy(dim, rows, value))


def total(value: float) -> float:
    """The sum over ranks of a number."""
    return value if world() == 1 else float(_summed(torch.tensor(value, dtype=torch.float64)))


def own_share(count: int) -> Tensor:
    """Every world-th of `count` positions, int64: what this rank evaluates."""
    return torch.arange(rank(), count, world())


def join_shares(value: Tensor, count: int) -> Tensor:
    """(count, …) in order, on every rank, of the rows `own_share(count)`; without gradient."""
    if world() == 1:
        return value
    whole = value.new_zeros(count, *value.shape[1:])
    whole[own_share(count).to(value.device)] = value.detach()
    return _summed(whole)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace gradients by their means over ranks, in one reduction.

    A parameter without a gradient counts as zero there; without one on every rank it stays without.
    """
    if world() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    absent = [parameter.grad is None for parameter in trained]
    flat = [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained]
    flat.append(torch.tensor([not missing for missing in absent], dtype=flat[0].dtype, device=flat[0].device))
    joined = torch.cat(flat)
    with _meeting():
        dist.all_reduce(joined)
    *gradients, present = joined.div_(world()).split([part.numel() for part in flat])
    for index, (parameter, gradient) in enumerate(zip(trained, gradients, strict=True)):
        if parameter.grad is not None:
            parameter.grad.copy_(gradient.view_as(parameter))
        elif float(present[index]) > 0:
            parameter.grad = gradient.view_as(parameter).clone()


@torch.no_grad()
def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Give every rank the values that the first one has."""
    if world() == 1:
        return
    with _meeting():
        for tensor in tensors:
            dense = tensor.detach().contiguous()
            dist.broadcast(dense, 0)
            tensor.copy_(dense)


# -- decisions ---------------------------------------------------------------------------------------------------------


def any_rank(flag: bool) -> bool:
    """Whether it is so on any rank."""
    if world() == 1:
        return flag
    votes = torch.tensor([int(flag)])
    with _meeting():
        dist.all_reduce(votes)
    return int(votes) > 0


def broadcast(value: T, *, patient: bool = False) -> T:
    """The first rank's value, on every rank. With `patient` the others wait for it as long as it takes."""
    if world() == 1:
        return value
    held = [value]
    with _meeting():
        dist.broadcast_object_list(held, 0, group=_Links.patient if patient else None, device=torch.device("cpu"))
    return held[0]


def by_first(compute: Callable[[], T], *, patient: bool = False) -> T:
    """What the first rank computes, on every rank. Where it raises, every rank raises; a `UserError` stays one."""
    if world() == 1:
        return compute()
    if rank() == 0:
        try:
            value = compute()
        except PeerLostError:
            raise
        except Exception as error:
            text = f"{error}" if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            broadcast((False, isinstance(error, UserError), text), patient=patient)
            raise
        broadcast((True, False, value), patient=patient)
        return value
    # the tuple is the first rank's: what is passed here is not sent
    done, users, result = broadcast((False, False, None), patient=patient)
    if done:
        return result  # type: ignore[return-value]
    raise UserError(str(result)) if users else RuntimeError(str(result))


def first_then_all(compute: Callable[[], T]) -> T:
    """`compute()` on every rank, but on the others only after the first is through: it may leave them a cache."""
    if world() == 1:
        return compute()
    kept: list[T] = []
    by_first(lambda: kept.append(compute()), patient=True)
    return kept[0] if kept else compute()


def attempt(action: Callable[[], T]) -> T:
    """`action()`, which fails on all ranks or on none: a failure of this one alone becomes a `PeerLostError`.

    A rank that fails tells the others by the store and waits a little for them to say the same; they cannot, where they wait
    for it in a reduction. All ranks must call this equally often.
    """
    if world() == 1:
        return action()
    _Links.attempts += 1
    number = _Links.attempts
    try:
        return action()
    except PeerLostError:
        raise
    except Exception as error:
        names = [f"failed/{number}/{index}" for index in range(world())]
        try:
            _Links.store.set(names[rank()], "1")
            _Links.store.wait(names, timedelta(seconds=AGREEMENT))
        except RuntimeError:
            raise PeerLostError(
                f"process {rank()} of {world()} failed where the others did not ({type(error).__name__}: {error}); "
                "run the same command again to go on from the last checkpoint."
            ) from error
        raise
