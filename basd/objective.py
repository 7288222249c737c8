"""The objective: cross-entropy plus the structural losses of one arm, put together from its configuration.

Total = ce_weight·CE + Σ sg(w_k)·ramp_k·L_k + λ_e·R. A loss that is off or has ramp 0 is not computed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basd.components.losses import TOKEN_LOSSES, LossesConfig, enabled_losses
from basd.components.losses.attn import UNIFORM, layer_information
from basd.components.losses.rel import PAIRS_STREAM
from basd.components.losses.rsd import correlation_floor
from basd.components.selectors.adaptive_spectral import normalized_entropy
from basd.components.sizes import Sizes
from basd.components.target_mixing import mix_attention, mix_tokens
from basd.components.token_aligners.diagnostics import aligner_diagnostics
from basd.models.resampling import resample_attention
from basd.models.student import StudentOutput
from basd.models.teacher import TeacherOutput

if TYPE_CHECKING:
    from basd.data.mixing import Mix


@dataclass
class ObjectiveConfig:
    # Weight of the cross-entropy with the labels.
    ce_weight: float = field(default=1.0, metadata={"min": 0.0})
    label_smoothing: float = field(default=0.0, metadata={"min": 0.0, "max": 0.999})


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
    """total: scalar to minimise. parts: named scalars (tensors without gradient or floats) for the log."""

    total: Tensor
    parts: dict[str, Tensor | float] = field(default_factory=dict)


class Objective(nn.Module):
    """Owns every distillation parameter of an arm; none of them is in the student.

    `build` runs each component's construction in `isolate(name)`, so that its initial weights depend on its name only.
    """

    def __init__(self, parts: Parts, sizes: Sizes, isolate: Callable[[str], Any]) -> None:
        super().__init__()
        self.sizes = sizes
        self.config = parts.objective
        self.mixing_targets = parts.mixing_targets
        self.warmup = parts.warmup
        self.enabled = enabled_losses(parts.losses)
        self.rsd_config = parts.losses.rsd
        self._shares: Tensor | None = None
        token_losses = [name for name in self.enabled if name in TOKEN_LOSSES]
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
        if not self.enabled:
            return
        with isolate("selector"):
            self.selector = parts.selector.build(sizes)
        if token_losses:
            # with attn alone α gets no gradient from a loss, so the entropy term would only drift it: it stops
            self.entropy = getattr(parts.selector, "entropy", "none")
            self.entropy_weight = getattr(parts.selector, "entropy_weight", 0.0)
            with isolate("token_aligner"):
                self.token_aligner = parts.token_aligner.build(sizes)
        if "attn" in self.enabled:
            with isolate("head_aligner"):
                self.head_aligner = parts.head_aligner.build(sizes)
        if {"rel", "spectral"} & set(self.enabled) and sizes.student_width != sizes.teacher_width:
            with isolate("projections"):
                self.projections = nn.ModuleList(
                    nn.Linear(sizes.student_width, sizes.teacher_width) for _ in sizes.points
                )
        with isolate("weighting"):
            self.weighting = parts.weighting.build(self.enabled)

    @property
    def uses_teacher(self) -> bool:
        return bool(self.enabled)

    @property
    def uses_attention(self) -> bool:
        return "attn" in self.enabled

    def forward(
        self,
        student: StudentOutput,
        teacher: TeacherOutput | None,
        targets: Tensor,
        mix: Mix | None,
        step: int,
        generator: Callable[[str], torch.Generator],
        diagnose: bool = False,
    ) -> ObjectiveOutput:
        """targets (B, C) soft labels, already mixed; mix: how the student's images were mixed; step from 0.

        `generator(purpose)` gives the random stream of this step. With `diagnose` the aligner's diagnostics join the
        parts. All arithmetic is float32, whatever autocast is in force outside.
        """
        with torch.autocast(targets.device.type, enabled=False):
            ce = F.cross_entropy(student.logits.float(), targets)
            total = self.config.ce_weight * ce
            parts: dict[str, Tensor | float] = {"train/ce": ce.detach()}
            ramps = {name: self.warmup.ramp(name, step, self.sizes.total_steps) for name in self.enabled}
            active = [name for name in self.enabled if ramps[name] > 0]
            parts.update({f"ramp/{name}": ramps[name] for name in self.enabled})
            if active:
                assert teacher is not None and self.weighting is not None
                losses, alpha = self._losses(active, student, teacher, mix, generator, parts, diagnose)
                self._shares = alpha.detach()
                weights = self.weighting(losses, ramps) if losses else {}
                for name in losses:
                    total = total + weights[name] * ramps[name] * losses[name]
                    parts[f"loss/{name}"] = losses[name].detach()
                    parts[f"weight/{name}"] = weights[name]
                total = total + self._entropy_term(alpha, any(name in TOKEN_LOSSES for name in losses), parts)
            parts["train/loss"] = total.detach()
        return ObjectiveOutput(total, parts)

    def _losses(
        self,
        active: list[str],
        student: StudentOutput,
        teacher: TeacherOutput,
        mix: Mix | None,
        generator: Callable[[str], torch.Generator],
        parts: dict[str, Tensor | float],
        diagnose: bool,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Values of the active losses, un-ramped, and α. A loss that has nothing to say this step is left out."""
        assert self.selector is not None and student.tokens is not None
        follow = mix is not None and self.mixing_targets == "follow"
        share = self._own_share(mix, student.tokens) if mix is not None and follow else None
        tokens = student.tokens.float()
        alpha = self.selector(tokens, teacher)
        losses: dict[str, Tensor] = {}
        if any(name in TOKEN_LOSSES for name in active):
            assert self.token_aligner is not None
            layers = teacher.normalized_tokens()
            mixture = (alpha @ layers.flatten(1)).unflatten(1, layers.shape[1:])
            # without the outer norm a uniform mixture shrinks the target and the selector goes uniform for free
            mixture = F.layer_norm(mixture, mixture.shape[-1:])
            target = self.token_aligner(mixture)
            if diagnose:
                self._diagnose(mixture, parts)
            if share is not None:
                target = mix_tokens(target, share)
            projected = tokens
            if self.projections is not None and {"rel", "spectral"} & set(active):
                projected = torch.stack([project(t) for project, t in zip(self.projections, tokens, strict=True)])
            for name in active:
                if name == "rsd":
                    losses[name] = self.losses[name](tokens, target)
                    if diagnose:
                        rsd = self.rsd_config
                        parts["rsd/floor"] = correlation_floor(target.detach(), rsd.center, rsd.kappa)
                elif name == "rel":
                    losses[name] = self.losses[name](projected, target, generator(PAIRS_STREAM))
                elif name == "spectral":
                    losses[name] = self.losses[name](projected, target)
        if "attn" in active:
            assert self.head_aligner is not None and student.scores is not None
            maps = teacher.attention(self.sizes.student_grid).float()
            attention = (alpha.detach() @ maps.flatten(1)).unflatten(1, maps.shape[1:])
            if share is not None and mix is not None:
                attention = mix_attention(attention, share, mix.lam, masked=mix.box is not None)
            # at most this much is in a mixture of the layers' maps
            informative = alpha.detach() @ teacher.shared("information", lambda: self._information(maps)) > UNIFORM
            parts["loss/attn_skipped_points"] = float((~informative).sum())
            if informative.any():
                losses["attn"] = self.losses["attn"](self.head_aligner(student.scores.float()), attention, informative)
        return {name: losses[name] for name in active if name in losses}, alpha

    def _information(self, maps: Tensor) -> Tensor:
        tokens = self.sizes.teacher_tokens + 1
        uniform = torch.full((tokens, tokens), 1 / tokens, device=maps.device)
        return layer_information(maps, resample_attention(uniform, self.sizes.student_grid, self.sizes.teacher_grid))

    def _own_share(self, mix: Mix, tokens: Tensor) -> Tensor:
        """Share of each student patch that shows the own image, (N,)."""
        height, width = self.sizes.student_grid
        size = self.sizes.image_size
        return 1 - mix.coverage(height, width, size, size, tokens.device)

    def _entropy_term(self, alpha: Tensor, trained: bool, parts: dict[str, Tensor | float]) -> Tensor | float:
        entropy = normalized_entropy(alpha)
        parts["selector/entropy"] = entropy.detach().mean()
        for point, value in zip(self.sizes.points, entropy.detach(), strict=True):
            parts[f"selector/entropy/{point}"] = value
        if self.entropy == "none" or not trained:
            return 0.0
        regularizer = entropy if self.entropy == "sparsify" else 1 - entropy
        return self.entropy_weight * regularizer.mean()

    @torch.no_grad()
    def _diagnose(self, mixture: Tensor, parts: dict[str, Tensor | float]) -> None:
        aligner: Any = self.token_aligner
        weights = aligner.weights(mixture)
        for what, values in aligner_diagnostics(weights, mixture, self.sizes).items():
            for point, value in zip(self.sizes.points, values, strict=True):
                parts[f"aligner/{what}/{point}"] = value

    def begins(self, step: int) -> bool:
        """Whether a loss counts for the first time at this step (from 0)."""

        def ramp(name: str, at: int) -> float:
            return self.warmup.ramp(name, at, self.sizes.total_steps) if at >= 0 else 0.0

        return any(ramp(name, step) > 0 and ramp(name, step - 1) == 0 for name in self.enabled)

    def layer_shares(self) -> Tensor | None:
        """α of the last step, (M, L), or None before the first one."""
        return self._shares

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
