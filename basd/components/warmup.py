"""Warmup of the losses: ramp_k(t) is 0 before start_k, then linear to 1 over its length."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Starts:
    """Start of each loss as a share of all steps; their order is the order of the losses."""

    rsd: float = field(default=0.0, metadata={"min": 0.0, "max": 1.0})
    rel: float = field(default=0.05, metadata={"min": 0.0, "max": 1.0})
    attn: float = field(default=0.10, metadata={"min": 0.0, "max": 1.0})
    spectral: float = field(default=0.15, metadata={"min": 0.0, "max": 1.0})
    logit: float = field(default=0.0, metadata={"min": 0.0, "max": 1.0})
    feature: float = field(default=0.0, metadata={"min": 0.0, "max": 1.0})


@dataclass
class StaggeredConfig:
    """Losses come in one after the other."""

    name: str = "staggered"
    starts: Starts = field(default_factory=Starts)
    length: float = field(default=0.10, metadata={"min": 0.0, "max": 1.0})

    def ramp(self, loss: str, step: int, total_steps: int) -> float:
        return linear_ramp(step, getattr(self.starts, loss) * total_steps, self.length * total_steps)


@dataclass
class SimultaneousConfig:
    """All losses ramp up together from the start."""

    name: str = "simultaneous"
    length: float = field(default=0.10, metadata={"min": 0.0, "max": 1.0})

    def ramp(self, loss: str, step: int, total_steps: int) -> float:
        return linear_ramp(step, 0.0, self.length * total_steps)


@dataclass
class NoWarmupConfig:
    """All losses count in full from the first step."""

    name: str = "none"

    def ramp(self, loss: str, step: int, total_steps: int) -> float:
        return 1.0


WARMUPS: dict[str, type] = {"staggered": StaggeredConfig, "simultaneous": SimultaneousConfig, "none": NoWarmupConfig}


def linear_ramp(step: int, start: float, length: float) -> float:
    """Share of a loss that counts at `step` (from 0), all in steps: positive from the first step at or after `start`."""
    if step < start:
        return 0.0
    if length <= 0:
        return 1.0
    # step s trains with the value at its end, so that a loss starting at 0 counts from the first step
    return min(1.0, (step + 1 - start) / length)
