"""Small students, teachers and objectives for the tests of the objective."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from basd.components.head_aligners import HEAD_ALIGNERS
from basd.components.losses import LossesConfig
from basd.components.selectors import SELECTORS
from basd.components.sizes import Sizes
from basd.components.token_aligners import TOKEN_ALIGNERS
from basd.components.warmup import NoWarmupConfig
from basd.components.weighting import WEIGHTINGS
from basd.data.mixing import Mix
from basd.models.student import TappedStudent
from basd.models.teacher import Teacher
from basd.objective import Objective, ObjectiveConfig, ObjectiveOutput, Parts

POINTS, CLASSES, BATCH = (1, 3), 5, 4
# the losses of the complete method, and those of them that compare tokens
LOSSES, TOKEN_LOSSES = ("rsd", "rel", "attn", "spectral"), ("rsd", "rel", "spectral")
CUTMIX = Mix("cutmix", 1 - 16 * 12 / 24**2, (8, 24, 6, 18))  # on the edges of patches
MIXUP = Mix("mixup", 0.3)
MIXES = {"none": None, "mixup": MIXUP, "cutmix": CUTMIX}


def perturb(model: nn.Module, amount: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn_like(parameter))


def build_student() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=24, patch_size=(8, 6), num_classes=CLASSES, embed_dim=12, depth=4, num_heads=2, mlp_ratio=2.0
    )
    perturb(model, 0.1)
    return model


def build_teacher(heads: int = 4, width: int = 16) -> Teacher:
    torch.manual_seed(1)
    model = VisionTransformer(
        img_size=(20, 12), patch_size=4, num_classes=0, embed_dim=width, depth=3, num_heads=heads, reg_tokens=2
    )
    perturb(model, 0.2)
    return Teacher(model)


def sizes(heads: int = 4, width: int = 16, total_steps: int = 100) -> Sizes:
    return Sizes(
        points=POINTS,
        image_size=24,
        student_depth=4,
        student_width=12,
        student_heads=2,
        student_grid=(3, 4),
        teacher_depth=3,
        teacher_width=width,
        teacher_heads=heads,
        teacher_grid=(5, 3),
        total_steps=total_steps,
    )


@contextlib.contextmanager
def isolate(name: str) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, name)))
        yield


def generator(purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(len(purpose))


def make(enabled: tuple[str, ...] = LOSSES, s: Sizes | None = None, **choices: Any) -> Objective:
    """An objective with these losses on; without a warmup unless one is named."""
    losses = LossesConfig()
    for name in enabled:
        getattr(losses, name).enabled = True
    for key in [k for k in choices if hasattr(losses, k)]:
        for field, value in choices.pop(key).items():
            setattr(getattr(losses, key), field, value)
    parts = Parts(
        losses=losses,
        selector=choices.pop("selector", SELECTORS["adaptive_spectral"]()),
        token_aligner=choices.pop("token_aligner", TOKEN_ALIGNERS["cross_attention"]()),
        head_aligner=choices.pop("head_aligner", HEAD_ALIGNERS["conv"]()),
        weighting=choices.pop("weighting", WEIGHTINGS["uwso"]()),
        warmup=choices.pop("warmup", NoWarmupConfig()),
        objective=choices.pop("objective", ObjectiveConfig()),
        mixing_targets=choices.pop("mixing_targets", "follow"),
    )
    assert not choices
    return Objective(parts, s or sizes(), isolate)


def data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student images, teacher images, soft labels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (BATCH,), generator=g)
    return (
        torch.randn(BATCH, 3, 24, 24, generator=g),
        torch.randn(BATCH, 3, 20, 12, generator=g),
        F.one_hot(labels, CLASSES).float(),
    )


def run(
    objective: Objective,
    teacher: Teacher | None,
    *,
    student: VisionTransformer | None = None,
    mix: Mix | None = None,
    step: int = 0,
    seed: int = 0,
    diagnose: bool = False,
) -> ObjectiveOutput:
    images, clean, labels = data(seed)
    student = build_student() if student is None else student
    points = POINTS if objective.demands.teacher else ()
    out = TappedStudent(student, points, objective.demands.maps)(images)
    seen = teacher(clean) if teacher is not None else None
    if mix is not None:
        labels = mix.convex(labels)
    return objective(out, seen, labels, mix, step, generator, diagnose=diagnose)


def number(value: Tensor | float) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else value


def numbers(output: ObjectiveOutput) -> dict[str, float]:
    return {name: number(value) for name, value in output.parts.items()}


class Calls:
    """Counts the forward passes of a module and keeps what went in and out of the last."""

    def __init__(self, module: nn.Module | None) -> None:
        self.count = 0
        self.inputs: tuple[Any, ...] = ()
        self.output: Any = None
        assert module is not None
        module.register_forward_hook(self._hook)

    def _hook(self, _module: nn.Module, inputs: tuple, output: Any) -> None:
        self.count, self.inputs, self.output = self.count + 1, inputs, output


def gradients(objective: Objective) -> dict[str, bool]:
    """Whether each parameter has a gradient that is not zero."""
    return {
        name: parameter.grad is not None and bool((parameter.grad != 0).any())
        for name, parameter in objective.named_parameters()
    }
