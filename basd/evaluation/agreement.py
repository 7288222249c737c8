"""How far a student agrees with its teacher: between images (CKA), within an image (relations), in routing (attention).

M points are compared, each with one layer of the teacher, whose tokens and maps lie on the student's grid. All measures
are blind to rotations and scales of the feature space, so that widths may differ and nothing is learned to compare them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Images that the unbiased estimator needs at least.
LEAST_IMAGES = 4


def image_grams(tokens: Tensor) -> Tensor:
    """X Xᵀ of images, each the vector of all its tokens: tokens (M, B, N, D) → (M, B, B), float64 on the CPU.

    The images' mean is taken out first, which no measure made of it sees: what is left is what float32 can still tell apart.
    """
    flat = (tokens - tokens.mean(dim=1, keepdim=True)).flatten(2)
    return (flat @ flat.mT).cpu().double()


def unbiased_hsic(first: Tensor, second: Tensor) -> Tensor:
    """The unbiased estimate of HSIC of two Gram matrices of the same n ≥ 4 images: (..., n, n) twice → (...).

    HSIC₁ of Song et al. (2012, JMLR 13), with K and L without their diagonals:
    [tr(K L) + 1ᵀK1·1ᵀL1/((n−1)(n−2)) − 2/(n−2)·1ᵀK L 1] / (n(n−3)).
    """
    n = first.shape[-1]
    assert first.shape == second.shape and n >= LEAST_IMAGES, (first.shape, second.shape)
    others = 1 - torch.eye(n, dtype=first.dtype, device=first.device)
    first, second = first * others, second * others
    rows, other_rows = first.sum(dim=-1), second.sum(dim=-1)
    trace = (first * second).sum(dim=(-2, -1))
    means = rows.sum(dim=-1) * other_rows.sum(dim=-1) / ((n - 1) * (n - 2))
    cross = 2 / (n - 2) * (rows * other_rows).sum(dim=-1)
    return (trace + means - cross) / (n * (n - 3))


def hsic_triple(student: Tensor, teacher: Tensor) -> Tensor:
    """What `minibatch_cka` needs of one batch: HSIC of both, of the student, of the teacher; (M, B, B) twice → (M, 3)."""
    pairs = ((student, teacher), (student, student), (teacher, teacher))
    return torch.stack([unbiased_hsic(one, other) for one, other in pairs], dim=-1)


def minibatch_cka(triples: Tensor) -> Tensor:
    """Linear CKA of batches of images, (batches, M, 3) → (M,): 1 for equal geometry, 0 in expectation for unrelated.

    Kornblith et al. (2019, arXiv:1905.00414), equation 4, HSIC(K,L)/√(HSIC(K,K)·HSIC(L,L)), of the means over batches of the
    unbiased HSIC, as Nguyen et al. (2021, arXiv:2010.15327): batches of any size estimate the same. It compares how images
    differ from each other; what all images share at a position, such as its position embedding, does not count.
    """
    both, student, teacher = triples.mean(dim=0).unbind(dim=-1)
    return both / (student * teacher).sqrt()


def relations(tokens: Tensor) -> Tensor:
    """Cosines between the tokens of an image, its mean token taken out, without the diagonal: (M, B, N, D) → (M, B, N, N)."""
    unit = F.normalize(tokens - tokens.mean(dim=2, keepdim=True), dim=-1)
    similar = unit @ unit.mT
    similar.diagonal(dim1=-2, dim2=-1).zero_()
    return similar


def relation_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Cosine between two matrices of `relations`, (M, B, N, N) twice → (M, B): 1 where the same patches are alike.

    The within-image term of similarity-based distillation (Tung & Mori 2019, arXiv:1907.09682, on images) and of
    representational similarity (Kriegeskorte et al. 2008).
    """
    return F.cosine_similarity(student.flatten(2), teacher.flatten(2), dim=-1)


def attention_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher‖student) in nats a query row, mean over rows: probabilities (M, B, Q, K) twice → (M, B).

    The divergence that the attention loss minimises (`losses.attn`, there with the head aligner and in units of the teacher's
    own), of maps whose heads were averaged: so it is the same measure for arms that train no head aligner.
    """
    # a probability that underflowed to 0 is no infinite divergence
    logarithm = student.clamp_min(1e-30).log()
    return (torch.special.xlogy(teacher, teacher) - teacher * logarithm).sum(dim=-1).mean(dim=-1)
