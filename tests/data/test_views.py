import math
import random
from dataclasses import replace

import numpy as np
import torch
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from basd.data.digits import DigitsConfig
from basd.data.geometric import rand_augment_full
from basd.data.photometric import color_jitter, three_augment
from basd.data.views import (
    STRONG,
    DualViewsConfig,
    Geometry,
    SingleViewsConfig,
    clean_view,
    crop,
    draw_geometry,
    eval_view,
    normalize,
    random_erasing,
    resize_normalised,
    strong_view,
    student_view,
)

DATA = DigitsConfig(crop_scale=[0.3, 1.0], crop_ratio=[0.75, 4 / 3], horizontal_flip=0.5)
OFF = DualViewsConfig(op_probability=0.0, color_jitter=0.0, erasing=0.0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def byte_images(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (batch, 3, height, width), generator=generator(seed), dtype=torch.uint8)


def test_geometry_against_a_loop() -> None:
    """torchvision's RandomResizedCrop.get_params, from the same random numbers."""
    batch, height, width = 200, 30, 44
    data = replace(DATA, crop_scale=[0.2, 1.0], crop_ratio=[0.5, 2.0])
    got = draw_geometry(batch, height, width, data, generator(1))
    g = generator(1)
    draws = torch.rand(2, batch, 10, generator=g, dtype=torch.float64).tolist()
    rest = torch.rand(3, batch, generator=g, dtype=torch.float64).tolist()
    for b in range(batch):
        for k in range(10):
            area = height * width * (0.2 + 0.8 * draws[0][b][k])
            ratio = math.exp(math.log(0.5) + (math.log(2.0) - math.log(0.5)) * draws[1][b][k])
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                break
        else:
            w, h = width, height  # 44/30 lies within the ratios
        y, x = int(rest[0][b] * (height - h + 1)), int(rest[1][b] * (width - w + 1))
        assert got.boxes[b].tolist() == [y, x, h, w]
        assert bool(got.flips[b]) == (rest[2][b] < 0.5)


def test_geometry_has_torchvisions_distribution() -> None:
    height, width, n = 40, 56, 3000
    boxes = draw_geometry(n, height, width, DATA, generator(2)).boxes.double()
    torch.manual_seed(0)
    transform = v2.RandomResizedCrop(40, scale=(0.3, 1.0), ratio=(0.75, 4 / 3))
    image = torch.zeros(3, height, width)
    params = [transform.make_params([image]) for _ in range(n)]
    reference = torch.tensor([[p["top"], p["left"], p["height"], p["width"]] for p in params]).double()
    for moment in (boxes.mean(0) - reference.mean(0), boxes.std(0) - reference.std(0)):
        assert (moment.abs() < 4 * reference.std(0) / math.sqrt(n / 2)).all()


def test_fallback_is_torchvisions() -> None:
    """A share of 1 never fits, unless the ratio is 1."""
    for height, width, box in [(10, 100, [0, 43, 10, 13]), (100, 10, [43, 0, 13, 10])]:
        data = replace(DATA, crop_scale=[1.0, 1.0], crop_ratio=[0.75, 4 / 3])
        got = draw_geometry(5, height, width, data, generator(3)).boxes
        params = v2.RandomResizedCrop(8, scale=(1.0, 1.0)).make_params([torch.zeros(3, height, width)])
        assert [params["top"], params["left"], params["height"], params["width"]] == box
        assert got.tolist() == [box] * 5
    # a square image and ratios beyond 1
    data = replace(DATA, crop_scale=[1.0, 1.0], crop_ratio=[1.05, 4 / 3])
    assert draw_geometry(5, 20, 20, data, generator(3)).boxes.tolist() == [[0, 0, round(20 / 1.05), 20]] * 5


def test_crop_is_torchvisions_resized_crop() -> None:
    """Down to 8 pixels antialiasing counts, up to 48 it does not."""
    images = byte_images(30, 40, 33)
    geometry = draw_geometry(30, 40, 33, DATA, generator(4))
    for size in (8, 20, 48):
        got = crop(images, geometry, size)
        assert got.shape == (30, 3, size, size) and got.dtype == torch.float32
        for i, (y, x, h, w) in enumerate(geometry.boxes.tolist()):
            expected = TF.resized_crop(images[i].float() / 255, y, x, h, w, [size, size], antialias=True)
            if geometry.flips[i]:
                expected = expected.flip(-1)
            case = f"box {(y, x, h, w)} to {size} pixels: "
            torch.testing.assert_close(got[i], expected, atol=2e-5, rtol=0, msg=lambda said, case=case: case + said)


def test_crop_of_a_box_of_the_right_size_copies_pixels() -> None:
    images = byte_images(2, 20, 20)
    geometry = Geometry(torch.tensor([[3, 5, 12, 12], [8, 0, 12, 12]]), torch.tensor([False, True]))
    got = crop(images, geometry, 12)
    assert torch.equal(got[0], images[0, :, 3:15, 5:17].float() / 255)
    assert torch.equal(got[1], images[1, :, 8:20, 0:12].flip(-1).float() / 255)


def test_clean_view_is_a_crop_at_any_size() -> None:
    images = byte_images(16, 48, 48)
    before = images.clone()
    clean, geometry = clean_view(images, DATA, 48, generator(5))
    assert torch.equal(clean, crop(images, geometry, 48)) and torch.equal(images, before)
    assert clean.min() >= 0 and clean.max() <= 1
    again, _ = clean_view(images, DATA, 48, generator(5))
    assert torch.equal(clean, again)
    assert crop(images, geometry, 24).shape == (16, 3, 24, 24)
    # the boxes depend on nothing but the generator, the images' size and the crop's settings
    _, elsewhere = clean_view(byte_images(16, 48, 48, seed=9), DATA, 32, generator(5))
    assert torch.equal(geometry.boxes, elsewhere.boxes) and torch.equal(geometry.flips, elsewhere.flips)
    assert geometry.flips.any() and not geometry.flips.all()
    assert not clean_view(images, DigitsConfig(), 48, generator(5))[1].flips.any()


def test_eval_view() -> None:
    images = byte_images(3, 48, 48)
    assert torch.equal(eval_view(images, 48), images.float() / 255)
    wide = byte_images(2, 20, 31)
    expected = TF.resize(wide[..., 5:25].float() / 255, [10, 10], antialias=True)
    torch.testing.assert_close(eval_view(wide, 10), expected, atol=2e-5, rtol=0)
    assert torch.equal(eval_view(wide, 20), wide[..., 5:25].float() / 255)


def test_strong_view_with_everything_off_is_the_clean_view() -> None:
    clean, _ = clean_view(byte_images(12, 48, 48), DATA, 48, generator(6))
    assert torch.equal(strong_view(clean, OFF, generator(7)), clean)
    assert torch.equal(strong_view(clean, replace(DualViewsConfig(), num_ops=0, color_jitter=0.0), generator(7)), clean)


def test_strong_view_moves_no_pixel() -> None:
    """Photometric means pixel by pixel: a flat half stays flat, and the edge between halves stays where it is."""
    clean = torch.zeros(64, 3, 16, 16)
    clean[..., 8:] = 0.6
    strong = strong_view(clean, DualViewsConfig(op_probability=1.0), generator(8))
    # sharpness, drawn twice, reaches two pixels beside the edge
    assert (strong[..., :6] - strong[..., :1, :1]).abs().max() < 1e-5
    assert (strong[..., 10:] - strong[..., :1, -1:]).abs().max() < 1e-5


def test_strong_kinds_are_followed_by_colour_jitter() -> None:
    clean, _ = clean_view(byte_images(24, 48, 48), DATA, 48, generator(6))
    before = clean.clone()
    config = DualViewsConfig(num_ops=3, magnitude=6.0, magnitude_std=1.0, op_probability=0.8, color_jitter=0.2)
    g = generator(7)
    expected = color_jitter(rand_augment_full(clean, 3, 6.0, 1.0, 0.8, [0.1, 0.2, 0.3], g), 0.2, g)
    got = strong_view(clean, replace(config, strong="randaugment_full"), generator(7), fill=[0.1, 0.2, 0.3])
    assert torch.equal(got, expected)
    g = generator(7)
    expected = color_jitter(three_augment(clean, g), 0.2, g)
    assert torch.equal(strong_view(clean, replace(config, strong="three_augment"), generator(7)), expected)
    assert torch.equal(clean, before)
    assert torch.equal(strong_view(clean, replace(OFF, strong="randaugment_full"), generator(7)), clean)


def test_full_rand_augment_shows_the_mean_beyond_the_image() -> None:
    """A white image that is moved: what comes in from outside is zero after normalisation."""
    images = torch.full((200, 3, 24, 24), 255, dtype=torch.uint8)
    clean = images.float() / 255
    data = replace(DATA, mean=[0.2, 0.4, 0.6])
    config = replace(OFF, strong="randaugment_full", num_ops=1, op_probability=1.0)
    seen = student_view(images, clean, data, config, generator(8))
    shown = (seen.abs() < 1e-6).all(dim=1).flatten(1).any(dim=1)  # a photometric operation gives no such colour
    assert 0.2 < shown.float().mean() < 0.5


def test_erasing_is_in_force_for_every_kind() -> None:
    images = byte_images(100, 24, 24)
    clean = images.float() / 255
    for strong in STRONG:
        with_erasing, without = (
            student_view(images, clean, DATA, DualViewsConfig(strong=strong, erasing=share), generator(9))
            for share in (0.5, 0.0)
        )
        erased = (with_erasing != without).flatten(1).any(dim=1)
        assert 30 < erased.sum() < 70, strong


def test_the_kind_of_rand_augment_changes_no_later_draw() -> None:
    images = byte_images(40, 24, 24)
    clean = images.float() / 255
    states = []
    for strong in ("photometric", "randaugment_full"):
        g = generator(10)
        student_view(images, clean, DATA, DualViewsConfig(strong=strong), g)
        states.append(g.get_state())
    assert torch.equal(states[0], states[1])


def test_student_view() -> None:
    images = byte_images(32, 48, 48)
    clean, _ = clean_view(images, DATA, 48, generator(9))
    before = clean.clone()
    plain = normalize(clean, DATA.mean, DATA.std)
    assert torch.equal(student_view(images, clean, DATA, SingleViewsConfig(), generator(10)), plain)
    assert torch.equal(student_view(images, clean, DATA, OFF, generator(10)), plain)
    strong = student_view(images, clean, DATA, DualViewsConfig(), generator(10))
    assert strong.shape == plain.shape and not torch.equal(strong, plain)
    assert torch.equal(strong, student_view(images, clean, DATA, DualViewsConfig(), generator(10)))
    own = student_view(images, clean, DATA, replace(OFF, geometry="independent"), generator(10))
    assert torch.equal(own, normalize(clean_view(images, DATA, 48, generator(10))[0], DATA.mean, DATA.std))
    assert torch.equal(clean, before)


def test_normalize() -> None:
    x = torch.rand(2, 3, 4, 4, generator=generator(11))
    expected = TF.normalize(x, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])
    torch.testing.assert_close(normalize(x, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]), expected)


def test_resize_normalised_is_the_view_at_another_size() -> None:
    """Undo the statistics, resize the image, apply the others."""
    x = torch.rand(3, 3, 20, 20, generator=generator(20))
    old, new = ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7]), ([0.4, 0.5, 0.45], [0.2, 0.3, 0.25])
    for size in (9, 20, 33):
        expected = TF.normalize(TF.resize(x, [size, size], antialias=True), *new)
        before = normalize(x, *old)
        kept = before.clone()
        torch.testing.assert_close(resize_normalised(before, size, *old, *new), expected, atol=2e-5, rtol=0)
        assert torch.equal(before, kept)
    assert torch.equal(resize_normalised(x, 20, *old, *map(tuple, old)), x)


def test_resize_normalised_resizes_as_the_crop_does() -> None:
    images = byte_images(2, 24, 24)
    whole = Geometry(torch.tensor([[0, 0, 24, 24]] * 2), torch.zeros(2, dtype=torch.bool))
    statistics = (DATA.mean, DATA.std)
    for size in (8, 35):
        got = resize_normalised(normalize(images.float() / 255, *statistics), size, *statistics, *statistics)
        torch.testing.assert_close(got, normalize(crop(images, whole, size), *statistics), atol=2e-5, rtol=0)


def test_random_erasing_against_a_loop() -> None:
    """timm's RandomErasing in pixel mode, from the same random numbers."""
    batch, height, width = 60, 18, 24
    x = torch.rand(batch, 3, height, width, generator=generator(12))
    before = x.clone()
    got = random_erasing(x, 0.6, generator(13))
    assert torch.equal(x, before)
    g = generator(13)
    tries = torch.rand(2, batch, 10, generator=g, dtype=torch.float64).tolist()
    done, y_draw, x_draw = torch.rand(3, batch, generator=g, dtype=torch.float64).tolist()
    boxes: list[tuple[int, int, int, int] | None] = []
    for b in range(batch):
        box = None
        if done[b] < 0.6:
            for k in range(10):
                area = (0.02 + (1 / 3 - 0.02) * tries[0][b][k]) * height * width
                aspect = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * tries[1][b][k])
                h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if w < width and h < height:
                    box = (int(y_draw[b] * (height - h + 1)), int(x_draw[b] * (width - w + 1)), h, w)
                    break
        boxes.append(box)
    noise = torch.randn(sum(3 * box[2] * box[3] for box in boxes if box), generator=g)
    used = 0
    for b, box in enumerate(boxes):
        expected = x[b].clone()
        if box:
            top, left, h, w = box
            expected[:, top : top + h, left : left + w] = noise[used : used + 3 * h * w].view(3, h, w)
            used += 3 * h * w
        assert torch.equal(got[b], expected)
    assert 20 < sum(box is not None for box in boxes) < 55


def test_random_erasing_has_timms_share() -> None:
    x = torch.full((2000, 1, 24, 24), 100.0)
    random.seed(0)
    torch.manual_seed(0)
    reference = RandomErasing(probability=0.25, mode="pixel", device="cpu")(x.clone())
    got = random_erasing(x, 0.25, generator(14))
    mine, timms = ((y != 100).flatten(1).float().mean(1) for y in (got, reference))
    assert abs((mine > 0).float().mean() - 0.25) < 0.04
    assert abs(mine[mine > 0].mean() - timms[timms > 0].mean()) < 0.02
    assert abs(got[got != 100].mean()) < 0.02 and abs(got[got != 100].std() - 1) < 0.02
    x = torch.zeros(50, 3, 16, 16)
    assert torch.equal(random_erasing(x, 0.0, generator(15)), x)
    assert (random_erasing(x, 1.0, generator(15)) != 0).flatten(1).any(1).all()


def test_global_random_state_is_left_alone() -> None:
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    images = byte_images(16, 48, 48)
    for strong in STRONG:
        clean, _ = clean_view(images, DATA, 48, generator(16))
        student_view(images, clean, DATA, DualViewsConfig(geometry="independent", strong=strong), generator(17))
        assert torch.equal(torch.get_rng_state(), states[0]), strong
        assert random.getstate() == states[1] and str(np.random.get_state()) == states[2], strong


def test_autocast_does_not_touch_the_pixels() -> None:
    images = byte_images(4, 48, 48)
    plain, _ = clean_view(images, DATA, 48, generator(18))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = clean_view(images, DATA, 48, generator(18))
    assert torch.equal(plain, cast)
