"""A sum over images whose parts are computed, differentiated and freed one after the other.

Autograd keeps every intermediate result until the backward pass: for attention maps that is many times what a CPU's cache
holds, and the larger part of what a step keeps. Here each part's backward runs right after its forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class _SumInParts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[[Tensor, slice], Tensor],
        parts: Sequence[tuple[int, int]],
        x: Tensor,
        *weights: Tensor,
    ) -> Tensor:
        wanted = [tensor for tensor in (x, *weights) if tensor.requires_grad]
        # float16 would lose what is formed here before the loss scale is on it; bfloat16 has float32's range
        narrow = x.dtype == torch.float16
        kinds = {id(tensor): torch.float32 if tensor.dtype == torch.float16 else tensor.dtype for tensor in wanted}
        gradients = {id(tensor): torch.zeros_like(tensor, dtype=kinds[id(tensor)]) for tensor in wanted}
        total = torch.zeros((), device=x.device)
        for start, end in parts:
            part = slice(start, end)
            with torch.enable_grad():
                own = x[:, part].detach()
                leaf = (own.float() if narrow else own).requires_grad_(x.requires_grad)
                value = function(leaf, part)
            total += value.detach()
            leaves = [leaf if tensor is x else tensor for tensor in wanted]
            if not leaves:
                continue
            found = torch.autograd.grad(value, leaves, allow_unused=True)
            for tensor, gradient in zip(wanted, found, strict=True):
                if gradient is not None:
                    held = gradients[id(tensor)]
                    (held[:, part] if tensor is x else held).add_(gradient)
        ctx.save_for_backward(*(gradients.get(id(tensor)) for tensor in (x, *weights)))
        ctx.dtypes = [tensor.dtype for tensor in (x, *weights)]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        held = (None if kept is None else (kept * gradient.to(kept.dtype)).to(dtype) for kept, dtype in pairs)
        return (None, None, *held)


def sum_in_parts(
    function: Callable[[Tensor, slice], Tensor],
    parts: Sequence[tuple[int, int]],
    x: Tensor,
    weights: Iterable[Tensor] = (),
) -> Tensor:
    """Σ over `parts` (start, end) of `function(x[:, start:end], slice(start, end))`, a scalar; differentiable once.

    x (M, B, …), parts cover 0…B once. `weights` are the parameters that `function` reads besides. The gradient of x, and one
    part's graph, are all that is kept.
    """
    result: Tensor = _SumInParts.apply(function, parts, x, *weights)
    return result
