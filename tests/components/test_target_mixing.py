import pytest
import torch
from each import each
from torch import Tensor

from basd.components.target_mixing import mix_attention, mix_tokens
from basd.data.mixing import Mix

GRID, SIZE = (3, 4), 24  # patches of 8×6 pixels
ALIGNED = (8, 24, 6, 18)
CROSSING = (5, 17, 4, 15)


def cutmix(box: tuple[int, int, int, int]) -> Mix:
    y0, y1, x0, x1 = box
    return Mix("cutmix", 1 - (y1 - y0) * (x1 - x0) / SIZE**2, box)


def own_share(mix: Mix) -> Tensor:
    return 1 - mix.coverage(*GRID, SIZE, SIZE)


def tokens(batch: int = 3) -> Tensor:
    return torch.randn(2, batch, 12, 5, generator=torch.Generator().manual_seed(0))


def maps(batch: int = 3, gain: float = 2.0) -> Tensor:
    scores = gain * torch.randn(2, batch, 4, 13, 13, generator=torch.Generator().manual_seed(1))
    return scores.softmax(-1)


def counted_share(box: tuple[int, int, int, int]) -> list[float]:
    """Share of each patch outside of the box, by counting pixels."""
    y0, y1, x0, x1 = box
    shares = []
    for row in range(3):
        for column in range(4):
            pixels = [(y, x) for y in range(8 * row, 8 * row + 8) for x in range(6 * column, 6 * column + 6)]
            shares.append(sum(not (y0 <= y < y1 and x0 <= x < x1) for y, x in pixels) / len(pixels))
    return shares


def naive_attention(attention: Tensor, share: list[float], lam: float) -> Tensor:
    """The definition in the docstring of `mix_attention`, one row at a time, in float64."""
    attention = attention.double()
    _, batch, _, length, _ = attention.shape
    result = torch.zeros_like(attention)
    keys = {
        "own": torch.tensor([1.0, *share]).double(),
        "partner": torch.tensor([1.0, *[1 - s for s in share]]).double(),
    }
    for b in range(batch):
        for q in range(length):
            weight = lam if q == 0 else share[q - 1]
            for image, kind, w in ((b, "own", weight), (batch - 1 - b, "partner", 1 - weight)):
                row = attention[:, image, :, q] * keys[kind]
                mass = row.sum(-1, keepdim=True)
                row = torch.where(mass > 1e-12, row / mass.clamp_min(1e-300), attention[:, image, :, q])
                result[:, b, :, q] += w * row
    return result


@each("box", [ALIGNED, CROSSING, (0, 24, 0, 24), (3, 3, 2, 2)])
def test_share_is_what_the_patch_shows(box: tuple[int, int, int, int]) -> None:
    assert own_share(cutmix(box)).tolist() == pytest.approx(counted_share(box), abs=1e-6)


def test_mixup_is_convex() -> None:
    mix, t, a = Mix("mixup", 0.3), tokens(), maps()
    torch.testing.assert_close(mix_tokens(t, own_share(mix)), 0.3 * t + 0.7 * t.flip(1))
    mixed = mix_attention(a, own_share(mix), mix.lam, masked=False)
    torch.testing.assert_close(mixed, 0.3 * a + 0.7 * a.flip(1))


@each("box", [ALIGNED, CROSSING])
def test_cutmix_of_tokens_follows_coverage(box: tuple[int, int, int, int]) -> None:
    t, share = tokens(), counted_share(box)
    got = mix_tokens(t, own_share(cutmix(box)))
    for b in range(3):
        for n in range(12):
            torch.testing.assert_close(got[:, b, n], share[n] * t[:, b, n] + (1 - share[n]) * t[:, 2 - b, n])
    if box == ALIGNED:
        # the target of a patch is a token of the image that the patch shows
        image = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, SIZE, SIZE)
        shown = cutmix(box).mix_images(image).reshape(3, 3, 8, 4, 6)[:, :, 0, :, 0].flatten(1).long()
        assert all(torch.equal(got[:, b, n], t[:, shown[b, n], n]) for b in range(3) for n in range(12))


@each("box", [ALIGNED, CROSSING, (0, 24, 0, 24), (3, 3, 2, 2), (0, 8, 0, 24)])
@each("batch", [1, 2, 3])
def test_cutmix_of_attention_equals_loops(box: tuple[int, int, int, int], batch: int) -> None:
    mix, a = cutmix(box), maps(batch)
    got = mix_attention(a, own_share(mix), mix.lam, masked=True)
    expected = naive_attention(a, counted_share(box), mix.lam)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.sum(-1), torch.ones(got.shape[:-1]))


def test_aligned_box_of_attention() -> None:
    mix, a = cutmix(ALIGNED), maps()
    got = mix_attention(a, own_share(mix), mix.lam, masked=True)
    own = [s == 1 for s in counted_share(ALIGNED)]
    assert 0 < sum(own) < 12
    for b in range(3):
        for q in range(12):
            image = b if own[q] else 2 - b
            for k in range(12):
                if own[k] != own[q]:  # a patch does not look at the other image
                    assert not got[:, b, :, 1 + q, 1 + k].any()
            row = a[:, image, :, 1 + q].clone()
            row[..., [1 + k for k in range(12) if own[k] != own[q]]] = 0
            torch.testing.assert_close(got[:, b, :, 1 + q], row / row.sum(-1, keepdim=True), rtol=1e-5, atol=1e-6)
            assert (got[:, b, :, 1 + q, 0] >= a[:, image, :, 1 + q, 0] - 1e-6).all()  # the class key is kept
    everything = (a[:, :, :, 0, 1:] > 0).all() and (got[:, :, :, 0] > 0).all()
    assert everything  # the class token looks at both


def test_row_without_mass_keeps_its_unmasked_form() -> None:
    """A patch that looks only at patches the partner has covered."""
    a = maps()
    own = [s == 1 for s in counted_share(ALIGNED)]
    query, key = own.index(True), own.index(False)
    a[0, 0, 0, 1 + query] = 0
    a[0, 0, 0, 1 + query, 1 + key] = 1
    mix = cutmix(ALIGNED)
    got = mix_attention(a, own_share(mix), mix.lam, masked=True)
    assert torch.equal(got[0, 0, 0, 1 + query], a[0, 0, 0, 1 + query])
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.sum(-1), torch.ones(got.shape[:-1]))


@each("gain", [0.1, 10.0, 60.0])
def test_rows_always_sum_to_one(gain: float) -> None:
    a = maps(4, gain)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        (y0, y1), (x0, x1) = (torch.randint(0, 25, (2,), generator=generator).sort().values.tolist() for _ in range(2))
        mix = cutmix((y0, y1, x0, x1))
        got = mix_attention(a, own_share(mix), mix.lam, masked=True)
        torch.testing.assert_close(got.sum(-1), torch.ones(got.shape[:-1]), rtol=0, atol=1e-5)
        assert (got >= 0).all()
