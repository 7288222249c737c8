"""What the losses of one arm read at one step: student and teacher brought together, each part computed when it is read.

Order on the teacher's side (rule 4): clean tokens → layer mixture → token aligner → target mixing on the student's grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basd.components.sizes import Sizes
from basd.components.target_mixing import mix_attention, mix_tokens
from basd.models.student import StudentOutput
from basd.models.teacher import TeacherOutput

if TYPE_CHECKING:
    from basd.data.mixing import Mix

# What a loss can read; its configuration says it (`reads`), and what no enabled loss reads is neither built nor computed.
TOKENS = "tokens"  # the layer mixture of the teacher's patch tokens, aligned with the student's
CLS = "cls"  # the layer mixture of the teacher's class tokens
PROJECTION = "projection"  # student tokens in the teacher's width
MAPS = "maps"  # attention maps
FEATURES = "features"  # pre-logits features of both models
LOGITS = "logits"  # the teacher's logits
TWO_VIEWS = "two_views"  # logits of both models on the clean view and on the student's view


@dataclass(frozen=True)
class TwoViews:
    """What losses on two views read beside the usual: the student on the clean view, the teacher on the student's view."""

    real_logits: Tensor
    virtual_teacher: TeacherOutput


@dataclass(frozen=True)
class Bridges:
    """The trainable parts between student and teacher; None where nothing reads them."""

    selector: nn.Module | None = None
    token_aligner: nn.Module | None = None
    head_aligner: nn.Module | None = None
    projections: nn.ModuleList | None = None


class Comparison:
    """One arm at one step. M points, B images; everything is float32.

    `notes` gathers scalars for the log; with `diagnose` the parts that are costly to describe are described too.
    `generator(purpose)` gives the random stream of this step.
    """

    def __init__(
        self,
        bridges: Bridges,
        sizes: Sizes,
        student: StudentOutput,
        teacher: TeacherOutput,
        *,
        labels: Tensor,
        mix: Mix | None = None,
        step: int = 0,
        generator: Callable[[str], torch.Generator],
        views: TwoViews | None = None,
        diagnose: bool = False,
    ) -> None:
        """labels (B, C) soft; mix: how the teacher's targets have yet to be mixed, None where they are as they should be."""
        self.bridges, self.sizes = bridges, sizes
        self.student, self.teacher, self.views = student, teacher, views
        self.labels, self.mix, self.step = labels, mix, step
        self.generator, self.diagnose = generator, diagnose
        self.notes: dict[str, Tensor | float] = {}

    @cached_property
    def student_tokens(self) -> Tensor:
        """Patch tokens at the points, (M, B, N, D_s)."""
        assert self.student.tokens is not None
        return self.student.tokens.float()

    @cached_property
    def student_cls(self) -> Tensor:
        """Class tokens at the points, (M, B, D_s)."""
        assert self.student.cls is not None
        return self.student.cls.float()

    @cached_property
    def alpha(self) -> Tensor:
        """Shares of the teacher's layers at each point, (M, L)."""
        assert self.bridges.selector is not None
        return self.bridges.selector(self.student_tokens, self.teacher)

    @cached_property
    def mixture(self) -> Tensor:
        """LN0 of the layer mixture of the teacher's patch tokens, on its own grid, not yet mixed, (M, B, N_t, D_t)."""
        return self._mixture_of(self.teacher.normalized_tokens())

    def _mixture_of(self, layers: Tensor) -> Tensor:
        mixed = (self.alpha @ layers.flatten(1)).unflatten(1, layers.shape[1:])
        # without the outer norm a uniform mixture shrinks the target and the selector goes uniform for free
        return F.layer_norm(mixed, mixed.shape[-1:])

    @cached_property
    def target(self) -> Tensor:
        """The teacher's patch tokens for each student position, (M, B, N, D_t)."""
        assert self.bridges.token_aligner is not None
        aligned = self.bridges.token_aligner(self.mixture)
        return aligned if self._share is None else mix_tokens(aligned, self._share)

    @cached_property
    def target_cls(self) -> Tensor:
        """LN0 of the layer mixture of the teacher's class tokens, (M, B, D_t)."""
        cls = self.teacher.shared(
            "normalized_cls", lambda: F.layer_norm(self.teacher.cls.float(), (self.teacher.cls.shape[-1],))
        )
        return self._convex(self._mixture_of(cls), axis=1)

    @cached_property
    def projected(self) -> Tensor:
        """Student patch tokens in the teacher's width, (M, B, N, D_t)."""
        return self._project(self.student_tokens)

    @cached_property
    def projected_cls(self) -> Tensor:
        """Student class tokens in the teacher's width, (M, B, D_t)."""
        return self._project(self.student_cls)

    def _project(self, tokens: Tensor) -> Tensor:
        projections = self.bridges.projections
        if projections is None:
            return tokens
        return torch.stack([project(t) for project, t in zip(projections, tokens, strict=True)])

    @cached_property
    def layer_maps(self) -> Tensor:
        """The teacher's attention of every layer on the student's grid, (L, B, H_t, 1+N, 1+N); rows sum to 1."""
        return self.teacher.attention(self.sizes.student_grid).float()

    @cached_property
    def aligned_maps(self) -> tuple[Tensor, Tensor]:
        """What the head aligner makes of both sides: student log-probabilities and teacher probabilities, of one shape."""
        aligner: Any = self.bridges.head_aligner
        assert aligner is not None and self.student.scores is not None
        maps = self.layer_maps
        if not aligner.all_layers:
            maps = (self.alpha.detach() @ maps.flatten(1)).unflatten(1, maps.shape[1:])
        if self._share is not None and self.mix is not None:
            maps = mix_attention(maps, self._share, self.mix.lam, masked=self.mix.box is not None)
        return aligner(self.student.scores.float(), maps)

    @cached_property
    def student_features(self) -> Tensor:
        """Pre-logits features, (B, D_s)."""
        assert self.student.features is not None
        return self.student.features.float()

    @cached_property
    def teacher_features(self) -> Tensor:
        """The teacher's pre-logits features, mixed like the labels, (B, D_t)."""
        return self._convex(self.teacher.features.float())

    @cached_property
    def student_logits(self) -> Tensor:
        """The student on its own view, (B, C)."""
        return self.student.logits.float()

    @cached_property
    def teacher_logits(self) -> Tensor:
        """The teacher on the clean view, mixed like the labels, (B, C)."""
        return self._convex(self.teacher.logits.float())

    @cached_property
    def real_student_logits(self) -> Tensor:
        """The student on the clean view, mixed like its own, (B, C)."""
        assert self.views is not None
        return self.views.real_logits.float()

    @cached_property
    def virtual_teacher_logits(self) -> Tensor:
        """The teacher on the student's view, (B, C)."""
        assert self.views is not None
        return self.views.virtual_teacher.logits.float()

    def teacher_probabilities(self, temperature: float = 1.0) -> Tensor:
        """softmax(logits/T) of the teacher, mixed like the labels, (B, C)."""
        return self._convex((self.teacher.logits.float() / temperature).softmax(dim=-1))

    def teacher_decisions(self) -> Tensor:
        """One-hot of the teacher's most likely class, mixed like the labels, (B, C)."""
        logits = self.teacher.logits
        return self._convex(F.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float())

    def _convex(self, x: Tensor, axis: int = 0) -> Tensor:
        return x if self.mix is None else self.mix.lam * x + (1 - self.mix.lam) * x.flip(axis)

    @cached_property
    def _share(self) -> Tensor | None:
        """Share of each student patch that shows the own image, (N,); None where targets are not to be mixed."""
        if self.mix is None:
            return None
        height, width = self.sizes.student_grid
        size = self.sizes.image_size
        return 1 - self.mix.coverage(height, width, size, size, self.student.logits.device)

    def note(self, values: Mapping[str, Tensor | float]) -> None:
        self.notes.update(values)

    def has(self, part: str) -> bool:
        """Whether a part was read in this step."""
        return part in self.__dict__
