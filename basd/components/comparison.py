"""What the losses of one arm read at one step: student and teacher brought together, each part computed when it is read.

Order on the teacher's side: clean tokens → layer mixture → token aligner → target mixing on the student's grid. A token loss
then compares the same place of the image on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

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


# Bytes of attention maps that are worked on at once.
CACHED_BYTES, DEVICE_BYTES = 2**21, 2**28


def image_parts(maps: Tensor, pairs: bool = False) -> list[tuple[int, int]]:
    """Ranges of images that are worked on at once, of maps (M, B, …): what fits a CPU's cache, or a share of a device.

    With `pairs` the ranges cover the first half of the batch (the middle one included), for an image and its partner.
    """
    batch = maps.shape[1]
    whole = maps.numel() // batch * 4 * (2 if pairs else 1)
    step = max(1, (CACHED_BYTES if maps.device.type == "cpu" else DEVICE_BYTES) // max(1, whole))
    last = (batch + 1) // 2 if pairs else batch
    return [(start, min(last, start + step)) for start in range(0, last, step)]


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
        normalize: bool = True,
    ) -> None:
        """labels (B, C) soft; mix: how the teacher's targets have yet to be mixed, None where they are as they should be.

        Without `normalize` mixtures are of the teacher's tokens as they are.
        """
        self.bridges, self.sizes = bridges, sizes
        self.student, self.teacher, self.views = student, teacher, views
        self.labels, self.mix, self.step = labels, mix, step
        self.generator, self.diagnose = generator, diagnose
        self.normalize = normalize
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
        return self._mixture_of(self.teacher.normalized_tokens() if self.normalize else self.teacher.tokens.float())

    def _mixture_of(self, layers: Tensor) -> Tensor:
        mixed = (self.alpha @ layers.flatten(1)).unflatten(1, layers.shape[1:])
        # without the outer norm a uniform mixture shrinks the target and the selector goes uniform for free
        return F.layer_norm(mixed, mixed.shape[-1:]) if self.normalize else mixed

    @cached_property
    def target(self) -> Tensor:
        """The teacher's patch tokens for each student position, (M, B, N, D_t)."""
        assert self.bridges.token_aligner is not None
        aligned = self.bridges.token_aligner(self.mixture)
        return aligned if self._share is None else mix_tokens(aligned, self._share)

    @cached_property
    def target_cls(self) -> Tensor:
        """LN0 of the layer mixture of the teacher's class tokens, (M, B, D_t)."""
        cls = self.teacher.cls.float()
        if self.normalize:
            cls = self.teacher.shared("normalized_cls", lambda: F.layer_norm(cls, cls.shape[-1:]))
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
        """The teacher's attention of every layer on the student's grid, (L, B, H_t, 1+N, 1+N); rows sum to 1.

        In the teacher's precision.
        """
        return self.teacher.attention(self.sizes.student_grid)

    @cached_property
    def target_maps(self) -> Tensor:
        """The teacher's maps as the head aligner compares them, mixed like the student's image, float32; no gradient.

        (M, B, H_t, 1+N, 1+N), the layer mixture of each point; with an aligner that compares all layers (L, …).
        """
        assert self.bridges.head_aligner is not None
        layers = self.layer_maps
        shares = None if self.bridges.head_aligner.all_layers else self.alpha.detach()
        batch = layers.shape[1]
        if shares is None and self._share is None:
            return self._mixed_layers(layers, None)
        maps = layers.new_empty(len(layers if shares is None else shares), *layers.shape[1:], dtype=torch.float32)
        with torch.no_grad():
            # an image and its partner in one part: what is mixed stays in the cache of a CPU
            for start, end in image_parts(maps, pairs=True):
                own, mirrored = slice(start, end), slice(max(end, batch - end), batch - start)
                part = torch.cat([self._mixed_layers(layers[:, side], shares) for side in (own, mirrored)], dim=1)
                if self._share is not None and self.mix is not None:
                    part = mix_attention(part, self._share, self.mix.lam, masked=self.mix.box is not None)
                maps[:, own], maps[:, mirrored] = part[:, : end - start], part[:, end - start :]
        return maps

    @staticmethod
    def _mixed_layers(layers: Tensor, shares: Tensor | None) -> Tensor:
        """Σ_l α_{m,l} A_l, float32, of some images. layers (L, B, …), shares α (M, L) or None for the layers themselves."""
        if layers.dtype != torch.float32:
            # in half precision the rows no longer sum to 1, and what diffuse maps say is less than that error
            layers = layers.float()
            layers = layers / layers.sum(dim=-1, keepdim=True)
        return layers if shares is None else (shares @ layers.flatten(1)).unflatten(1, layers.shape[1:])

    @property
    def scores(self) -> Tensor:
        """The student's pre-softmax attention at the points, (M, B, H_s, 1+N, 1+N)."""
        assert self.student.scores is not None
        return self.student.scores

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
