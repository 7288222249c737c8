"""Batches of a split, read ahead: decoded in worker processes and handed over in order, or indexed in memory.

Which images, crops and flips a batch holds is decided here, in the process that trains; workers only carry it out. So
their number changes no byte, and nothing is decoded before the place where reading begins.
"""

from __future__ import annotations

import math
import os
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from basd.data.disk import Answer, CentreJob, CropJob, DiskImages, refuse
from basd.data.images import ImageSet, ImageSource
from basd.data.views import CropDraws, eval_view
from basd.errors import UserError

# Images a job: enough to make handing over cheap, few enough that all workers share a batch.
JOB_IMAGES = 32
# Batches that are prepared while one is used.
AHEAD = 2
MOST_WORKERS = 16
# In the environment of the workers of `basd grid`: how many of them this machine has.
TRAINERS = "BASD_TRAINERS"


class Crops(NamedTuple):
    """Random crops of a batch, on the split's device."""

    images: Tensor  # uint8 (B,3,S,S)
    own: Tensor | None  # the student's own crops, likewise
    labels: Tensor  # int64 (B,)
    unreadable: tuple[str, ...] = ()  # what was replaced by another image


class Wanted(NamedTuple):
    """A batch to be read: images by number, and the random numbers of their crops."""

    indices: Tensor  # int64 (B,)
    draws: CropDraws
    own: CropDraws | None = None


def worker_count(wanted: int, device: torch.device) -> int:
    """Decoding processes of one training process; `wanted` −1 chooses.

    On CUDA this process's share of the cores less one, at most 16; on a CPU, where a step takes far longer than decoding
    its images, one, if there is a second core. `basd grid` and torchrun say how many processes train on this machine.
    """
    if wanted >= 0:
        return wanted
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type != "cuda":
        return min(1, cores - 1)
    trainers = max(int(os.environ.get(name) or 1) for name in (TRAINERS, "LOCAL_WORLD_SIZE"))
    return max(1, min(MOST_WORKERS, cores // trainers - 1))


def crop_batches(
    source: DiskImages, wanted: Iterable[Wanted], batch_size: int, workers: int
) -> Generator[Crops, None, None]:
    """Random crops of each wanted batch, of about `batch_size` images each, in order. `UserError` at an unreadable image, unless the split skips those."""

    def jobs() -> Iterator[list[CropJob]]:
        for indices, draws, own in wanted:
            size = _job_size(len(indices), workers)
            rows = [slice(start, start + size) for start in range(0, len(indices), size)]
            yield [CropJob(indices[r], draws.take(r), None if own is None else own.take(r)) for r in rows]

    for answers in _answers(source, jobs(), batch_size, workers, source.device):
        unreadable = tuple(said for answer in answers for said in answer.unreadable)
        if unreadable and not source.skip:
            raise refuse(unreadable)
        labels = source.labels[torch.cat([answer.read for answer in answers])]
        own = [answer.own for answer in answers if answer.own is not None]
        yield Crops(
            _on_device([answer.crops for answer in answers], source.device),
            _on_device(own, source.device) if own else None,
            labels.to(source.device),
            unreadable,
        )


def evaluation_batches(
    source: ImageSource, size: int, share: float, batch_size: int, device: torch.device, workers: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """A split in order: evaluation views float32 (b,3,size,size) in [0,1] on `device`, and labels int64 (b,) on the CPU.

    `share`: the central square's side over the image's shorter side. A label of −1: the image is unreadable and left out
    of what is computed (`data.corrupt=skip`; otherwise `UserError`).
    """
    if isinstance(source, ImageSet):
        for images, labels in zip(source.images.split(batch_size), source.labels.split(batch_size), strict=True):
            yield eval_view(images.to(device), size, share), labels.cpu()
        return
    assert isinstance(source, DiskImages), type(source)

    def jobs() -> Iterator[list[CentreJob]]:
        for batch in torch.arange(len(source)).split(batch_size):
            yield [CentreJob(part, size, share) for part in batch.split(_job_size(batch_size, workers))]

    for answers in _answers(source, jobs(), batch_size, workers, device):
        unreadable = tuple(said for answer in answers for said in answer.unreadable)
        if unreadable and not source.skip:
            raise refuse(unreadable)
        read = torch.cat([answer.read for answer in answers])
        labels = torch.where(read < 0, -1, source.labels[read.clamp_min(0)])
        yield eval_view(_on_device([answer.crops for answer in answers], device), size), labels


def _job_size(batch_size: int, workers: int) -> int:
    return max(1, min(JOB_IMAGES, math.ceil(batch_size / max(1, workers))))


def _on_device(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """uint8 (n,S,S,3) pieces as one (B,3,S,S) on a device; from pinned memory the copy does not wait."""
    if device.type == "cpu":
        return torch.cat(list(parts)).permute(0, 3, 1, 2).contiguous()
    moved = torch.cat([part.to(device, non_blocking=True) for part in parts])
    return moved.permute(0, 3, 1, 2).contiguous()


# -- workers -----------------------------------------------------------------------------------------------------------


class _Done(NamedTuple):
    """An answer, or the sentence for the user: an exception would come back from a worker as its traceback."""

    answer: Answer | None
    error: str = ""


class _Jobs(Dataset):
    """What a worker holds; its items are looked up by job."""

    def __init__(self, source: DiskImages) -> None:
        self.source = source

    def __getitem__(self, job: CropJob | CentreJob) -> _Done:
        try:
            return _Done(self.source.answer(job))
        except UserError as error:
            return _Done(None, str(error))


def _start_worker(_number: int) -> None:
    # Ctrl-C and a preemption reach the whole process group: the trainer ends its step first, and then its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def _answers(
    source: DiskImages, batches: Iterator[list[Any]], batch_size: int, workers: int, device: torch.device
) -> Iterator[list[Answer]]:
    """The answers to each batch of jobs, in order; in pinned memory where they go to a CUDA device."""
    counts: deque[int] = deque()

    def jobs() -> Iterator[Any]:
        for batch in batches:
            counts.append(len(batch))
            yield from batch

    options: dict[str, Any] = {}
    if workers > 0:
        jobs_a_batch = math.ceil(batch_size / _job_size(batch_size, workers))
        ahead = max(2, math.ceil(AHEAD * jobs_a_batch / workers))
        options = {"prefetch_factor": ahead, "worker_init_fn": _start_worker}
    loader = DataLoader(
        _Jobs(source),
        batch_size=None,
        sampler=jobs(),
        num_workers=workers,
        # its own: otherwise the loader draws from torch's global state
        generator=torch.Generator(),
        pin_memory=device.type == "cuda",
        **options,
    )
    try:
        done = iter(loader)
        for one in done:
            # counted before its first job was handed out
            count = counts.popleft()
            yield [_answer(one), *(_answer(next(done)) for _ in range(count - 1))]
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise UserError(
                f"a process that decodes images ended ({' '.join(str(error).split())}); lower runtime.workers, give the "
                "machine more shared memory (/dev/shm), or set runtime.workers=0."
            ) from error
        raise


def _answer(done: _Done) -> Answer:
    if done.answer is None:
        raise UserError(done.error)
    return done.answer
