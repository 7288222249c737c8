"""Settings that the learned selectors share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar


@dataclass
class LearnedSelectorConfig:
    """Settings of a selector whose α is learned; the same defaults for all, so that rows of a table differ in one thing."""

    name: str = ""
    # α = softmax(logits/temperature).
    temperature: float = field(default=1.0, metadata={"min": 1e-6})
    # sparsify adds λ_e·H to the loss, spread adds λ_e·(1−H), H the entropy of α in [0, 1].
    entropy: str = field(default="sparsify", metadata={"choices": ("sparsify", "spread", "none")})
    entropy_weight: float = field(default=0.01, metadata={"min": 0.0})
    learned: ClassVar[bool] = True
