"""Shift consistency against a loop; it is 1 for a model that shifts do not change."""

from __future__ import annotations

import pytest
import torch

from basd.evaluation.shifts import shift_consistency, shift_offsets, shifted


def answers(model, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    moved = [model(shifted(images, offset)) for offset in shift_offsets(images.shape[-1])]
    return model(images), torch.stack(moved, dim=1)


def test_against_a_loop() -> None:
    images = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(3 * 8 * 8, 4, generator=torch.Generator().manual_seed(1))
    logits, moved = answers(lambda x: x.flatten(1) @ weight, images)
    same = 0
    for image in range(20):
        for rows, columns in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            other = torch.empty_like(images[image])
            for row in range(8):
                for column in range(8):
                    other[:, (row + rows) % 8, (column + columns) % 8] = images[image, :, row, column]
            same += int((other.flatten() @ weight).argmax() == logits[image].argmax())
    assert shift_consistency(logits, moved) == pytest.approx(same / 80) and 0 < same < 80


def test_a_model_without_places_is_consistent() -> None:
    # whole numbers: the sum does not depend on the order
    images = torch.randint(256, (30, 3, 40, 40), generator=torch.Generator().manual_seed(0)).float()
    assert shift_consistency(*answers(lambda x: x.sum(dim=(2, 3)), images)) == 1


def test_shifts_are_less_than_a_patch() -> None:
    assert shift_offsets(224) == ((7, 0), (-7, 0), (0, 7), (0, -7))
    assert [shift_offsets(size)[0][0] for size in (8, 40, 64)] == [1, 1, 2]
