"""Number formats of a step and compiled forward passes: how fast an arm trains, not what it computes.

Weights, gradients, optimizer state and losses are float32 in every precision; autocast (arXiv:1710.03740) covers the forward
passes of student and teacher. float16 needs its gradients scaled; bfloat16 has float32's range and does not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

from basd.training.memory import is_out_of_memory

log = logging.getLogger("basd.training")

Wrap = TypeVar("Wrap", bound=Callable[..., Any])

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
# What compiles; a test may choose a backend that needs no compiler.
BACKEND = "inductor"
# Graphs of one function before torch gives up compiling it: arms of a cohort share theirs where their students are alike.
MOST_GRAPHS = 64

_said: set[str] = set()


def choose_precision(wanted: str, device: torch.device) -> str:
    """fp32, bf16 or fp16; `auto` is bf16 on CUDA devices that have it, else fp32."""
    if wanted != "auto":
        return wanted
    return "bf16" if _has_bfloat16(device) else "fp32"


def _has_bfloat16(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def half_type(wanted: str, device: torch.device) -> torch.dtype | None:
    """The half-precision type of forward passes; None for float32."""
    return HALF.get(choose_precision(wanted, device))


def autocast(device: torch.device, half: torch.dtype | None) -> AbstractContextManager[Any]:
    """Forward passes run in here."""
    return nullcontext() if half is None else torch.autocast(device.type, half)


def make_scaler(device: torch.device, half: torch.dtype | None) -> torch.amp.GradScaler | None:
    """float16 gradients below 6e-8 are zero, so the loss is scaled up and the gradients down again; one scaler an arm."""
    return torch.amp.GradScaler(device.type) if half == torch.float16 else None


def compiler(wanted: str, device: torch.device) -> Callable[[Wrap], Wrap]:
    """What a forward pass is wrapped in: torch.compile where `wanted` asks for it (auto: on CUDA), else nothing."""
    if wanted == "on" or (wanted == "auto" and device.type == "cuda"):
        return Compiled  # type: ignore[return-value]
    return lambda function: function


class Compiled:
    """A compiled function that goes on without compiling where that fails, and says so once a process.

    One graph for each shape of its arguments and each structure of its model; models of one structure share it.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        from torch import _dynamo as dynamo

        dynamo.config.recompile_limit = max(dynamo.config.recompile_limit, MOST_GRAPHS)
        self.eager = function
        # fullgraph: a break would be an error here instead of a slow step that nobody notices
        self._compiled: Callable[..., Any] | None = torch.compile(
            function, backend=BACKEND, dynamic=False, fullgraph=True
        )

    def __call__(self, *arguments: Any) -> Any:
        if self._compiled is None:
            return self.eager(*arguments)
        try:
            with _backward_compiled_too():
                return self._compiled(*arguments)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = error
            self._compiled = None
        _warn_once(
            f"torch.compile does not work here ({_first_line(reason)}); training goes on without it, more slowly "
            "(runtime.compile=off leaves it out from the start)."
        )
        # an error that is not the compiler's shows again here
        return self.eager(*arguments)


def _backward_compiled_too() -> AbstractContextManager[Any]:
    """Compile the backward pass with the forward pass, so that an error of it is found where it can be caught."""
    from torch._functorch import config

    if not hasattr(config, "force_non_lazy_backward_lowering"):
        return nullcontext()
    return config.patch(force_non_lazy_backward_lowering=True)


def _first_line(error: BaseException) -> str:
    # what a backend raised lies inside of what torch makes of it
    error = getattr(error, "inner_exception", None) or error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _warn_once(sentence: str) -> None:
    if sentence not in _said:
        _said.add(sentence)
        log.warning("%s", sentence)
