import math
from dataclasses import fields
from itertools import product

import numpy as np
import pytest
import torch
from timm.data import mixup as timm_mixup

from basd.data import DATASETS, MIXINGS, VIEWS
from basd.data.mixing import (
    CutmixConfig,
    Mix,
    MixingConfig,
    MixupConfig,
    MixupCutmixConfig,
    NoMixingConfig,
    draw,
    soft_labels,
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_mix(config: MixingConfig, height: int, width: int, seed: int) -> Mix:
    mix = draw(config, height, width, generator(seed))
    assert mix is not None
    return mix


def test_kinds() -> None:
    assert draw(NoMixingConfig(), 48, 48, generator(0)) is None
    kinds = [draw_mix(MixupCutmixConfig(), 48, 48, seed).kind for seed in range(400)]
    assert 150 < kinds.count("cutmix") < 250
    assert {draw_mix(MixupConfig(), 48, 48, seed).kind for seed in range(20)} == {"mixup"}
    assert {draw_mix(CutmixConfig(), 48, 48, seed).kind for seed in range(20)} == {"cutmix"}
    always = MixupCutmixConfig(switch=1.0), MixupCutmixConfig(switch=0.0)
    assert {draw_mix(always[0], 48, 48, seed).kind for seed in range(20)} == {"cutmix"}
    assert {draw_mix(always[1], 48, 48, seed).kind for seed in range(20)} == {"mixup"}


def test_same_generator_same_mix() -> None:
    state = np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[index,union-attr]
    for seed in range(20):
        assert draw_mix(MixupCutmixConfig(), 48, 32, seed) == draw_mix(MixupCutmixConfig(), 48, 32, seed)
    assert np.array_equal(state[0], np.random.get_state()[1])  # type: ignore[index]
    assert torch.equal(state[1], torch.get_rng_state())


def test_draws_a_fixed_amount() -> None:
    states = []
    for config in (MixupCutmixConfig(), MixupConfig(probability=0.0), CutmixConfig(cutmix_alpha=0.3)):
        g = generator(5)
        draw(config, 48, 48, g)
        states.append(g.get_state())
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


MIXED: list[type] = [MixupCutmixConfig, MixupConfig, CutmixConfig]


def test_probability_is_the_share_of_mixed_batches() -> None:
    """A batch is mixed as at probability 1 or not at all, and one that is mixed stays so at a larger probability."""
    n = 1500
    for kind in MIXED:
        always = [draw(kind(), 24, 20, generator(seed)) for seed in range(n)]
        assert None not in always, kind
        assert all(draw(kind(probability=0.0), 24, 20, generator(seed)) is None for seed in range(200)), kind
        shares = []
        for probability in (0.3, 0.8):
            drawn = [draw(kind(probability=probability), 24, 20, generator(seed)) for seed in range(n)]
            assert all(mix is None or mix == full for mix, full in zip(drawn, always, strict=True)), kind
            mixed = {seed for seed, mix in enumerate(drawn) if mix is not None}
            assert abs(len(mixed) / n - probability) < 4 * math.sqrt(probability * (1 - probability) / n), kind
            shares.append(mixed)
        assert shares[0] < shares[1], kind


def test_whether_a_batch_is_mixed_does_not_depend_on_how() -> None:
    """λ and the kind have the same distribution in the batches that are mixed as in all."""
    n = 4000
    drawn = [draw(MixupCutmixConfig(probability=0.5), 48, 48, generator(seed)) for seed in range(n)]
    kept = [mix for mix in drawn if mix is not None]
    cut = [mix.kind == "cutmix" for mix in kept]
    assert abs(sum(cut) / len(cut) - 0.5) < 4 * 0.5 / math.sqrt(len(cut))
    lam = torch.tensor([mix.lam for mix in kept if mix.kind == "mixup"])
    assert abs(lam.mean() - 0.5) < 0.04


def test_full_probability_draws_what_the_generator_gives() -> None:
    """The switch, the centre and the seed of Beta are drawn first: `probability` shifts none of them."""
    for seed in range(50):
        g = generator(seed)
        switch = torch.rand(3, generator=g, dtype=torch.float64)[0].item()
        beta = np.random.Generator(np.random.PCG64(int(torch.randint(2**62, (), generator=g))))
        mix = draw_mix(MixupCutmixConfig(), 48, 48, seed)
        assert mix.kind == ("cutmix" if switch < 0.5 else "mixup")
        if mix.kind == "mixup":
            assert mix.lam == beta.beta(0.8, 0.8)


def test_skip_with_every_batch_mixed_is_refused() -> None:
    for kind in MIXED:
        (problem,) = kind(targets="skip").problems()
        assert "mixing.targets=skip" in problem and "set mixing.probability below 1" in problem, kind
        assert kind(targets="skip", probability=0.9).problems() == [], kind
        for targets in ("follow", "same_input", "clean"):
            assert kind(targets=targets).problems() == [], (kind, targets)


def test_lambda_has_the_beta_distribution() -> None:
    for alpha in (0.8, 0.2):
        lam = torch.tensor([draw_mix(MixupConfig(mixup_alpha=alpha), 8, 8, seed).lam for seed in range(3000)])
        assert ((lam >= 0) & (lam <= 1)).all(), alpha
        assert abs(lam.mean() - 0.5) < 0.03, alpha
        assert abs(lam.var() - 1 / (4 * (2 * alpha + 1))) < 0.01, alpha


def test_box_is_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    clipped = 0
    for seed in range(200):
        height, width = 48, 37
        mix = draw_mix(CutmixConfig(), height, width, seed)
        g = generator(seed)
        _, cy, cx = torch.rand(3, generator=g, dtype=torch.float64).tolist()
        numpy_seed = int(torch.randint(2**62, (), generator=g))
        lam = np.random.Generator(np.random.PCG64(numpy_seed)).beta(1.0, 1.0)
        centres = iter([int(cy * height), int(cx * width)])
        monkeypatch.setattr(np.random, "randint", lambda *_, centres=centres, **__: next(centres))
        box, corrected = timm_mixup.cutmix_bbox_and_lam((1, 3, height, width), lam)
        assert mix.box == tuple(int(edge) for edge in box)
        assert mix.lam == pytest.approx(corrected, abs=1e-12)
        clipped += abs(corrected - lam) > 0.05
    assert clipped > 20  # the correction matters


def test_cutmix_images_against_a_loop_and_lambda_is_the_pixel_share() -> None:
    for seed in range(30):
        mix = draw_mix(CutmixConfig(), 12, 10, seed)
        assert mix.box is not None
        x = torch.rand(6, 3, 12, 10, generator=generator(seed))
        before = x.clone()
        mixed = mix.mix_images(x)
        assert torch.equal(x, before)
        y0, y1, x0, x1 = mix.box
        own = 0
        for i in range(12):
            for j in range(10):
                partner = y0 <= i < y1 and x0 <= j < x1
                assert torch.equal(mixed[:, :, i, j], x.flip(0)[:, :, i, j] if partner else x[:, :, i, j])
                own += not partner
        assert mix.lam == pytest.approx(own / 120)


def test_mixup_images() -> None:
    mix = draw_mix(MixupConfig(), 12, 12, 3)
    x = torch.rand(5, 3, 12, 12, generator=generator(4))
    for i in range(5):
        torch.testing.assert_close(mix.mix_images(x)[i], mix.lam * x[i] + (1 - mix.lam) * x[4 - i])


def test_labels_are_timms() -> None:
    labels = torch.tensor([0, 3, 3, 9, 1, 9])
    for smoothing in (0.0, 0.1):
        for kind, seed in product((MixupConfig, CutmixConfig), range(10)):
            mix = draw_mix(kind(), 48, 48, seed)
            soft = mix.mix_labels(labels, 10, smoothing)
            expected = timm_mixup.mixup_target(labels, 10, mix.lam, smoothing)
            case = f"{mix}, smoothing {smoothing}"
            torch.testing.assert_close(soft, expected, msg=lambda said, case=case: f"{case}: {said}")
            torch.testing.assert_close(soft.sum(1), torch.ones(6), msg=lambda said, case=case: f"{case}: {said}")
        torch.testing.assert_close(soft_labels(labels, 10, smoothing).sum(1), torch.ones(6))
        assert torch.equal(soft_labels(labels, 10, smoothing).argmax(1), labels), smoothing


def test_coverage_is_pixel_counting() -> None:
    """Each pixel is cut into grid_h × grid_w small ones, so that every patch holds whole small pixels."""
    height, width = 24, 18
    for (grid_h, grid_w), seed in product([(6, 6), (8, 3), (5, 7), (1, 1), (24, 18)], range(25)):
        mix = draw_mix(CutmixConfig(), height, width, seed)
        assert mix.box is not None
        y0, y1, x0, x1 = mix.box
        shown = torch.zeros(height, width, dtype=torch.float64)
        shown[y0:y1, x0:x1] = 1
        small = shown.repeat_interleave(grid_h, 0).repeat_interleave(grid_w, 1)
        expected = small.view(grid_h, height, grid_w, width).mean(dim=(1, 3)).flatten()
        coverage = mix.coverage(grid_h, grid_w, height, width)
        case = f"{grid_h} × {grid_w} patches, box {mix.box}"
        assert coverage.shape == (grid_h * grid_w,) and coverage.dtype == torch.float32, case
        torch.testing.assert_close(
            coverage.double(), expected, atol=1e-6, rtol=0, msg=lambda said, case=case: f"{case}: {said}"
        )
        assert coverage.double().mean().item() == pytest.approx(1 - mix.lam, abs=1e-6), case


def test_coverage_mixes_patch_means_as_the_image_is_mixed() -> None:
    """The property that `targets=follow` rests on, with a box aligned to the patches; mixup covers all patches alike."""
    torch.testing.assert_close(Mix("mixup", 0.3).coverage(2, 3, 48, 48), torch.full((6,), 0.7))
    mix = Mix("cutmix", 1 - 16 * 8 / 48**2, (16, 32, 8, 16))
    x = torch.rand(4, 3, 48, 48, generator=generator(6), dtype=torch.float64)

    def patches(images: torch.Tensor) -> torch.Tensor:
        return images.view(4, 3, 6, 8, 6, 8).mean(dim=(3, 5)).flatten(2)

    share = mix.coverage(6, 6, 48, 48).double()
    followed = patches(x) * (1 - share) + mix.partner(patches(x)) * share
    torch.testing.assert_close(patches(mix.mix_images(x)), followed)


def test_configs_are_well_formed() -> None:
    groups: list[dict[str, type]] = [DATASETS, VIEWS, MIXINGS]
    for key, config in (pair for group in groups for pair in group.items()):
        assert config().name == key and "name" in {field.name for field in fields(config)}, key
        for field in fields(config):
            value = getattr(config(), field.name)
            case = f"{key}: {field.name}={value}"
            if "choices" in field.metadata:
                assert value in field.metadata["choices"], case
            if "min" in field.metadata:
                assert value >= field.metadata["min"], case
            assert field.metadata.get("max", math.inf) >= (value if isinstance(value, (int, float)) else 0), case
