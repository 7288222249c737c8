"""adaptive_spectral: teacher layers are chosen by how their spectra match the student's at a point."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from basd.components.selectors.depth import gaussian_prior
from basd.components.selectors.learned import LearnedSelectorConfig
from basd.components.sizes import Sizes
from basd.components.spectrum import column_multiplicity, distinct_radii, equal_width_bands, radii, spatial_power
from basd.distributed import average
from basd.models.teacher import TeacherOutput

LOG_FLOOR = 1e-6
KEY_WIDTH = 32


@dataclass
class AdaptiveSpectralConfig(LearnedSelectorConfig):
    name: str = "adaptive_spectral"

    def build(self, sizes: Sizes) -> nn.Module:
        return AdaptiveSpectralSelector(self, sizes)


def band_count(student_grid: tuple[int, int], teacher_grid: tuple[int, int]) -> int:
    """Radial bands, the same number for both sides: min(8, distinct radii of either grid)."""
    return min(8, distinct_radii(student_grid), distinct_radii(teacher_grid))


def spectral_descriptor(tokens: Tensor, grid: tuple[int, int], bands: int) -> Tensor:
    """Descriptor of token maps, averaged over the batch of all processes. tokens (K, B, N, D) → (K, 2·bands + 2).

    Log shares (+1e-6) of `bands` radial bands of |rfft2|² over the grid, of as many bands of |rfft|² along the channels,
    spatial spectral entropy in [0, 1], log intensity (mean square of the tokens). All float32.
    """
    tokens = tokens.float()
    power = spatial_power(tokens, grid)
    band = equal_width_bands(radii(grid), bands).flatten().to(power.device)
    spatial_shares = _band_shares(power, band, bands)

    channel = torch.view_as_real(torch.fft.rfft(tokens, dim=-1, norm="ortho")).square()
    # over the tokens first: a sum along memory of pairs is several times slower
    channel = channel.sum(dim=-3).sum(dim=-1)
    channel = channel * column_multiplicity(tokens.shape[-1]).to(channel)
    frequency = torch.arange(channel.shape[-1], dtype=torch.float64)
    channel_shares = _band_shares(channel, equal_width_bands(frequency, bands).to(channel.device), bands)

    total = power.sum(dim=-1)
    share = power / total.clamp_min(1e-20).unsqueeze(-1)
    # a bin that stands for two of the full spectrum holds the power of both
    multiplicity = column_multiplicity(grid[1]).to(share).repeat(grid[0])
    entropy = -torch.special.xlogy(share, share / multiplicity).sum(dim=-1) / math.log(max(2, grid[0] * grid[1]))
    intensity = (total / tokens[0, 0].numel() + 1e-12).log()
    parts = [
        (spatial_shares + LOG_FLOOR).log(),
        (channel_shares + LOG_FLOOR).log(),
        entropy.unsqueeze(-1),
        intensity.unsqueeze(-1),
    ]
    return average(torch.cat(parts, dim=-1).mean(dim=1))[0]


def _band_shares(power: Tensor, band: Tensor, bands: int) -> Tensor:
    """power (K, B, F) and the band of each bin (F,) → (K, B, bands), sums to 1."""
    total = power.new_zeros(*power.shape[:-1], bands).index_add_(-1, band, power)
    return total / total.sum(dim=-1, keepdim=True).clamp_min(1e-20)


def teacher_descriptors(teacher: TeacherOutput, bands: int) -> Tensor:
    """Descriptors of the teacher's layers, (L, 2·bands + 2), computed once for the arms of a cohort."""
    return teacher.shared(("descriptor", bands), lambda: spectral_descriptor(teacher.tokens, teacher.grid, bands))


class AdaptiveSpectralSelector(nn.Module):
    """z_{m,l} = bias_{m,l} + ⟨W_q LN(d^s_m), W_k LN(d^t_l − mean_l d^t)⟩/√32; α = softmax(z/τ) over layers.

    W_q starts at zero and the bias as a Gaussian prior at proportional depth (standard deviation L/M layers), so the
    start is a soft "forward" mapping. Student descriptors are detached.
    """

    def __init__(self, config: AdaptiveSpectralConfig, sizes: Sizes) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.student_grid = sizes.student_grid
        self.bands = band_count(sizes.student_grid, sizes.teacher_grid)
        width = 2 * self.bands + 2
        self.student_norm = nn.LayerNorm(width)
        # a bias would add the same to every layer's logit, which the softmax does not see
        self.teacher_norm = nn.LayerNorm(width, bias=False)
        self.query = nn.Linear(width, KEY_WIDTH, bias=False)
        self.key = nn.Linear(width, KEY_WIDTH, bias=False)
        nn.init.zeros_(self.query.weight)
        self.bias = nn.Parameter(gaussian_prior(sizes))

    def forward(self, student: Tensor, teacher: TeacherOutput) -> Tensor:
        """student (M, B, N, D_s) tokens at the points. Returns α (M, L), rows sum to 1."""
        own = spectral_descriptor(student.detach(), self.student_grid, self.bands)
        layers = teacher_descriptors(teacher, self.bands)
        queries = self.query(self.student_norm(own))
        keys = self.key(self.teacher_norm(layers - layers.mean(dim=0)))
        logits = self.bias + queries @ keys.T / math.sqrt(KEY_WIDTH)
        return (logits / self.temperature).softmax(dim=-1)


def normalized_entropy(alpha: Tensor) -> Tensor:
    """Entropy of each row of α over log L, in [0, 1]: (M, L) → (M,)."""
    if alpha.shape[-1] == 1:
        return alpha.new_zeros(alpha.shape[0])
    # a share that underflowed to 0 would have the gradient 0/0
    positive = alpha.clamp_min(torch.finfo(alpha.dtype).tiny)
    return -torch.special.xlogy(alpha, positive).sum(dim=-1) / math.log(alpha.shape[-1])
