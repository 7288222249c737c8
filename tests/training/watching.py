"""What a real training run does, seen through torch's own hooks; what a hook raises ends the step that it watches."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

# widths of the tiny arms' models
TEACHER, STUDENT = 16, 12


@contextmanager
def forwards(seen: Callable[[int, int], None]) -> Iterator[None]:
    """`seen(width, images)` before each forward pass of a vision transformer."""

    def hook(module: torch.nn.Module, inputs: tuple) -> None:
        if isinstance(module, PatchEmbed):
            seen(module.proj.out_channels, len(inputs[0]))

    with register_module_forward_pre_hook(hook):
        yield


@contextmanager
def student_steps(seen: Callable[[VisionTransformer, int, int], None]) -> Iterator[None]:
    """`seen(student, arm, step)` before each forward pass in training; both are counted from 0.

    The students of a cohort come in the order of its arms, once a step where a step is one part.
    """
    # arm and step, without keeping a student alive
    known: weakref.WeakKeyDictionary[VisionTransformer, list[int]] = weakref.WeakKeyDictionary()
    count = itertools.count()

    def hook(module: torch.nn.Module, _inputs: tuple) -> None:
        if isinstance(module, VisionTransformer) and module.training:
            if module not in known:
                known[module] = [next(count), -1]
            known[module][1] += 1
            seen(module, *known[module])

    with register_module_forward_pre_hook(hook):
        yield


@contextmanager
def gradients(seen: Callable[[list[torch.Tensor]], None]) -> Iterator[None]:
    """`seen(gradients)` before each step of an optimizer."""

    def hook(optimizer: torch.optim.Optimizer, *_: object) -> None:
        seen([p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None])

    with register_optimizer_step_pre_hook(hook):
        yield


@contextmanager
def trained_weights() -> Iterator[list[dict[str, torch.Tensor]]]:
    """A copy of the one trained student's weights after each step of its optimizer."""
    kept: list[dict[str, torch.Tensor]] = []
    running: list[VisionTransformer] = []

    def updated(*_: object) -> None:
        kept.append({name: value.detach().clone() for name, value in running[-1].state_dict().items()})

    seen = student_steps(lambda student, _arm, _step: running.append(student))
    with register_optimizer_step_post_hook(updated), seen:
        yield kept
