"""Memory of a training process: what an arm holds, and what to change where it was not enough."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor

GIB = 2**30
# Bytes of an arm's state from which on its end is worth the fraction of a second that a garbage collection takes.
WORTH_COLLECTING = 2**23


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that memory was not enough."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
            return True
        error = error.__cause__
    return False


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct tensors."""
    distinct = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}
    return sum(distinct.values())


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Have the C library keep what is freed: a step on a CPU allocates what the last one freed, hundreds of megabytes of it.

    By default glibc gives large blocks back to the system at once, which then hands out each page anew, zeroed; that takes up
    to a tenth of a step. Of the whole process, once; without effect where the C library has no `mallopt`.
    """
    mallopt = _of_the_c_library("mallopt")
    if mallopt is not None:
        # malloc.h: no block is mapped by itself, and the heap is never trimmed
        m_mmap_max, m_trim_threshold = -4, -1
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)


def _of_the_c_library(name: str) -> Callable[..., int] | None:
    """A function of the C library that this process runs on; None where it has none of that name."""
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
    return found


def begin_peak(device: torch.device) -> None:
    """Forget the peak so far. On CUDA also what only reference cycles still hold, such as models with hooks."""
    if device.type != "cuda":
        # what was kept of earlier work goes back to the system: what the process then holds is the peak of what follows
        trim = _of_the_c_library("malloc_trim")
        if trim is not None:
            trim(0)
        return
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """The most that the device's allocator held since `begin_peak`; on CPU what this process holds; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.Process().memory_info().rss)


def total_bytes(device: torch.device) -> int | None:
    """Memory of the device; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().total)


def available_bytes(device: torch.device) -> int | None:
    """The most that this process could hold on the device: what is free there and what it has already; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def gibibytes(count: float) -> str:
    """Bytes for people: "11.3 GiB", "240 MiB"."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.0f} MiB"


def asked_bytes(error: BaseException | None) -> int:
    """Bytes that the allocator was asked for when it gave up, as its message says; 0 where it does not."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        found = re.search(r"[Tt]r(?:ied|ying) to allocate ([0-9.]+) (bytes|KiB|MiB|GiB)", str(error))
        if found:
            return int(float(found[1]) * {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": GIB}[found[2]])
        error = error.__cause__
    return 0


def out_of_memory(
    error: BaseException,
    device: torch.device,
    *,
    precision: str,
    batch_size: int,
    accumulation: int,
    fixed: int = 0,
) -> str:
    """One sentence about an arm that does not fit alone: what was needed, what there is, and which settings to change.

    `fixed` bytes do not grow with the batch. What a smaller one would need follows from the least that this one did: the
    state stays, the rest is in proportion to the batch.
    """
    peak, total = peak_bytes(device), total_bytes(device)
    need = peak + asked_bytes(error) if peak is not None else None
    figures = ""
    if need is not None and total is not None:
        figures = f" ({gibibytes(need)} or more are needed, {device} has {gibibytes(total)})"

    ways = []
    if precision == "fp32" and device.type == "cuda":
        ways.append("runtime.precision=bf16")
    smaller = max(2, batch_size // 2)
    predicted = ""
    if need is not None:
        predicted = f"; it would need about {gibibytes(fixed + max(0, need - fixed) * smaller / batch_size)}"
    ways.append(f"recipe.batch_size={smaller} (now {batch_size}{predicted})")
    ways.append(f"recipe.accumulation={2 * accumulation}, which halves what a step holds of the batch")
    return f"out of memory{figures}: set {', or '.join(ways)}."
