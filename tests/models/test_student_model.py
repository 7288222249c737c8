import copy
import dataclasses
from itertools import product

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from basd.models.student import StudentConfig, TappedStudent, build_student, extraction_points

TINY = StudentConfig(image_size=24, patch_size=8, width=12, depth=4, heads=2)


def test_default_student_is_deit_tiny() -> None:
    student = build_student(StudentConfig(), 1000).eval()
    assert sum(p.numel() for p in student.parameters()) == 5_717_416
    other = timm.create_model("deit_tiny_patch16_224", pretrained=False).eval()
    x = torch.randn(1, 3, 224, 224)
    other.load_state_dict(student.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(student(x), other(x))
        fresh = build_student(StudentConfig(), 1000).eval()
        assert not torch.equal(fresh(x), other(x))
        fresh.load_state_dict(other.state_dict(), strict=True)
        assert torch.equal(fresh(x), other(x))
    epsilons = {m.eps for m in student.modules() if isinstance(m, torch.nn.LayerNorm)}
    assert epsilons == {1e-6}


def test_settings_reach_the_model() -> None:
    config = StudentConfig(
        image_size=24, patch_size=8, width=12, depth=4, heads=2, mlp_ratio=3.0, drop_path=0.3, points=2
    )
    student = build_student(config, 7)
    assert student.patch_embed.grid_size == (3, 3)
    assert student.head.out_features == 7
    assert len(student.blocks) == 4
    assert student.blocks[0].attn.num_heads == 2
    assert student.blocks[0].mlp.fc1.out_features == 36
    # stochastic depth grows linearly to its setting
    assert student.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert student.blocks[1].drop_path1.drop_prob == pytest.approx(0.1)


EXTRACTED: list[tuple[int | list[int], int, tuple[int, ...]]] = [
    (4, 12, (2, 5, 8, 11)),
    (1, 12, (11,)),
    (12, 12, tuple(range(12))),
    (4, 4, (0, 1, 2, 3)),
    (3, 4, (0, 2, 3)),
    (4, 6, (1, 2, 4, 5)),
    (4, 24, (5, 11, 17, 23)),
    ([1, 3], 4, (1, 3)),
]


def test_extraction_points() -> None:
    for points, depth, expected in EXTRACTED:
        assert extraction_points(points, depth) == expected, (points, depth)


def test_any_count_of_points_is_increasing_and_ends_at_the_last_block() -> None:
    for depth in range(1, 25):
        for count in range(1, depth + 1):
            points = extraction_points(count, depth)
            assert len(points) == count and points[-1] == depth - 1 and points[0] >= 0
            assert list(points) == sorted(set(points))


def test_tapped_student_reads_without_changing() -> None:
    for training in (True, False):
        torch.manual_seed(0)
        student = build_student(TINY, 5).train(training)
        plain, x = copy.deepcopy(student), torch.randn(3, 3, 24, 24)
        tapped = TappedStudent(student, (1, 3), attention=True)
        torch.manual_seed(1)
        out = tapped(x)
        torch.manual_seed(1)
        assert torch.equal(out.logits, plain(x)), f"training: {training}"
        assert out.tokens is not None and out.scores is not None
        assert out.tokens.shape == (2, 3, 9, 12) and out.scores.shape == (2, 3, 2, 10, 10)
        assert set(student.state_dict()) == set(plain.state_dict())


def test_tokens_and_scores_are_those_of_the_points() -> None:
    torch.manual_seed(0)
    student = build_student(TINY, 5).eval()
    x = torch.randn(2, 3, 24, 24)
    out = TappedStudent(student, (0, 2), attention=True)(x)
    hidden = student._pos_embed(student.patch_embed(x))
    for index, block in enumerate(student.blocks):
        normed = block.norm1(hidden)
        hidden = block(hidden)
        if index not in (0, 2):
            continue
        at = (0, 2).index(index)
        torch.testing.assert_close(out.tokens[at], hidden[:, 1:])  # type: ignore[index]
        qkv = block.attn.qkv(normed).reshape(2, 10, 3, 2, 6)
        for head in range(2):
            scores = qkv[:, :, 0, head] @ qkv[:, :, 1, head].transpose(1, 2) / 6**0.5
            torch.testing.assert_close(out.scores[at][:, head], scores, rtol=1e-4, atol=1e-5)  # type: ignore[index]


def test_gradients_flow_through_the_taps() -> None:
    student = build_student(TINY, 5)
    out = TappedStudent(student, (1,), attention=True)(torch.randn(2, 3, 24, 24))
    assert out.tokens is not None and out.scores is not None
    (out.tokens.square().mean() + out.scores.square().mean()).backward()
    assert student.blocks[1].attn.qkv.weight.grad is not None
    assert student.blocks[2].attn.qkv.weight.grad is None


def test_what_is_not_asked_for_is_not_read() -> None:
    student = build_student(TINY, 5)
    out = TappedStudent(student, (), attention=False)(torch.randn(2, 3, 24, 24))
    assert out.tokens is None and out.scores is None and out.cls is None and out.logits.shape == (2, 5)
    assert out.features is not None and out.features.shape == (2, 12)
    # no distillation token, no second head
    assert out.distillation_logits is None
    out = TappedStudent(student, (3,), attention=False)(torch.randn(2, 3, 24, 24))
    assert out.tokens is not None and out.scores is None


def test_registers_are_dropped_from_tokens_and_scores() -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=(8, 12), patch_size=4, num_classes=3, embed_dim=12, depth=2, num_heads=2, reg_tokens=2
    ).eval()
    out = TappedStudent(model, (1,), attention=True)(torch.randn(2, 3, 8, 12))
    assert out.tokens is not None and out.scores is not None
    assert out.tokens.shape == (1, 2, 6, 12)
    assert out.scores.shape == (1, 2, 2, 7, 7)


def test_class_token_and_features() -> None:
    """cls is the blocks' raw output; features are what the class head reads: the class token after the final norm."""
    for token, training in product([False, True], [False, True]):
        torch.manual_seed(0)
        student = build_student(dataclasses.replace(TINY, distillation_token=token, drop_path=0.0), 5).train(training)
        perturb(student)
        x = torch.randn(2, 3, 24, 24)
        out = TappedStudent(student, (0, 2), attention=False)(x)
        hidden = student._pos_embed(student.patch_embed(x))
        blocks = []
        for block in student.blocks:
            hidden = block(hidden)
            blocks.append(hidden)
        case = f"distillation token {token}, training {training}: "
        assert out.cls is not None and out.cls.shape == (2, 2, 12), case
        expected = torch.stack([blocks[0][:, 0], blocks[2][:, 0]])
        torch.testing.assert_close(out.cls, expected, msg=lambda said, case=case: case + said)
        torch.testing.assert_close(out.features, student.norm(hidden)[:, 0], msg=lambda said, case=case: case + said)


def test_features_have_gradients() -> None:
    student = build_student(TINY, 5)
    out = TappedStudent(student, (1,), attention=False)(torch.randn(2, 3, 24, 24))
    assert out.features is not None
    out.features.square().sum().backward()
    assert student.blocks[0].attn.qkv.weight.grad is not None and student.head.weight.grad is None


# -- distillation token ------------------------------------------------------------------------------------------------

DISTILLED = dataclasses.replace(TINY, distillation_token=True, drop_path=0.0)


def perturb(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def test_distilled_student_is_timms() -> None:
    student = build_student(StudentConfig(distillation_token=True), 1000).eval()
    # the token, its position and a second head
    assert sum(p.numel() for p in student.parameters()) == 5_717_416 + 192 + 192 + 193_000
    other = timm.create_model("deit_tiny_distilled_patch16_224", pretrained=False).eval()
    other.load_state_dict(student.state_dict(), strict=True)
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(student(x), other(x))


def test_students_with_and_without_the_token_start_alike() -> None:
    def start(config: StudentConfig) -> dict[str, torch.Tensor]:
        torch.manual_seed(7)
        return build_student(config, 5).state_dict()

    plain, distilled = start(TINY), start(DISTILLED)
    positions, longer = plain.pop("pos_embed"), distilled.pop("pos_embed")
    assert torch.equal(longer[:, [0, *range(2, 11)]], positions)
    assert all(torch.equal(distilled[name], value) for name, value in plain.items())
    assert set(distilled) - set(plain) == {"dist_token", "head_dist.weight", "head_dist.bias"}
    # timm's start: normal, cut off, of standard deviation 0.02, and no bias
    for value in (longer[:, 1], distilled["dist_token"], distilled["head_dist.weight"]):
        assert 0.01 < value.std() < 0.03
    assert not distilled["head_dist.bias"].any()
    assert not torch.equal(distilled["head_dist.weight"], plain["head.weight"])
    again = start(DISTILLED)
    assert torch.equal(again["dist_token"], distilled["dist_token"])


def test_both_heads_in_training_and_their_mean_in_evaluation() -> None:
    torch.manual_seed(0)
    student = build_student(DISTILLED, 5)
    perturb(student)
    tapped, x = TappedStudent(student, (1,), attention=False), torch.randn(3, 3, 24, 24)
    plain = copy.deepcopy(student)
    out = tapped(x)
    final = plain.forward_features(x)
    by_class = final[:, 0] @ plain.head.weight.T + plain.head.bias
    by_distillation = final[:, 1] @ plain.head_dist.weight.T + plain.head_dist.bias
    assert out.distillation_logits is not None
    torch.testing.assert_close(out.logits, by_class)
    torch.testing.assert_close(out.distillation_logits, by_distillation)
    assert (out.logits - out.distillation_logits).abs().max() > 0.1
    pair = plain(x)
    assert torch.equal(out.logits, pair[0]) and torch.equal(out.distillation_logits, pair[1])
    student.eval(), plain.eval()
    mean = tapped(x)
    torch.testing.assert_close(mean.logits, (by_class + by_distillation) / 2)
    assert torch.equal(mean.logits, plain(x)) and mean.distillation_logits is None


def test_the_distillation_token_is_dropped_from_tokens_and_scores() -> None:
    torch.manual_seed(0)
    student = build_student(DISTILLED, 5).eval()
    perturb(student)
    x = torch.randn(2, 3, 24, 24)
    out = TappedStudent(student, (1, 3), attention=True)(x)
    assert out.tokens is not None and out.scores is not None
    assert out.tokens.shape == (2, 2, 9, 12) and out.scores.shape == (2, 2, 2, 10, 10)
    hidden = student._pos_embed(student.patch_embed(x))
    keep = [0, *range(2, 11)]
    for index, block in enumerate(student.blocks):
        qkv = block.attn.qkv(block.norm1(hidden)).reshape(2, 11, 3, 2, 6)
        hidden = block(hidden)
        if index not in (1, 3):
            continue
        at = (1, 3).index(index)
        torch.testing.assert_close(out.tokens[at], hidden[:, 2:])
        for head in range(2):
            scores = qkv[:, :, 0, head] @ qkv[:, :, 1, head].transpose(1, 2) / 6**0.5
            torch.testing.assert_close(out.scores[at][:, head], scores[:, keep][:, :, keep], rtol=1e-4, atol=1e-5)


def test_each_head_trains_its_own_token() -> None:
    student = build_student(DISTILLED, 5)
    out = TappedStudent(student, (), attention=False)(torch.randn(2, 3, 24, 24))
    assert out.distillation_logits is not None
    out.distillation_logits.square().sum().backward()
    assert student.head_dist.weight.grad is not None and student.head.weight.grad is None
    assert student.dist_token.grad is not None
