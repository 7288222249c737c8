"""Figures of trained models: attention over the image, its distance by layer, spectra, and how alike layers are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from analysis.style import COLOURS, COLUMN, GREY, PAGE
from analysis.trained import (
    Distances,
    TrainedArm,
    amplitude_spectra,
    cka,
    radial_profiles,
    rollout,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

STUDENT, TEACHER = COLOURS[0], COLOURS[1]
# Heads that a figure of one block has room for.
MOST_HEADS = 6


def attention_maps(arm: TrainedArm, image: int = 0, block: int = -1) -> Figure:
    """What the class token attends to in one image: each head of a block, their mean, and the rollout over all blocks.

    A row for the student and one for the teacher; the block counts from each one's own end where it is negative.
    """
    from matplotlib import pyplot

    rows = [("student", arm.student_layers), ("teacher", arm.teacher_layers)]
    heads = min(MOST_HEADS, max(layers.attention[block].shape[1] for _, layers in rows))
    columns = heads + 3
    figure, axes = pyplot.subplots(2, columns, figsize=(PAGE, 2 * PAGE / columns + 0.35), layout="constrained")
    picture = arm.images[image].permute(1, 2, 0).clamp(0, 1).numpy()
    for row, (who, layers) in zip(axes, rows, strict=True):
        attention = layers.attention[block][image, :, 0, layers.prefix :].unflatten(-1, layers.grid)
        for axis in row:
            axis.set_axis_off()
        row[0].imshow(picture)
        row[0].set_title(f"{who}, block {_counted(block, layers.depth)}", fontsize=7)
        for head in range(min(heads, len(attention))):
            _over(row[1 + head], picture, attention[head], f"head {head + 1}")
        _over(row[-2], picture, attention.mean(dim=0), "mean")
        _over(row[-1], picture, rollout(layers)[image], "rollout")
    return figure


def _counted(block: int, depth: int) -> str:
    return f"{block % depth + 1} of {depth}"


def _over(axis: Axes, picture: Any, weights: Tensor, title: str) -> None:
    """A map over the image, each patch in its place."""
    height, width = picture.shape[:2]
    axis.imshow(picture, alpha=0.45)
    axis.imshow(weights.numpy(), cmap="viridis", alpha=0.65, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    axis.set_title(title, fontsize=7)


def attention_distance(students: Sequence[Distances]) -> Figure:
    """Mean attention distance by depth: a line for each student and each teacher that they have, dots for the heads."""
    import torch
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(COLUMN, 2.4), layout="constrained")
    lines = [(one.name, one.student, colour) for one, colour in zip(students, _colours(len(students)), strict=True)]
    teachers: list[Distances] = []
    for one in students:
        if not any(torch.equal(one.teacher, other.teacher) for other in teachers):
            teachers.append(one)
    for one in teachers:
        lines.append(("teacher" if len(teachers) == 1 else f"teacher of {one.name}", one.teacher, GREY))
    for name, distances, colour in lines:
        depth = _depths(len(distances))
        for head in distances.T:
            axis.plot(depth, head, ".", color=colour, ms=2, alpha=0.5)
        axis.plot(depth, distances.mean(dim=1), "-", color=colour, label=_short(name))
    axis.set_xlabel("depth (share of the blocks)")
    axis.set_ylabel("attention distance (image sides)")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def spectra(arm: TrainedArm, blocks: Sequence[int] | None = None) -> Figure:
    """2-D log amplitude of the patch tokens by block, DC in the middle: student above, teacher below, at equal depths."""
    from matplotlib import pyplot

    student, teacher = arm.student_layers, arm.teacher_layers
    chosen = list(blocks) if blocks is not None else _spread(student.depth, 4)
    figure, axes = pyplot.subplots(
        2, len(chosen), figsize=(PAGE, 2 * PAGE / len(chosen) * 0.8), squeeze=False, layout="constrained"
    )
    for row, (who, layers) in zip(axes, (("student", student), ("teacher", teacher)), strict=True):
        found = amplitude_spectra(layers).log10()
        for axis, block in zip(row, chosen, strict=True):
            own = block if who == "student" else round((block + 1) / student.depth * teacher.depth) - 1
            shown = axis.imshow(found[own].numpy(), cmap="magma", extent=(-1, 1, -1, 1))
            axis.set_title(f"{who}, block {own + 1} of {layers.depth}", fontsize=7)
            axis.grid(False)
            axis.set_xticks([-1, 0, 1])
            axis.set_yticks([-1, 0, 1])
            figure.colorbar(shown, ax=axis, shrink=0.8)
    figure.supxlabel("horizontal frequency (Nyquist = 1)", fontsize=8)
    figure.supylabel("vertical frequency", fontsize=8)
    return figure


def radial_spectra(arm: TrainedArm) -> Figure:
    """Amplitude by radial frequency relative to DC, a line a block, student beside teacher on one scale."""
    from matplotlib import pyplot
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    figure, axes = pyplot.subplots(1, 2, figsize=(PAGE, 2.4), sharey=True, layout="constrained")
    colours = pyplot.get_cmap("viridis")
    for axis, (who, layers) in zip(
        axes, (("student", arm.student_layers), ("teacher", arm.teacher_layers)), strict=True
    ):
        frequency, profiles = radial_profiles(amplitude_spectra(layers))
        for depth, profile in zip(_depths(layers.depth), profiles, strict=True):
            axis.plot(frequency, (profile / profile[0]).log10(), color=colours(depth))
        axis.set_title(f"{who}, {layers.depth} blocks")
        axis.set_xlabel("radial frequency (Nyquist = 1)")
    axes[0].set_ylabel("log₁₀ amplitude, relative to DC")
    figure.colorbar(ScalarMappable(Normalize(0, 1), "viridis"), ax=axes, label="depth")
    return figure


def similarity(arm: TrainedArm) -> Figure:
    """Linear CKA between the student's blocks and the teacher's."""
    from matplotlib import pyplot

    student, teacher = arm.student_layers, arm.teacher_layers
    table = cka(student, teacher)
    height = max(1.6, 0.6 + COLUMN * 0.75 * student.depth / teacher.depth)
    figure, axis = pyplot.subplots(figsize=(COLUMN, min(height, COLUMN)), layout="constrained")
    shown = axis.imshow(table.numpy(), cmap="viridis", vmin=0, vmax=1, origin="lower", aspect="auto")
    axis.grid(False)
    axis.set_xticks(range(teacher.depth), [str(block + 1) for block in range(teacher.depth)])
    axis.set_yticks(range(student.depth), [str(block + 1) for block in range(student.depth)])
    axis.set_xlabel("teacher's block")
    axis.set_ylabel("student's block")
    if table.numel() <= 48:
        for row, values in enumerate(table):
            for column, value in enumerate(values):
                ink = "white" if value < 0.6 else "black"
                axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=ink)
    figure.colorbar(shown, ax=axis, label=f"CKA, {len(arm.images)} images")
    return figure


def _depths(blocks: int) -> list[float]:
    return [(block + 1) / blocks for block in range(blocks)]


def _spread(depth: int, count: int) -> list[int]:
    """At most `count` blocks, equally spread, the last among them."""
    return sorted({math.ceil((n + 1) * depth / min(count, depth)) - 1 for n in range(min(count, depth))})


def _colours(count: int) -> list[str]:
    return [COLOURS[n % len(COLOURS)] for n in range(count)]


def _short(name: str, length: int = 28) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
