"""The recipe: length, batch, optimizer and learning-rate schedule of an arm."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field


@dataclass
class RecipeConfig:
    """AdamW with linear warmup and cosine decay, as DeiT trains (arXiv:2012.12877, table 9)."""

    name: str = "digits"
    # "20 epochs", "360 steps" or "10%" (of all steps, for lengths within training).
    duration: str = "20 epochs"
    batch_size: int = field(default=64, metadata={"min": 2})
    lr: float = field(default=1e-3, metadata={"min": 0.0})
    min_lr: float = field(default=1e-5, metadata={"min": 0.0})
    lr_warmup: str = "10%"
    weight_decay: float = field(default=0.05, metadata={"min": 0.0})
    clip_grad: float = field(default=1.0, metadata={"min": 0.0})
    # A step's batch goes through in this many equal parts, whose gradients are averaged: memory falls, but what spans the
    # batch (correlations of rsd, quantiles of rel, statistics of selectors and weightings) then spans a part.
    accumulation: int = field(default=1, metadata={"min": 1})
    # Decay of the moving average of the student's weights that is evaluated and exported; 0: none, the last weights are.
    ema_decay: float = field(default=0.0, metadata={"min": 0.0, "max": 0.999999})
    # Validation accuracy is computed every so many epochs, and after the last.
    validate_every: int = field(default=5, metadata={"min": 1})


def parse_duration(text: str, steps_per_epoch: int, total_steps: int | None = None) -> int:
    """Steps of "20 epochs", "360 steps" or "10%"; `ValueError` with the accepted forms otherwise."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%|steps?|epochs?|ep)\s*", str(text))
    if not match:
        raise ValueError(f'"{text}" is not a length; write "20 epochs", "360 steps" or "10%"')
    amount, unit = float(match[1]), match[2]
    if unit == "%":
        if total_steps is None:
            raise ValueError(f'"{text}" needs a whole to be a part of; write "20 epochs" or "360 steps"')
        return round(amount / 100 * total_steps)
    if unit.startswith("step"):
        return round(amount)
    return round(amount * steps_per_epoch)


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float, least: float) -> float:
    """Linear from peak/warmup to peak, then a cosine to `least` at the last step."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
