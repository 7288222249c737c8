"""What figures of trained models are drawn from, against naive formulas; and the figures themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer

from analysis import history_figures, model_figures
from analysis.style import save, style
from analysis.trained import (
    Distances,
    Layers,
    TrainedArm,
    amplitude_spectra,
    attention_distances,
    cka,
    open_arm,
    radial_profiles,
    read_layers,
    rollout,
)
from basd.errors import UserError


def vit(seed: int, depth: int = 3, heads: int = 3, width: int = 12, size: int = 20) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=size, patch_size=4, embed_dim=width, depth=depth, num_heads=heads, num_classes=10
    ).eval()


def layers_of(tokens: torch.Tensor, attention: torch.Tensor | None = None, grid: tuple[int, int] = (4, 4)) -> Layers:
    """Layers from (blocks, B, N, D) and (blocks, B, H, 1+N, 1+N)."""
    if attention is None:
        attention = torch.rand(len(tokens), tokens.shape[1], 2, 1 + tokens.shape[2], 1 + tokens.shape[2]).softmax(
            dim=-1
        )
    return Layers(tuple(tokens), tuple(attention), grid, 1)


def test_layers_are_those_of_the_forward_pass() -> None:
    model, images = vit(0), torch.randn(2, 3, 20, 20)
    layers = read_layers(model, images)
    assert (layers.depth, layers.grid, layers.prefix) == (3, (5, 5), 1)
    with torch.inference_mode():
        assert torch.equal(model.norm(layers.tokens[-1]), model.forward_features(images)[:, 1:])
    for attention in layers.attention:
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, 3, 26))


def test_rollout_is_the_product_with_the_residual_path() -> None:
    attention = torch.rand(3, 2, 2, 17, 17).softmax(dim=-1)
    flow = torch.eye(17).repeat(2, 1, 1)
    for block in range(3):
        for image in range(2):
            mean = sum(attention[block, image, head] for head in range(2)) / 2
            flow[image] = (mean + torch.eye(17)) / 2 @ flow[image]
    found = rollout(layers_of(torch.randn(3, 2, 16, 4), attention))
    torch.testing.assert_close(found.flatten(1), flow[:, 0, 1:])


def test_distances_of_looking_at_oneself_and_everywhere() -> None:
    eye, everywhere = torch.eye(17).expand(1, 1, 17, 17), torch.full((1, 1, 17, 17), 1 / 17)
    found = attention_distances(layers_of(torch.randn(2, 1, 16, 4), torch.stack([eye, everywhere])))
    places = [((y + 0.5) / 4, (x + 0.5) / 4) for y in range(4) for x in range(4)]
    expected = sum(math.dist(a, b) for a in places for b in places) / 256
    assert found.flatten().tolist() == pytest.approx([0.0, expected])


def test_a_wave_stands_at_its_frequency_and_on_its_ring() -> None:
    _, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    wave = torch.cos(2 * math.pi * 2 * x / 8).flatten()[None, :, None].expand(3, 64, 5)
    spectra = amplitude_spectra(layers_of(wave[None].contiguous(), torch.rand(1, 3, 1, 65, 65), (8, 8)))
    assert spectra.shape == (1, 8, 8)
    # DC stands in the middle, at (4, 4)
    assert {tuple(place) for place in (spectra[0] > 1e-3).nonzero().tolist()} == {(4, 2), (4, 6)}
    frequency, profile = radial_profiles(spectra)
    assert frequency.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert int(profile[0].argmax()) == 2 and bool((profile[0, [0, 1, 3, 4]] < 1e-4).all())


def test_a_flat_spectrum_has_a_flat_profile() -> None:
    for shape in ((6, 6), (5, 7), (8, 8)):
        _, profile = radial_profiles(torch.ones(2, *shape))
        assert torch.equal(profile, torch.ones_like(profile))


def test_cka_sees_no_rotation_and_no_scale() -> None:
    tokens = torch.randn(2, 12, 16, 6, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1))).Q
    table = cka(layers_of(tokens), layers_of(3 * tokens @ rotation))
    torch.testing.assert_close(table.diagonal(), torch.ones(2))
    assert abs(float(table[0, 1])) < 0.5
    with pytest.raises(UserError, match="at least 4 images"):
        cka(layers_of(tokens[:, :3]), layers_of(tokens[:, :3]))


@pytest.fixture
def arm() -> TrainedArm:
    data = SimpleNamespace(mean=[0.5] * 3, std=[0.5] * 3)
    teacher = SimpleNamespace(image_size=24, mean=[0.4] * 3, std=[0.3] * 3)
    config: Any = SimpleNamespace(data=data, teacher=teacher)
    images = torch.rand(6, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    return TrainedArm("basd without attn", "0" * 16, vit(0), vit(1, 4, 2, 16, 24), config, images, torch.arange(6))


def drawn(figure: Any, folder: Path) -> list[str]:
    """Every text of a figure; it is written and not blank."""
    figure.canvas.draw()
    texts = [text.get_text() for text in figure.findobj(lambda one: hasattr(one, "get_text")) if text.get_text()]
    pdf, png = save(figure, folder / "figure")
    assert pdf.read_bytes().startswith(b"%PDF")
    with Image.open(png) as picture:
        low, high = picture.convert("L").getextrema()
        assert low < 100 < 200 < high
    return texts


FIGURES: list[tuple[Callable[[TrainedArm], Any], list[str]]] = [
    (lambda arm: model_figures.attention_maps(arm, image=1), ["student, block 3 of 3", "teacher, block 4 of 4", "rollout", "head 3"]),
    (lambda arm: model_figures.attention_distance([Distances.of(arm)]), ["attention distance (image sides)", "basd without attn", "teacher"]),
    (lambda arm: model_figures.spectra(arm), ["student, block 3 of 3", "teacher, block 4 of 4"]),
    (lambda arm: model_figures.radial_spectra(arm), ["student, 3 blocks", "teacher, 4 blocks", "depth"]),
    (lambda arm: model_figures.similarity(arm), ["teacher's block", "student's block", "CKA, 6 images"]),
]  # fmt: skip


def texts_of(figure: Any) -> set[str]:
    return {text.get_text() for text in figure.findobj(lambda one: hasattr(one, "get_text"))}


def test_figures_of_models_say_what_they_show(arm: TrainedArm) -> None:
    with style():
        for make, said in FIGURES:
            assert set(said) <= texts_of(make(arm)), said


@pytest.mark.full
def test_figures_of_models_are_written(arm: TrainedArm, tmp_path: Path) -> None:
    with style():
        for make, said in FIGURES:
            assert set(said) <= set(drawn(make(arm), tmp_path)), said


def test_a_finished_arm_is_opened_by_its_key(tiny_arm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from basd.tracking.files import write_json
    from basd.tracking.journal import Journal
    from basd.training.cohort import train_cohort

    monkeypatch.chdir(tmp_path)
    frozen = tiny_arm("method=ce", "recipe.duration=2 steps")
    directory = tmp_path / "runs" / frozen.setting / frozen.arm_key
    directory.mkdir(parents=True)
    write_json(directory / "arm.json", frozen.to_dict())
    journal = Journal(directory)
    (result,) = train_cohort([frozen], [directory], [journal])
    with pytest.raises(UserError, match="not finished"):
        open_arm(frozen.arm_key[:6])
    journal.end("complete", "", result.metrics)
    journal.close()
    opened = open_arm(frozen.arm_key[:6], count=5)
    assert opened.images.shape == (5, 3, 20, 20) and opened.student_layers.grid == (5, 5)
    assert opened.teacher_layers.depth == 2
    with pytest.raises(UserError, match="no arm"):
        open_arm("f" * 16)


# -- over training -----------------------------------------------------------------------------------------------------


def histories() -> pd.DataFrame:
    rows = [
        {"row": row, "seed": seed, "step": step, "metric": metric, "value": (1 + place) * step / 100 + 0.01 * seed}
        for place, row in enumerate(("basd", "ce"))
        for seed in (0, 1)
        for step in range(0, 100, 10)
        for metric in ("val/top1", "loss/rsd", "loss/rel", "weight/rsd", "weight/rel", "ramp/rsd")
    ]
    return pd.DataFrame(rows)


def test_learning_curves_are_means_with_a_band_of_one_deviation(tmp_path: Path) -> None:
    with style():
        figure = history_figures.learning_curves(histories(), "val/top1", {"basd": "BASD"})
        (axis,) = figure.axes
        line = axis.lines[1]
        assert line.get_ydata() == pytest.approx([100 * (2 * step / 100 + 0.005) for step in range(0, 100, 10)])
        band = axis.collections[1].get_paths()[0].vertices
        assert band[:, 1].max() == pytest.approx(100 * (1.8 + 0.005 + 0.01 / math.sqrt(2)))
        assert {"BASD", "ce", "val top-1 (%)", "step"} <= set(drawn(figure, tmp_path))


def test_the_legend_of_long_names_stays_within_the_column() -> None:
    names = {row: f"{row}, with values that are the teacher's own" for row in ("basd", "ce")}
    with style():
        figure = history_figures.learning_curves(histories(), "val/top1", names)
        figure.canvas.draw()
        box, (axis,) = figure.legends[0].get_window_extent(), figure.axes
        assert box.x0 >= 0 and box.x1 <= figure.get_size_inches()[0] * figure.dpi
        assert axis.get_window_extent().height > 1.2 * figure.dpi and not box.overlaps(axis.get_tightbbox())


def test_trajectories_have_a_panel_for_each_kind_there_is(tmp_path: Path) -> None:
    with style():
        figure = history_figures.trajectories(histories(), "basd")
        assert figure is not None and len(figure.axes) == 3
        assert {"loss", "ramp", "weight", "rsd", "rel"} <= set(drawn(figure, tmp_path))
        alone = histories()
        assert history_figures.trajectories(alone[alone["metric"] == "val/top1"], "basd") is None


def test_selector_maps_show_the_mean_mixture(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        [
            {"row": "basd", "seed": seed, "step": step, "point": point, "layer": layer, "value": 0.5 + (seed - 0.5) * 0.2}
            for seed in (0, 1) for step in (0, 10, 20) for point in (1, 3) for layer in (0, 1)
        ]
    )  # fmt: skip
    with style():
        figure = history_figures.selector_map(frame, "basd")
        assert figure is not None
        assert figure.axes[0].images[0].get_array().tolist() == [[pytest.approx(0.5)] * 3] * 2
        assert {"after student block 2", "after student block 4", "teacher's block"} <= set(drawn(figure, tmp_path))
        assert history_figures.selector_map(frame, "ce") is None


def test_cost_is_drawn_against_the_metric_or_not_at_all(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "row": ["a", "a", "b"],
            "seed": [0, 1, 0],
            "time/step_milliseconds": [10.0, 12.0, 30.0],
            "test/top1": [0.5, 0.7, 0.9],
        }
    )
    with style():
        figure = history_figures.cost_against(frame, "time/step_milliseconds", "test/top1", reference="a")
        assert figure is not None
        points = [
            tuple(map(float, line.get_xydata()[0])) for line in figure.axes[0].lines if len(line.get_xydata()) == 1
        ]
        assert (11.0, pytest.approx(60.0)) in points and (30.0, pytest.approx(90.0)) in points
        assert {"ms a step", "test top-1 (%)", "a", "b"} <= set(drawn(figure, tmp_path))
    assert history_figures.cost_against(frame, "system/peak_megabytes", "test/top1") is None
