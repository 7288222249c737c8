import pytest
import torch
import torch.nn.functional as F

from basd.components.head_aligners import HEAD_ALIGNERS
from basd.components.sizes import Sizes


def sizes(student_heads: int, teacher_heads: int) -> Sizes:
    return Sizes(
        points=(0, 2, 3),
        image_size=24,
        student_depth=4,
        student_width=12,
        student_heads=student_heads,
        student_grid=(2, 3),
        teacher_depth=3,
        teacher_width=24,
        teacher_heads=teacher_heads,
        teacher_grid=(4, 3),
        total_steps=10,
    )


@pytest.mark.parametrize("student_heads, teacher_heads", [(3, 6), (2, 5), (4, 1), (3, 3)])
def test_conv_is_a_convolution_over_heads_before_the_softmax(student_heads: int, teacher_heads: int) -> None:
    torch.manual_seed(0)
    aligner = HEAD_ALIGNERS["conv"]().build(sizes(student_heads, teacher_heads))
    parameters = list(aligner.parameters())
    weight = torch.cat([p.reshape(-1, teacher_heads, student_heads) for p in parameters])
    assert sum(p.numel() for p in parameters) == 3 * teacher_heads * student_heads  # no bias
    scores = 2 * torch.randn(3, 2, student_heads, 7, 7)
    got = aligner(scores)
    for m in range(3):
        mixed = F.conv2d(scores[m], weight[m, :, :, None, None])
        torch.testing.assert_close(got[m], mixed.log_softmax(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(3, 2, teacher_heads, 7))


def test_conv_starts_different_and_learns() -> None:
    torch.manual_seed(0)
    aligner = HEAD_ALIGNERS["conv"]().build(sizes(3, 6))
    scores = torch.randn(3, 2, 3, 7, 7, requires_grad=True)
    out = aligner(scores)
    heads = out.detach().transpose(1, 2).flatten(2)
    for m in range(3):
        assert len(heads[m].unique(dim=0)) == 6  # no two teacher heads start alike
    (out * torch.randn_like(out)).sum().backward()
    assert scores.grad is not None and scores.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in aligner.parameters())


def test_none_is_the_identity() -> None:
    aligner = HEAD_ALIGNERS["none"]().build(sizes(3, 3))
    scores = torch.randn(3, 2, 3, 7, 7)
    assert torch.equal(aligner(scores), scores.log_softmax(-1))
    assert not list(aligner.parameters())
