import random
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from scipy import ndimage
from timm.data import auto_augment as timm_ops
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from basd.data.photometric import (
    OPERATIONS,
    apply_operations_,
    color_jitter,
    gaussian_blur,
    grey,
    operation_arguments,
    rand_augment,
    three_augment,
)

TIMM_NAMES = {
    "Posterize": "PosterizeIncreasing",
    "Solarize": "SolarizeIncreasing",
    "Color": "ColorIncreasing",
    "Contrast": "ContrastIncreasing",
    "Brightness": "BrightnessIncreasing",
    "Sharpness": "SharpnessIncreasing",
}
# PIL truncates, rounds the degenerate image and rounds again
TOLERANCE = {"AutoContrast": 1, "Color": 2, "Contrast": 2, "Brightness": 1, "Sharpness": 2}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def byte_images() -> Tensor:
    """Noise, a dim ramp, a flat image, two levels, and colours: uint8 (6,3,24,20)."""
    g = generator(0)
    noise = torch.randint(0, 256, (1, 3, 24, 20), generator=g)
    ramp = torch.arange(24 * 20).view(1, 1, 24, 20).expand(1, 3, -1, -1) // 5 + 40
    flat = torch.full((1, 3, 24, 20), 90)
    two = (noise > 128) * 60 + 100
    tinted = noise.clone()
    tinted[:, 1] = tinted[:, 1] // 3
    dark = noise // 6
    return torch.cat((noise, ramp, flat, two, tinted, dark)).to(torch.uint8)


def apply(images: Tensor, name: str, argument: float) -> Tensor:
    operation = torch.full((len(images),), OPERATIONS.index(name))
    return apply_operations_(images.clone(), operation, torch.full((len(images),), argument, dtype=torch.float64))


def with_fixed_sign(call: Callable[[], Any], negate: bool, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(random, "random", lambda: 0.9 if negate else 0.1)
    return call()


def close(got: Tensor, expected: Tensor, case: str, atol: float) -> None:
    torch.testing.assert_close(got, expected, atol=atol, rtol=0, msg=lambda said: f"{case}: {said}")


def argument_of(name: str, level: float, negate: bool) -> float:
    operation, sign = torch.tensor([OPERATIONS.index(name)]), torch.tensor([negate])
    return operation_arguments(operation, torch.tensor([level], dtype=torch.float64), sign).item()


def test_arguments_are_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = [0.0, 0.1, 2.49, 2.5, 4.999, 5.0, 7.5, 8.3, 9.0, 9.99, 10.0]
    for name, level, negate in product(OPERATIONS, levels, [False, True]):
        level_to_argument = timm_ops.LEVEL_TO_ARG[TIMM_NAMES.get(name, name)]
        if level_to_argument is None:
            continue
        (found,) = with_fixed_sign(partial(level_to_argument, level, {}), negate, monkeypatch)
        # timm's last step, 0 bits, is a black image or an error in Pillow
        expected = max(found, 1) if name == "Posterize" else found
        assert argument_of(name, level, negate) == pytest.approx(expected, abs=1e-12), (name, level, negate)


def test_operations_are_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    images = byte_images()
    for name, level, negate in product(OPERATIONS, [0.0, 3.0, 9.0, 10.0], [False, True]):
        got = apply(images.float() / 255, name, argument_of(name, level, negate)) * 255
        # at level 10 timm's Posterize keeps 0 bits, which Pillow refuses
        magnitude = min(level, 9.9) if name == "Posterize" else level
        reference = timm_ops.AugmentOp(TIMM_NAMES.get(name, name), prob=1.0, magnitude=magnitude)
        for row, (image, mine) in enumerate(zip(images, got, strict=True)):
            pil = Image.fromarray(image.permute(1, 2, 0).numpy())
            out = with_fixed_sign(partial(reference, pil), negate, monkeypatch)
            expected = torch.from_numpy(np.array(out)).permute(2, 0, 1)
            case = f"{name}, level {level}, negate {negate}, image {row}"
            assert (mine - expected).abs().max() <= TOLERANCE.get(name, 0) + 1e-3, case


def test_blends_are_torchvisions_on_floats() -> None:
    x = byte_images().float() / 255
    for name, reference in (
        ("Color", TF.adjust_saturation),
        ("Contrast", TF.adjust_contrast),
        ("Sharpness", TF.adjust_sharpness),
    ):
        for factor in (0.1, 0.7, 1.0, 1.9):
            # torchvision weighs red with 0.2989 instead of 0.299
            close(apply(x, name, factor), reference(x, factor), f"{name} by {factor}", atol=3e-4)


def test_operations_change_nothing_at_their_identity() -> None:
    x = torch.rand(3, 3, 9, 7, generator=generator(1))
    for name in ("Color", "Contrast", "Brightness", "Sharpness"):
        assert torch.equal(apply(x, name, 1), x), name
    # these know 256 levels only
    x = byte_images().float() / 255
    for name, argument in (("Solarize", 256), ("SolarizeAdd", 0), ("Posterize", 8)):
        assert torch.equal(apply(x, name, argument), x), name


def test_mixed_batch_is_one_image_at_a_time() -> None:
    g = generator(2)
    x = torch.rand(33, 3, 16, 12, generator=g)
    operation = torch.arange(33) % 11
    operation = operation[torch.randperm(33, generator=g)]
    level = 10 * torch.rand(33, generator=g, dtype=torch.float64)
    arguments = operation_arguments(operation, level, torch.rand(33, generator=g) < 0.5)
    together = apply_operations_(x.clone(), operation, arguments)
    for i in range(33):
        alone = apply_operations_(x[i : i + 1].clone(), operation[i : i + 1], arguments[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=0)
    untouched = operation == 10
    assert torch.equal(together[untouched], x[untouched])


def test_rand_augment_against_a_loop() -> None:
    """One image at a time, from the same random numbers."""
    x = torch.rand(40, 3, 12, 12, generator=generator(3))
    got = rand_augment(x, 2, 9, 0.5, 0.5, generator(4))
    g = generator(4)
    operation = torch.randint(10, (2, 40), generator=g)
    done = torch.rand(2, 40, generator=g)
    noise = torch.randn(2, 40, generator=g, dtype=torch.float64)
    sign = torch.rand(2, 40, generator=g)
    for i in range(40):
        image = x[i : i + 1].clone()
        for layer in range(2):
            if done[layer, i] < 0.5:
                level = min(max(9 + 0.5 * noise[layer, i].item(), 0), 10)
                name = OPERATIONS[int(operation[layer, i])]
                argument = operation_arguments(
                    operation[layer, i : i + 1],
                    torch.tensor([level], dtype=torch.float64),
                    sign[layer, i : i + 1] < 0.5,
                )
                image = apply(image, name, argument.item())
        torch.testing.assert_close(got[i : i + 1], image, atol=1e-5, rtol=0)


def test_rand_augment_keeps_range_and_input() -> None:
    x = torch.rand(64, 3, 16, 16, generator=generator(5))
    before = x.clone()
    out = rand_augment(x, 3, 9, 0.5, 1.0, generator(6))
    assert torch.equal(x, before)
    assert out.min() >= 0 and out.max() <= 1 and not torch.equal(out, x)
    assert torch.equal(out, rand_augment(x, 3, 9, 0.5, 1.0, generator(6)))
    assert not torch.equal(out, rand_augment(x, 3, 9, 0.5, 1.0, generator(7)))
    assert torch.equal(rand_augment(x, 0, 9, 0.5, 1.0, generator(6)), x)


def test_draws_do_not_depend_on_settings_or_images() -> None:
    """Rows of a table that differ in strength see the same random numbers afterwards."""
    states = []
    for probability, magnitude, jitter, images in [
        (0.0, 9.0, 0.0, torch.zeros(8, 3, 6, 6)),
        (1.0, 2.0, 0.4, torch.rand(8, 3, 9, 9, generator=generator(0))),
    ]:
        g = generator(8)
        rand_augment(images, 2, magnitude, 0.5, probability, g)
        color_jitter(images, jitter, g)
        states.append(g.get_state())
    assert torch.equal(states[0], states[1])


def test_color_jitter_against_torchvision() -> None:
    x = torch.rand(24, 3, 10, 10, generator=generator(9))
    before = x.clone()
    functions = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    for strength in (0.3, 1.0):
        got = color_jitter(x, strength, generator(10))
        assert torch.equal(x, before)
        g = generator(10)
        uniform = torch.rand(24, 3, generator=g)
        order = torch.rand(24, 3, generator=g).argsort(dim=1)
        for i in range(24):
            image = x[i]
            for which in order[i].tolist():
                factor = max(0, 1 - strength) + (1 + strength - max(0, 1 - strength)) * uniform[i, which].item()
                image = functions[which](image, factor)
            close(got[i], image, f"strength {strength}, image {i}", atol=1e-3)
        assert len({tuple(row) for row in order.tolist()}) == 6  # every order occurs
    assert torch.equal(color_jitter(x, 0.0, generator(12)), x)


def test_grey_is_pils() -> None:
    image = byte_images()[4]
    expected = np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L"))
    got = grey(image[None].float())[0, 0]
    assert (got - torch.from_numpy(expected)).abs().max() <= 0.51


def test_gaussian_blur_against_scipy() -> None:
    """Each image with its own width; images smaller than the filter too."""
    for height, width in [(24, 20), (5, 3)]:
        sigma = torch.tensor([0.1, 0.3, 0.75, 1.2, 2.0])
        x = torch.rand(5, 3, height, width, generator=generator(13))
        before = x.clone()
        got = gaussian_blur(x, sigma)
        assert torch.equal(x, before)
        for n in range(5):
            for channel in range(3):
                plane = x[n, channel].double().numpy()
                expected = ndimage.gaussian_filter(plane, float(sigma[n]), mode="nearest", radius=20)
                torch.testing.assert_close(got[n, channel].double(), torch.from_numpy(expected), atol=2e-4, rtol=0)


def test_gaussian_blur_is_close_to_pillows() -> None:
    """Edges of 200 levels; Pillow approximates the filter by three boxes. A width 20 % off differs by 10 levels."""
    image = torch.zeros(3, 30, 30, dtype=torch.uint8)
    image[:, :, 15:] = 200
    image[1, 12:] = 60
    for sigma in (0.1, 0.6, 0.85, 1.1, 1.5, 2.0):
        got = gaussian_blur(image[None].float() / 255, torch.tensor([sigma]))[0] * 255
        pil = Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(sigma))
        assert (got - torch.from_numpy(np.array(pil)).permute(2, 0, 1)).abs().max() < 6, sigma


def test_three_augment_against_a_loop() -> None:
    """One image at a time, from the same random numbers, with Pillow's greyscale and solarisation."""
    x = torch.randint(0, 256, (60, 3, 14, 11), generator=generator(14), dtype=torch.uint8)
    plain = x.float() / 255
    before = plain.clone()
    got = three_augment(plain, generator(15))
    assert torch.equal(plain, before) and torch.equal(got, three_augment(plain, generator(15)))
    assert got.min() >= 0 and got.max() <= 1
    g = generator(15)
    choice = torch.randint(3, (60,), generator=g).tolist()
    sigma = (0.1 + 1.9 * torch.rand(60, generator=g)).tolist()
    assert set(choice) == {0, 1, 2}
    for i in range(60):
        pil = Image.fromarray(x[i].permute(1, 2, 0).numpy())
        if choice[i] == 2:
            expected = torch.from_numpy(
                ndimage.gaussian_filter(plain[i].numpy(), (0, sigma[i], sigma[i]), mode="nearest")
            )
            torch.testing.assert_close(got[i], expected, atol=5e-4, rtol=0)
            continue
        result = pil.convert("L").convert("RGB") if choice[i] == 0 else ImageOps.solarize(pil)
        expected = torch.from_numpy(np.array(result)).permute(2, 0, 1)
        assert (got[i] * 255 - expected).abs().max() <= (0.51 if choice[i] == 0 else 1e-3)


def test_three_augment_of_one_image() -> None:
    """A batch may hold no image of a kind."""
    x = torch.rand(1, 3, 6, 6, generator=generator(16))
    for seed in range(12):
        assert torch.isfinite(three_augment(x, generator(seed))).all()


def test_three_augment_chooses_each_equally_often() -> None:
    """A bright image is grey, dark or unchanged afterwards, and so shows the choice."""
    x = torch.tensor([0.9, 0.6, 0.7]).view(1, 3, 1, 1).expand(6000, 3, 2, 2)
    centre = three_augment(x, generator(17))[:, :, 0, 0]
    greyed = (centre[:, 0] == centre[:, 1]).sum()
    dark = (centre.amax(1) < 0.5).sum()
    untouched = ((centre - x[:, :, 0, 0]).abs().amax(1) < 1e-5).sum()  # a blurred flat image is the same
    assert greyed + dark + untouched == 6000
    for count in (greyed, dark, untouched):
        assert abs(count - 2000) < 4.5 * (6000 * 2 / 9) ** 0.5
