"""The objective: cross-entropy plus the distillation losses of one arm, put together from its configuration.

Total = ce_weight·CE + Σ sg(w_k)·ramp_k·L_k + λ_e·R. A loss that is off or has ramp 0 is not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basd.components.comparison import (
    CLS,
    FEATURES,
    LOGITS,
    MAPS,
    PROJECTION,
    TOKENS,
    TWO_VIEWS,
    Bridges,
    Comparison,
    TwoViews,
)
from basd.components.losses import LossesConfig, enabled_losses
from basd.components.selectors.adaptive_spectral import normalized_entropy
from basd.components.sizes import Sizes
from basd.components.token_aligners.diagnostics import aligner_diagnostics
from basd.distributed import average
from basd.models.student import StudentOutput
from basd.models.teacher import TeacherOutput

if TYPE_CHECKING:
    from basd.data.mixing import Mix


@dataclass
class ObjectiveConfig:
    # Weight of the cross-entropy with the labels.
    ce_weight: float = field(default=1.0, metadata={"min": 0.0})
    label_smoothing: float = field(default=0.0, metadata={"min": 0.0, "max": 0.999})
    # Teacher tokens before and after the layer mixture: LayerNorm without affine, or, as papers that match hidden states by
    # MSE publish it, as they are.
    target_norm: str = field(default="layer_norm", metadata={"choices": ("layer_norm", "none")})


@dataclass(frozen=True)
class Demands:
    """What the enabled losses read: the rest of a configuration has no effect, and is neither built nor computed."""

    enabled: tuple[str, ...]
    reads: frozenset[str]
    # whether the head aligner compares every teacher layer by itself, without a mixture
    all_layers: bool
    # the enabled losses that compare places of the image: tokens or maps
    of_places: frozenset[str] = frozenset()

    @property
    def teacher(self) -> bool:
        return bool(self.enabled)

    @property
    def token_aligner(self) -> bool:
        return TOKENS in self.reads

    @property
    def maps(self) -> bool:
        return MAPS in self.reads

    @property
    def trains_selector(self) -> bool:
        """Whether α gets a gradient from a loss; the attention loss reads it detached."""
        return bool({TOKENS, CLS} & self.reads)

    @property
    def selector(self) -> bool:
        return self.trains_selector or (self.maps and not self.all_layers)

    @property
    def projections(self) -> bool:
        return PROJECTION in self.reads

    @property
    def points(self) -> bool:
        """Whether blocks of the student are read."""
        return self.selector or self.maps or self.projections

    @property
    def logits(self) -> bool:
        return bool({LOGITS, TWO_VIEWS} & self.reads)

    @property
    def features(self) -> bool:
        return FEATURES in self.reads

    @property
    def two_views(self) -> bool:
        return TWO_VIEWS in self.reads


def demands(losses: LossesConfig, head_aligner: Any) -> Demands:
    enabled = enabled_losses(losses)
    own: dict[str, frozenset[str]] = {name: getattr(losses, name).reads for name in enabled}
    reads: frozenset[str] = frozenset().union(*own.values())
    of_places = frozenset(name for name, read in own.items() if read & {TOKENS, CLS, PROJECTION, MAPS})
    return Demands(enabled, reads, MAPS in reads and head_aligner.all_layers, of_places)


@dataclass
class Parts:
    """The part of a configuration that the objective is built from."""

    losses: LossesConfig
    selector: Any
    token_aligner: Any
    head_aligner: Any
    weighting: Any
    warmup: Any
    objective: ObjectiveConfig
    mixing_targets: str = "follow"


@dataclass
class ObjectiveOutput:
    """total: scalar to minimise. parts: named scalars (tensors without gradient or floats) for the log.

    With several processes each has its own total, whose gradients are to be averaged; the parts are those of all.
    """

    total: Tensor
    parts: dict[str, Tensor | float] = field(default_factory=dict)


def projection(student_width: int, teacher_width: int, mlp: bool) -> nn.Module:
    """Student tokens → teacher width: a Linear, or two with GELU between and the teacher's width inside."""
    if not mlp:
        return nn.Linear(student_width, teacher_width)
    return nn.Sequential(nn.Linear(student_width, teacher_width), nn.GELU(), nn.Linear(teacher_width, teacher_width))


class Objective(nn.Module):
    """Owns every distillation parameter of an arm; none of them is in the student.

    `isolate(name)` is the context in which a component is constructed, so that its initial weights depend on its name only.
    """

    def __init__(self, parts: Parts, sizes: Sizes, isolate: Callable[[str], Any]) -> None:
        super().__init__()
        self.sizes = sizes
        self.config = parts.objective
        self.mixing_targets = parts.mixing_targets
        self.warmup = parts.warmup
        self.demands = demands(parts.losses, parts.head_aligner)
        self.enabled = self.demands.enabled
        self._shares: Tensor | None = None
        self.losses = nn.ModuleDict()
        for name in self.enabled:
            with isolate(f"losses.{name}"):
                self.losses[name] = getattr(parts.losses, name).build(sizes)
        self.selector: nn.Module | None = None
        self.token_aligner: nn.Module | None = None
        self.head_aligner: nn.Module | None = None
        self.weighting: nn.Module | None = None
        self.projections: nn.ModuleList | None = None
        self.entropy, self.entropy_weight = "none", 0.0
        if self.demands.selector:
            with isolate("selector"):
                self.selector = parts.selector.build(sizes)
        if self.demands.trains_selector:
            # with attn alone α gets no gradient from a loss, so the entropy term would only drift it: it stops
            self.entropy = getattr(parts.selector, "entropy", "none")
            self.entropy_weight = getattr(parts.selector, "entropy_weight", 0.0)
        if self.demands.token_aligner:
            with isolate("token_aligner"):
                self.token_aligner = parts.token_aligner.build(sizes)
        if self.demands.maps:
            with isolate("head_aligner"):
                self.head_aligner = parts.head_aligner.build(sizes)
        mlp = self.demands.token_aligner and parts.token_aligner.student_mlp
        if self.demands.projections and (mlp or sizes.student_width != sizes.teacher_width):
            with isolate("projections"):
                self.projections = nn.ModuleList(
                    projection(sizes.student_width, sizes.teacher_width, mlp) for _ in sizes.points
                )
        if self.enabled:
            with isolate("weighting"):
                self.weighting = parts.weighting.build(self.enabled, sizes)

    def forward(
        self,
        student: StudentOutput,
        teacher: TeacherOutput | None,
        targets: Tensor,
        mix: Mix | None,
        step: int,
        generator: Callable[[str], torch.Generator],
        diagnose: bool = False,
        views: TwoViews | None = None,
    ) -> ObjectiveOutput:
        """targets (B, C) soft labels, already mixed; mix: how the student's images were mixed; step from 0.

        `generator(purpose)` gives the random stream of this step. With `diagnose` the aligner's diagnostics join the
        parts. All arithmetic is float32, whatever autocast is in force outside.
        """
        with torch.autocast(targets.device.type, enabled=False):
            ce = F.cross_entropy(student.logits.float(), targets)
            total = self.config.ce_weight * ce
            parts: dict[str, Tensor | float] = {}
            ramps = {name: self._ramp(name, step) for name in self.enabled}
            parts.update({f"ramp/{name}": ramps[name] for name in self.enabled})
            active = self.active(mix, step)
            if active:
                assert teacher is not None
                comparison = Comparison(
                    Bridges(self.selector, self.token_aligner, self.head_aligner, self.projections),
                    self.sizes,
                    student,
                    teacher,
                    labels=targets,
                    mix=mix if self.mixing_targets in ("follow", "skip") else None,
                    step=step,
                    generator=generator,
                    views=views,
                    diagnose=diagnose,
                    normalize=self.config.target_norm == "layer_norm",
                )
                total = total + self._distillation(comparison, active, ramps, parts)
            parts["train/ce"], parts["train/loss"] = average(ce.detach(), total.detach())
        return ObjectiveOutput(total, parts)

    def active(self, mix: Mix | None, step: int) -> list[str]:
        """The losses that are computed at this step: on, ramp above 0, and not left out on a mixed batch (`skip`)."""
        left_out = self.demands.of_places if mix is not None and self.mixing_targets == "skip" else frozenset()
        return [name for name in self.enabled if name not in left_out and self._ramp(name, step) > 0]

    def _distillation(
        self, comparison: Comparison, active: list[str], ramps: dict[str, float], parts: dict[str, Tensor | float]
    ) -> Tensor | float:
        """Σ w·ramp·L over the active losses and the entropy term. A loss that has nothing to say this step is left out."""
        weighting: Any = self.weighting
        losses_of: Any = self.losses
        values = {name: losses_of[name].compare(comparison) for name in active}
        losses: dict[str, Tensor] = {name: value for name, value in values.items() if value is not None}
        total: Tensor | float = 0.0
        if losses:
            # what weights are made of, and the log, are the losses of all processes
            means = dict(zip(losses, average(*(value.detach() for value in losses.values())), strict=True))
            weights = weighting(means, ramps, comparison.step, comparison.generator)
            for name in losses:
                total = total + weights[name] * ramps[name] * losses[name]
                parts[f"loss/{name}"] = means[name]
                parts[f"weight/{name}"] = weights[name]
            total = total + weighting.term(means, ramps)
        parts.update(comparison.notes)
        if comparison.has("alpha"):
            self._shares = comparison.alpha.detach()
            total = total + self._entropy_term(comparison, parts)
        if comparison.diagnose and comparison.has("target"):
            self._diagnose(comparison.mixture, parts)
        return total

    def _ramp(self, name: str, step: int) -> float:
        """Warmup of a loss, times the decay per epoch that a head aligner may ask for."""
        ramp = self.warmup.ramp(name, step, self.sizes.total_steps)
        decay = getattr(self.head_aligner, "decay", 1.0) if name == "attn" else 1.0
        return ramp * decay ** (step // self.sizes.steps_per_epoch)

    def _entropy_term(self, comparison: Comparison, parts: dict[str, Tensor | float]) -> Tensor | float:
        entropy = normalized_entropy(comparison.alpha)
        parts["selector/entropy"] = entropy.detach().mean()
        for point, value in zip(self.sizes.points, entropy.detach(), strict=True):
            parts[f"selector/entropy/{point}"] = value
        trained = comparison.has("mixture") or comparison.has("target_cls")
        if self.entropy == "none" or not trained:
            return 0.0
        regularizer = entropy if self.entropy == "sparsify" else 1 - entropy
        return self.entropy_weight * regularizer.mean()

    @torch.no_grad()
    def _diagnose(self, mixture: Tensor, parts: dict[str, Tensor | float]) -> None:
        aligner: Any = self.token_aligner
        weights = aligner.weights(mixture)
        for what, values in aligner_diagnostics(weights, mixture, self.sizes, aligner(mixture)).items():
            for point, value in zip(self.sizes.points, values, strict=True):
                parts[f"aligner/{what}/{point}"] = value

    def begins(self, step: int) -> bool:
        """Whether a loss counts for the first time at this step (from 0)."""

        def ramp(name: str, at: int) -> float:
            return self._ramp(name, at) if at >= 0 else 0.0

        return any(ramp(name, step) > 0 and ramp(name, step - 1) == 0 for name in self.enabled)

    def layer_shares(self) -> Tensor | None:
        """α of the last step that read it, (M, L); None before the first one."""
        return self._shares

    def set_layer_shares(self, shares: Tensor | None) -> None:
        """Go on with this α, as a checkpoint kept it; None where an epoch begins."""
        self._shares = shares

    def decayed_parameters(self) -> set[str]:
        """Names of the parameters that weight decay applies to: weights of Linear layers of losses and projections.

        Queries, key maps, head mixes, priors, norms and biases start from something meaningful and are not decayed.
        """
        modules = dict(self.named_modules())
        return {
            name
            for name, _ in self.named_parameters()
            if name.endswith(".weight")
            and isinstance(modules[name.rpartition(".")[0]], nn.Linear)
            and not name.startswith("selector.")
        }
