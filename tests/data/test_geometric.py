import math
import random
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment as timm_ops
from torch import Tensor

from basd.data.geometric import (
    FULL_OPERATIONS,
    GEOMETRIC_OPERATIONS,
    GREY,
    affine,
    affine_matrices,
    rand_augment_full,
)
from basd.data.photometric import OPERATIONS, apply_operations_, operation_arguments, rand_augment

FILL = (10, 200, 90)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(got: Tensor, expected: Tensor, case: str, atol: float) -> None:
    torch.testing.assert_close(got, expected, atol=atol, rtol=0, msg=lambda said: f"{case}: {said}")


def matrix_of(name: str, level: float, negate: bool, height: int, width: int) -> Tensor:
    operation = torch.tensor([GEOMETRIC_OPERATIONS.index(name)])
    return affine_matrices(operation, torch.tensor([level], dtype=torch.float64), torch.tensor([negate]), height, width)


def timms(
    image: Tensor, name: str, level: float, negate: bool, resample: Any, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """timm's operation on one image uint8 (3,H,W)."""
    hparams = {"img_mean": FILL, "interpolation": resample}
    operation = timm_ops.AugmentOp(name, prob=1.0, magnitude=level, hparams=hparams)
    monkeypatch.setattr(random, "random", lambda: 0.9 if negate else 0.1)
    moved = operation(Image.fromarray(image.permute(1, 2, 0).numpy()))
    return torch.from_numpy(np.array(moved)).permute(2, 0, 1)


def smooth_images(height: int, width: int) -> Tensor:
    """Two slow waves: uint8 (2,3,height,width)."""
    y = torch.arange(height).view(-1, 1) / height
    x = torch.arange(width) / width
    waves = [torch.sin(3 * x + 2 * y + phase) * 100 + 120 for phase in range(6)]
    return torch.stack(waves).view(2, 3, height, width).round().to(torch.uint8)


def test_the_set_is_timms() -> None:
    def plain(name: str) -> str:
        return name.removesuffix("Increasing")

    assert sorted(FULL_OPERATIONS) == sorted(plain(name) for name in timm_ops._RAND_INCREASING_TRANSFORMS)
    assert pytest.approx([value * 255 for value in GREY]) == timm_ops._FILL


def test_operations_are_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    """On noise, in both directions, on images that are not square: equal but for Pillow's truncation."""
    sizes = [(24, 20), (17, 31)]
    levels = [0.0, 0.7, 5.3, 9.0, 10.0]
    for name, level, negate, (height, width) in product(GEOMETRIC_OPERATIONS, levels, [False, True], sizes):
        images = torch.randint(0, 256, (2, 3, height, width), generator=generator(0), dtype=torch.uint8)
        matrices = matrix_of(name, level, negate, height, width).expand(2, 2, 3)
        got = affine(images.float() / 255, matrices, [value / 255 for value in FILL]) * 255
        for image, mine in zip(images, got, strict=True):
            difference = mine - timms(image, name, level, negate, Image.Resampling.BILINEAR, monkeypatch)
            assert difference.min() > -0.01 and difference.max() < 1.01, (name, level, negate, height, width)


def test_bicubic_differs_little_on_smooth_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm draws bilinear or bicubic; where pixels come from is the same for both."""
    images = smooth_images(32, 40)
    for name in GEOMETRIC_OPERATIONS:
        got = affine(images.float() / 255, matrix_of(name, 9.0, True, 32, 40).expand(2, 2, 3), [v / 255 for v in FILL])
        for image, mine in zip(images, got, strict=True):
            expected = timms(image, name, 9.0, True, Image.Resampling.BICUBIC, monkeypatch)
            assert (mine * 255 - expected).abs().max() < 3, name


def test_affine_against_a_loop() -> None:
    """Each image with its own matrix, in float64 and with nothing but arithmetic."""
    height, width = 7, 10
    images = torch.rand(6, 3, height, width, generator=generator(1))
    matrices = torch.eye(2, 3, dtype=torch.float64) + 0.4 * torch.randn(
        6, 2, 3, generator=generator(2), dtype=torch.float64
    )
    got = affine(images, matrices, [0.1, 0.2, 0.3])
    outside = 0
    for n in range(6):
        for i in range(height):
            for j in range(width):
                x, y = (matrices[n] @ torch.tensor([j + 0.5, i + 0.5, 1.0], dtype=torch.float64)).tolist()
                if not (0 <= x < width and 0 <= y < height):
                    outside += 1
                    assert torch.equal(got[n, :, i, j], torch.tensor([0.1, 0.2, 0.3]))
                    continue
                left, top = math.floor(x - 0.5), math.floor(y - 0.5)
                value = torch.zeros(3)
                for row, row_share in ((top, top + 1.5 - y), (top + 1, y - 0.5 - top)):
                    for column, column_share in ((left, left + 1.5 - x), (left + 1, x - 0.5 - left)):
                        pixel = images[n, :, min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
                        value += row_share * column_share * pixel
                torch.testing.assert_close(got[n, :, i, j], value, atol=1e-5, rtol=0)
    assert 20 < outside < 400


def test_level_zero_moves_nothing_and_signs_undo_each_other() -> None:
    operation = torch.arange(5)
    still = affine_matrices(operation, torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.bool), 9, 12)
    torch.testing.assert_close(still, torch.eye(2, 3, dtype=torch.float64).expand(5, 2, 3))
    images = torch.rand(5, 3, 9, 12, generator=generator(3))
    torch.testing.assert_close(affine(images, still, GREY), images, atol=1e-5, rtol=0)
    bottom = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64).expand(5, 1, 3)
    there, back = (
        torch.cat(
            (affine_matrices(operation, torch.full((5,), 8.1).double(), torch.full((5,), sign), 9, 12), bottom), 1
        )
        for sign in (False, True)
    )
    torch.testing.assert_close(there @ back, torch.eye(3, dtype=torch.float64).expand(5, 3, 3))
    assert ((there - torch.eye(3)).flatten(1).norm(dim=1) > 0.2).all()


def one_image_at_a_time(x: Tensor, seed: int, num_ops: int, probability: float, fill: tuple[float, ...]) -> Tensor:
    """`rand_augment_full` from the same random numbers, in the plainest form."""
    batch, _, height, width = x.shape
    g = generator(seed)
    operation = torch.randint(15, (num_ops, batch), generator=g)
    done = torch.rand(num_ops, batch, generator=g)
    noise = torch.randn(num_ops, batch, generator=g, dtype=torch.float64)
    sign = torch.rand(num_ops, batch, generator=g)
    result = x.clone()
    for i in range(batch):
        for layer in range(num_ops):
            if done[layer, i] >= probability:
                continue
            level = min(max(9 + 0.5 * noise[layer, i].item(), 0), 10)
            negate = bool(sign[layer, i] < 0.5)
            name = FULL_OPERATIONS[int(operation[layer, i])]
            image = result[i : i + 1]
            if name in GEOMETRIC_OPERATIONS:
                result[i : i + 1] = affine(image, matrix_of(name, level, negate, height, width), fill)
            else:
                which = torch.tensor([OPERATIONS.index(name)])
                argument = operation_arguments(
                    which, torch.tensor([level], dtype=torch.float64), torch.tensor([negate])
                )
                result[i : i + 1] = apply_operations_(image.clone(), which, argument)
    return result


def test_rand_augment_full_against_a_loop() -> None:
    x = torch.rand(60, 3, 12, 15, generator=generator(4))
    before, fill = x.clone(), (0.3, 0.6, 0.9)
    for num_ops, probability in [(2, 0.5), (3, 1.0), (1, 0.0)]:
        got = rand_augment_full(x, num_ops, 9, 0.5, probability, fill, generator(5))
        case = f"{num_ops} operations with probability {probability}"
        # an image in 256 levels may round to the other side of a half
        close(got, one_image_at_a_time(x, 5, num_ops, probability, fill), case, atol=1e-4)
        assert torch.equal(x, before) and got.min() >= 0 and got.max() <= 1, case
        assert torch.equal(got, rand_augment_full(x, num_ops, 9, 0.5, probability, fill, generator(5))), case
        assert torch.equal(got, x) == (probability == 0), case


def test_share_of_misplaced_views() -> None:
    """2 operations, each with probability 1/2, 5 of 15 of them geometric: 1 − (1 − 1/6)² = 30.6 %, as in timm.

    A flat image stays flat under photometric operations and shows the colour of the fill under geometric ones.
    """
    expected = 1 - (1 - 0.5 * 5 / 15) ** 2
    assert expected == pytest.approx(0.306, abs=5e-4)

    def within_sampling_error(moved: int, n: int) -> bool:
        return abs(moved / n - expected) < 4 * math.sqrt(expected * (1 - expected) / n)

    def moved(images: Tensor) -> int:
        flat = images.flatten(2)
        return int((flat.amax(2) - flat.amin(2) > 1e-3).any(1).sum())

    n = 20_000
    flat = torch.full((n, 3, 8, 8), 51 / 255)
    assert within_sampling_error(moved(rand_augment_full(flat, 2, 9, 0.5, 0.5, GREY, generator(6))), n)
    assert moved(rand_augment(flat[:2000], 2, 9, 0.5, 0.5, generator(6))) == 0
    random.seed(0)
    np.random.seed(0)
    # without noise: at level 10 timm keeps 0 bits, which Pillow refuses
    reference = timm_ops.rand_augment_transform("rand-m9-inc1", {})
    image = Image.new("RGB", (8, 8), (51, 51, 51))
    timm_n = 3000
    timm_moved = sum(len(reference(image).getcolors()) > 1 for _ in range(timm_n))
    assert within_sampling_error(timm_moved, timm_n)


def test_every_operation_is_equally_likely() -> None:
    """The image differs after each of the 15 operations, so the result shows which one was drawn."""
    image = (torch.randint(20, 200, (1, 3, 9, 9), generator=generator(7)) // 2).float() / 255
    level, yes, n = torch.tensor([9.0], dtype=torch.float64), torch.tensor([True]), 6000
    outcomes: list[Tensor] = []
    for which in range(15):
        for negate in (~yes, yes):
            if which < 10:
                argument = operation_arguments(torch.tensor([which]), level, negate)
                outcomes.append(apply_operations_(image.clone(), torch.tensor([which]), argument))
            else:
                outcomes.append(affine(image, affine_matrices(torch.tensor([which - 10]), level, negate, 9, 9), GREY))
    known = torch.cat(outcomes).flatten(1)
    got = rand_augment_full(image.expand(n, -1, -1, -1), 1, 9, 0.0, 1.0, GREY, generator(8)).flatten(1)
    distance, nearest = torch.cdist(got, known, p=float("inf")).min(dim=1)
    assert distance.max() < 1e-4
    counts = torch.bincount(nearest // 2, minlength=15)
    assert (counts - n / 15).abs().max() < 4.5 * math.sqrt(n / 15)


def test_draws_as_much_as_rand_augment() -> None:
    """Rows of a table that differ only in the kind of RandAugment see the same random numbers afterwards."""
    x = torch.rand(11, 3, 6, 6, generator=generator(9))
    mine, other = generator(10), generator(10)
    rand_augment_full(x, 2, 9, 0.5, 0.5, GREY, mine)
    rand_augment(x, 2, 9, 0.5, 0.5, other)
    assert torch.equal(mine.get_state(), other.get_state())


def test_autocast_does_not_touch_the_pixels() -> None:
    x = torch.rand(24, 3, 20, 20, generator=generator(11))
    call: Callable[[], Tensor] = partial(rand_augment_full, x, 2, 9, 0.5, 1.0, GREY)
    plain = call(generator=generator(12))  # type: ignore[call-arg]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = call(generator=generator(12))  # type: ignore[call-arg]
    assert cast.dtype == torch.float32 and torch.equal(plain, cast)
