"""Agreement with the teacher against textbook formulas in NumPy, and its invariances."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from basd.evaluation.agreement import (
    attention_divergence,
    hsic_triple,
    image_grams,
    minibatch_cka,
    relation_cosine,
    relations,
    unbiased_hsic,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cka(student: Tensor, teacher: Tensor, batch: int | None = None) -> Tensor:
    """(M, B, N, D) each."""
    pairs = zip(student.split(batch or student.shape[1], 1), teacher.split(batch or teacher.shape[1], 1), strict=True)
    return minibatch_cka(torch.stack([hsic_triple(image_grams(one), image_grams(other)) for one, other in pairs]))


def hsic_by_definition(one: np.ndarray, other: np.ndarray) -> float:
    """E[k_ij l_ij] + E[k_ij]·E[l_qr] − 2·E[k_ij l_iq] over all tuples of different indices: the U-statistic."""
    n = len(one)
    pairs = list(itertools.permutations(range(n), 2))
    triples = list(itertools.permutations(range(n), 3))
    quadruples = list(itertools.permutations(range(n), 4))
    first = np.mean([one[i, j] * other[i, j] for i, j in pairs])
    second = np.mean([one[i, j] * other[q, r] for i, j, q, r in quadruples])
    third = np.mean([one[i, j] * other[i, q] for i, j, q in triples])
    return float(first + second - 2 * third)


def test_hsic_is_the_u_statistic() -> None:
    x, y = random(6, 3).double(), random(6, 4, seed=1).double()
    one, other = x @ x.T, y @ y.T
    found = float(unbiased_hsic(one, other))
    assert found == pytest.approx(hsic_by_definition(one.numpy(), other.numpy()), rel=1e-9)
    # a common offset of the features has no effect
    moved = (x + 3) @ (x + 3).T
    assert float(unbiased_hsic(moved, other)) == pytest.approx(found, rel=1e-9)


def test_cka_is_invariant_to_rotation_scale_and_what_all_images_share() -> None:
    student, teacher = random(2, 12, 9, 5), random(2, 12, 9, 7, seed=1)
    plain = cka(student, teacher)
    rotation = torch.linalg.qr(random(5, 5, seed=2))[0]
    position = random(2, 1, 9, 5, seed=3)
    torch.testing.assert_close(cka(-3 * student @ rotation + position, teacher), plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cka(student, 0.01 * student @ rotation), torch.ones(2).double(), rtol=1e-5, atol=1e-5)


def test_cka_of_unrelated_images_is_zero_for_batches_of_any_size() -> None:
    """The biased estimate of so few images in so many dimensions would be near 1."""
    values = [
        cka(random(8, 64, 4, 50, seed=seed), random(8, 64, 4, 50, seed=100 + seed), batch).mean().item()
        for seed, batch in itertools.product(range(3), (8, 16, 64))
    ]
    assert max(map(abs, values)) < 0.05
    related = random(8, 64, 4, 50)
    noisy = related + random(8, 64, 4, 50, seed=9)
    of_sizes = [cka(related, noisy, batch).mean().item() for batch in (8, 16, 64)]
    # noise as strong as the signal halves it, for batches of any size
    assert of_sizes == pytest.approx([0.5] * 3, abs=0.05)


def test_relations_against_a_loop() -> None:
    student, teacher = random(2, 3, 6, 4), random(2, 3, 6, 8, seed=1)
    got = relation_cosine(relations(student), relations(teacher))

    def similar(tokens: np.ndarray) -> list[float]:
        centred = tokens - tokens.mean(axis=0)
        cosine = [
            float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in itertools.permutations(list(centred), 2)
        ]
        return cosine

    for point, image in itertools.product(range(2), range(3)):
        one, other = (np.array(similar(side[point, image].double().numpy())) for side in (student, teacher))
        expected = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        assert float(got[point, image]) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    rotated = 2 * student @ torch.linalg.qr(random(4, 4, seed=2))[0] + random(4, seed=3)
    torch.testing.assert_close(relation_cosine(relations(student), relations(rotated)), torch.ones(2, 3))


def test_attention_divergence_against_a_loop() -> None:
    student, teacher = random(2, 3, 4, 4).softmax(-1), random(2, 3, 4, 4, seed=1).softmax(-1)
    got = attention_divergence(student, teacher)
    for point, image in itertools.product(range(2), range(3)):
        rows = zip(teacher[point, image].tolist(), student[point, image].tolist(), strict=True)
        expected = sum(t * math.log(t / s) for row, other in rows for t, s in zip(row, other, strict=True)) / 4
        assert float(got[point, image]) == pytest.approx(expected, rel=1e-4)
    assert float(attention_divergence(teacher, teacher).abs().max()) < 1e-6
    uniform = torch.full((1, 1, 1, 4), 0.25)
    sure = torch.tensor([1.0, 0, 0, 0]).view(1, 1, 1, 4)
    assert float(attention_divergence(uniform, sure)) == pytest.approx(math.log(4))
    assert math.isfinite(float(attention_divergence(sure, uniform)))
