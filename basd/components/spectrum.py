"""Fourier helpers shared by the selector's descriptors and the spectral loss."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# Tokens from which on an FFT over strided axes is faster on a CPU than one product with the whole basis.
LARGE_GRID = 192


@lru_cache(maxsize=32)
def column_multiplicity(width: int) -> Tensor:
    """How often each of rfft's `width//2+1` columns stands in the full spectrum: [1,2,…,2,1] (even) or [1,2,…,2]."""
    weight = torch.full((width // 2 + 1,), 2.0)
    weight[0] = 1.0
    if width % 2 == 0:
        weight[-1] = 1.0
    return weight


@lru_cache(maxsize=32)
def multiplicity(grid: tuple[int, int]) -> Tensor:
    """How often each bin of rfft2 stands in the full spectrum, (h·(w//2+1),); the sum is h·w."""
    return column_multiplicity(grid[1]).repeat(grid[0])


@lru_cache(maxsize=32)
def real_bins(grid: tuple[int, int]) -> Tensor:
    """Which bins of rfft2 are real for a real map: DC and Nyquist along both axes, bool (h·(w//2+1),)."""
    rows, columns = torch.arange(grid[0]), torch.arange(grid[1] // 2 + 1)
    # a bin is real where it is its own mirror image
    return ((2 * rows % grid[0] == 0)[:, None] & (2 * columns % grid[1] == 0)[None, :]).flatten()


@lru_cache(maxsize=32)
def channel_groups(channels: int, groups: int) -> Tensor:
    """Adaptive average pooling of channels as a matrix, (channels, groups).

    Group j is the mean of channels ⌊jC/G⌋ … ⌈(j+1)C/G⌉−1; groups share a channel where the numbers do not divide.
    """
    matrix = torch.zeros(channels, groups)
    for group in range(groups):
        start, end = group * channels // groups, -(-(group + 1) * channels // groups)
        matrix[start:end, group] = 1 / (end - start)
    return matrix


@lru_cache(maxsize=32)
def radii(grid: tuple[int, int]) -> Tensor:
    """Distance from DC of each bin of rfft2, in cycles per image, (h, w//2+1), float64."""
    rows = torch.fft.fftfreq(grid[0], dtype=torch.float64) * grid[0]
    columns = torch.fft.rfftfreq(grid[1], dtype=torch.float64) * grid[1]
    return (rows[:, None] ** 2 + columns[None, :] ** 2).sqrt()


def distinct_radii(grid: tuple[int, int]) -> int:
    """Number of different distances from DC on the grid."""
    squared = (radii(grid) ** 2).round().long()
    return int(squared.unique().numel())


def equal_width_bands(radius: Tensor, bands: int) -> Tensor:
    """Band index of each radius: `bands` bands equal in radius between 0 and the largest, DC in band 0."""
    largest = radius.max().clamp_min(1e-12)
    return (radius / largest * bands).floor().clamp_max(bands - 1).long()


@lru_cache(maxsize=32)
def fourier_basis(grid: tuple[int, int]) -> Tensor:
    """Real form of the orthonormal rfft2 of an h×w grid as a matrix, (2, h·(w//2+1), h·w): real and imaginary rows.

    On small grids one matrix product is several times faster than an FFT over strided axes.
    """
    height, width = grid
    points = torch.eye(height * width, dtype=torch.float64).view(-1, height, width)
    spectrum = torch.fft.rfft2(points, norm="ortho").flatten(1).T
    return torch.stack([spectrum.real, spectrum.imag]).float()


def spatial_spectrum(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Orthonormal rfft2 of token maps, (..., N, D) → real and imaginary parts (..., 2, h·(w//2+1), D)."""
    basis = fourier_basis(grid).to(tokens.device)
    assert tokens.shape[-2] == basis.shape[-1], f"{tokens.shape[-2]} tokens on a {grid[0]}x{grid[1]} grid"
    return (basis.flatten(0, 1) @ tokens).unflatten(-2, (2, -1))


def spatial_power(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """|rfft2|² of token maps, summed over channels, each bin times its multiplicity in the full spectrum.

    tokens (..., N, D) → (..., h·(w//2+1)). Parseval: the sum over bins is the sum of squares of the tokens.
    """
    if tokens.requires_grad and torch.is_grad_enabled():
        power = spatial_spectrum(tokens, grid).square().sum(dim=-1).sum(dim=-2)
    elif tokens.device.type == "cpu" and tokens.shape[-2] >= LARGE_GRID:
        spectrum = torch.fft.rfft2(tokens.unflatten(-2, grid), dim=(-3, -2), norm="ortho").flatten(-3, -2)
        power = torch.linalg.vector_norm(torch.view_as_real(spectrum).flatten(-2), dim=-1).square()
    else:
        # one pass without a second spectrum; its gradient would be 0/0 at an empty bin
        power = torch.linalg.vector_norm(spatial_spectrum(tokens, grid), dim=-1).square().sum(dim=-2)
    return power * multiplicity(grid).to(power)
