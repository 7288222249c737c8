"""`basd bench taps`: what reading a teacher's tokens and attention costs beside its plain forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from basd.benchmarks.setup import Setup
from basd.benchmarks.timing import Ratio, Report, alternate, device_name
from basd.models.taps import Taps, attention_of
from basd.models.teacher import Teacher, teacher_title
from basd.training.precision import autocast, compiler, half_type


def run(overrides: Sequence[str], repeats: int) -> Report:
    """Four ways through the teacher on one batch: plain, tapped, tapped with maps of all layers, and rebuilt naively."""
    setup = Setup(overrides)
    config, device = setup.config, setup.device
    model = setup.resources.teacher.model.to(device)
    half, wrap = half_type(config.runtime.precision, device), compiler(config.runtime.compile, device)
    teacher = Teacher(model, attention=True, half=half, wrap=wrap)
    depth = teacher.shape.depth
    count = min(len(config.points), depth)
    blocks = [round((i + 1) * depth / count) - 1 for i in range(count)]
    side = config.student.image_size // config.student.patch_size
    images = torch.randn(config.recipe.batch_size, 3, config.teacher.image_size, config.teacher.image_size).to(device)
    # in this order: the naive form switches fused attention off
    taps = Taps(model, range(depth), blocks)
    forward = wrap(model.forward_features)

    @torch.no_grad()
    def plain() -> None:
        with autocast(device, half):
            forward(images)

    @torch.no_grad()
    def tapped() -> list[Tensor]:
        with autocast(device, half), taps.record() as seen:
            model.forward_features(images)
        return [seen.attention(block) for block in blocks]

    def mapped() -> Tensor:
        return teacher(images).attention((side, side))

    @torch.no_grad()
    def naive() -> list[Tensor]:
        """Without fused attention, as a hook on the dropout behind the softmax needs it."""
        kept: list[Tensor] = []
        hooks = [attention_of(model, b).attn_drop.register_forward_hook(lambda *_: kept.append(_[2])) for b in blocks]
        modules = [attention_of(model, block) for block in range(depth)]
        before = [module.fused_attn for module in modules]
        try:
            for module in modules:
                setattr(module, "fused_attn", False)  # noqa: B010 - marked final
            with autocast(device, half):
                model.forward_features(images)
        finally:
            for module, fused in zip(modules, before, strict=True):
                setattr(module, "fused_attn", fused)  # noqa: B010
            for hook in hooks:
                hook.remove()
        return kept

    with setup.running():
        times = alternate(
            {
                "plain fused forward": plain,
                f"tokens of all blocks, attention of {count}": tapped,
                f"tokens and resampled maps of all {depth} blocks": mapped,
                f"unfused, attention of {count}": naive,
            },
            repeats,
            device,
        )
        used = device_name(device)
    first, *others = times.seconds

    def over(name: str, at: Mapping[str, float]) -> float:
        return at[name] / at[first]

    reach = ["≤ 1.20", "", ""]
    ratios = [
        Ratio(f"{name} ÷ plain", times.ratio(partial(over, name)), wanted)
        for name, wanted in zip(others, reach, strict=True)
    ]
    settings = {
        "teacher": teacher_title(config.teacher),
        "batch": config.recipe.batch_size,
        "blocks": blocks,
        "overrides": setup.overrides,
    }
    return Report("taps", used, settings, times.measures(), tuple(ratios))
