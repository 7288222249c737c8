import dataclasses
import itertools
import random
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from each import each
from objective_fakes import (
    BATCH,
    CLASSES,
    CUTMIX,
    LOSSES,
    MIXES,
    POINTS,
    TOKEN_LOSSES,
    Calls,
    build_student,
    build_teacher,
    data,
    generator,
    make,
    numbers,
    perturb,
    run,
    sizes,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from basd.components.comparison import Bridges, Comparison, image_parts
from basd.components.head_aligners import HEAD_ALIGNERS
from basd.components.head_aligners.mean import MeanHeadAligner
from basd.components.selectors import SELECTORS
from basd.components.target_mixing import mix_attention, mix_tokens
from basd.components.token_aligners import TOKEN_ALIGNERS
from basd.components.warmup import WARMUPS
from basd.components.weighting import WEIGHTINGS
from basd.data.mixing import Mix
from basd.models.student import StudentOutput, TappedStudent
from basd.models.teacher import Teacher
from basd.objective import Objective


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return build_teacher()


# -- targets ----------------------------------------------------------------------------------------------------------


class FixedSelector(nn.Module):
    """A share for each of three layers at each of two points."""

    def forward(self, _tokens: object, _teacher: object) -> Tensor:
        return torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.4, 0.0]])


@each("selector", SELECTORS)
def test_mixture_is_normalised_and_of_unit_variance(selector: str, teacher: Teacher) -> None:
    objective = make(selector=SELECTORS[selector]())
    aligner = Calls(objective.token_aligner)
    run(objective, teacher)
    (mixture,) = aligner.inputs
    assert mixture.shape == (2, BATCH, 15, 16)
    torch.testing.assert_close(mixture.mean(-1), torch.zeros(2, BATCH, 15), atol=1e-5, rtol=0)
    torch.testing.assert_close(mixture.var(-1, unbiased=False), torch.ones(2, BATCH, 15), atol=1e-3, rtol=0)
    alpha = objective.layer_shares()
    assert alpha is not None and alpha.shape == (2, 3) and not alpha.requires_grad
    layers = teacher(data()[1]).tokens
    for m in range(2):
        total = sum(float(alpha[m, k]) * F.layer_norm(layers[k].double(), (16,)) for k in range(3))
        expected = F.layer_norm(total, (16,))  # type: ignore[arg-type]
        torch.testing.assert_close(mixture[m].double(), expected, rtol=1e-3, atol=1e-4)


def test_attention_target_is_the_mixture_of_the_maps(teacher: Teacher) -> None:
    objective = make(("attn",), selector=SELECTORS["uniform"]())
    compared = Calls(objective.head_aligner)
    run(objective, teacher)
    target = compared.inputs[1]
    expected = teacher(data()[1]).attention((3, 4)).mean(0)
    for m in range(2):
        torch.testing.assert_close(target[m], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(target.sum(-1), torch.ones(target.shape[:-1]))


@each("mix", ["mixup", "cutmix"])
@each("targets", ["follow", "clean"])
@each("name", LOSSES)
def test_targets_follow_the_mixing(name: str, targets: str, mix: str, teacher: Teacher) -> None:
    """Target mixing comes after the token aligner, on the student's grid."""
    chosen = MIXES[mix]
    assert chosen is not None
    objective = make((name,), mixing_targets=targets)
    # what the attention loss compares is what its head aligner gets
    loss = Calls(objective.head_aligner if name == "attn" else objective.losses[name])
    share = 1 - chosen.coverage(3, 4, 24, 24)
    if name == "attn":
        run(objective, teacher)
        clean = loss.inputs[1]
        expected = mix_attention(clean, share, chosen.lam, masked=mix == "cutmix")
    else:
        aligner = Calls(objective.token_aligner)
        run(objective, teacher)
        clean = aligner.output
        torch.testing.assert_close(loss.inputs[1], clean)
        expected = mix_tokens(clean, share)
    run(objective, teacher, mix=chosen)
    assert (expected - clean).abs().max() > 0.01
    torch.testing.assert_close(loss.inputs[1], expected if targets == "follow" else clean)


@each("mix", MIXES)
def test_attention_targets_are_mixed_whatever_is_worked_on_at_once(mix: str, teacher: Teacher) -> None:
    """Two parts of a large odd batch: an image and its partner are in one part, the middle image is its own partner."""
    batch, chosen = 393, MIXES[mix]
    seen = teacher(torch.randn(batch, 3, 20, 12, generator=torch.Generator().manual_seed(0)))
    comparison = Comparison(
        Bridges(selector=FixedSelector(), head_aligner=MeanHeadAligner()),
        sizes(),
        StudentOutput(torch.zeros(batch, CLASSES), torch.zeros(len(POINTS), batch, 12, 12)),
        seen,
        labels=torch.zeros(batch, CLASSES),
        mix=chosen,
        generator=generator,
    )
    maps = comparison.target_maps
    assert len(image_parts(maps, pairs=True)) == 2
    expected = torch.einsum("ml,lbhqk->mbhqk", FixedSelector()(None, None), seen.attention((3, 4)))
    if chosen is not None:
        share = 1 - chosen.coverage(3, 4, 24, 24)
        expected = mix_attention(expected, share, chosen.lam, masked=mix == "cutmix")
    torch.testing.assert_close(maps, expected)
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))


def test_cutmix_target_shows_the_partner_under_the_box(teacher: Teacher) -> None:
    objective = make(("rsd",))
    aligner, loss = Calls(objective.token_aligner), Calls(objective.losses["rsd"])
    run(objective, teacher, mix=CUTMIX)
    clean, target = aligner.output, loss.inputs[1]
    under = [n for n in range(12) if n // 4 in (1, 2) and n % 4 in (1, 2)]
    for n in range(12):
        for b in range(BATCH):
            image = BATCH - 1 - b if n in under else b
            assert torch.equal(target[:, b, n], clean[:, image, n])


def test_rel_and_spectral_share_one_projection_and_equal_widths_need_none(teacher: Teacher) -> None:
    objective = make()
    rel, spectral, rsd = (Calls(objective.losses[name]) for name in ("rel", "spectral", "rsd"))
    run(objective, teacher)
    assert torch.equal(rel.inputs[0], spectral.inputs[0]) and rel.inputs[0].shape == (2, BATCH, 12, 16)
    assert rsd.inputs[0].shape == (2, BATCH, 12, 12)
    assert sum(p.numel() for n, p in objective.named_parameters() if n.startswith("projections.")) == 2 * (12 * 16 + 16)

    objective = make(s=sizes(width=12))
    rel = Calls(objective.losses["rel"])
    student = build_student()
    run(objective, build_teacher(width=12), student=student)
    tokens = TappedStudent(student, POINTS, False)(data()[0]).tokens
    torch.testing.assert_close(rel.inputs[0], tokens)


@each("name", TOKEN_LOSSES)
def test_token_counts_are_checked(name: str, teacher: Teacher) -> None:
    objective = make((name,), selector=SELECTORS["uniform"]())
    tokens = torch.randn(2, BATCH, 13, 12, requires_grad=True)
    out = StudentOutput(torch.randn(BATCH, CLASSES), tokens)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        objective(out, teacher(data()[1]), data()[2], None, 0, generator)


def test_a_skipped_attention_loss_does_not_starve_the_others() -> None:
    """Where every point is skipped attn has no loss; a loss of 0, a perfect match, would take all of the weight."""
    torch.manual_seed(1)
    model = VisionTransformer(img_size=(12, 16), patch_size=4, num_classes=0, embed_dim=16, depth=3, num_heads=4)
    perturb(model, 0.2)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:32] = 0  # no queries and keys: attention is uniform
            block.attn.qkv.bias[:32] = 0
    teacher = Teacher(model)
    objective = make(s=dataclasses.replace(sizes(), teacher_grid=(3, 4)))
    tapped = TappedStudent(build_student(), POINTS, True)
    for step in range(2):
        output = objective(tapped(data()[0]), teacher(torch.randn(BATCH, 3, 12, 16)), data()[2], None, step, generator)
        parts = numbers(output)
        assert parts["loss/attn_skipped_points"] == len(POINTS)
        assert all(parts[f"weight/{name}"] > 0.1 for name in TOKEN_LOSSES)


# -- precision --------------------------------------------------------------------------------------------------------


def test_losses_are_float32_under_autocast(teacher: Teacher) -> None:
    student = build_student()
    images, clean, labels = data()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, seen = TappedStudent(student, POINTS, True)(images), teacher(clean)
        assert out.logits.dtype == torch.bfloat16 and out.scores is not None and out.scores.dtype == torch.bfloat16
        inside = make()(out, seen, labels, CUTMIX, 0, generator)
    assert out.tokens is not None
    assert inside.total.dtype == torch.float32
    for name, value in inside.parts.items():
        assert not isinstance(value, Tensor) or value.dtype == torch.float32, name
    # the same values without any autocast, from the same outputs in float32
    wide = StudentOutput(out.logits.float(), out.tokens.float(), out.scores.float())
    outside = make()(wide, seen, labels, CUTMIX, 0, generator)
    assert numbers(outside) == pytest.approx(numbers(inside), rel=1e-6)
    inside.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


# -- every toggle -----------------------------------------------------------------------------------------------------


def check_runs(objective: Objective, teacher: Teacher, mix: Mix | None) -> None:
    student = build_student()
    output = run(objective, teacher, student=student, mix=mix, step=40, diagnose=True)
    output.total.backward()
    assert torch.isfinite(output.total)
    for name, value in numbers(output).items():
        assert value == value and abs(value) < 1e4, name
    for name, parameter in [*objective.named_parameters(), *student.named_parameters()]:
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in student.parameters())


FACTORS: dict[str, list[str]] = {
    "selector": list(SELECTORS),
    "token_aligner": list(TOKEN_ALIGNERS),
    "head_aligner": list(HEAD_ALIGNERS),
    "weighting": list(WEIGHTINGS),
    "warmup": list(WARMUPS),
    "mix": list(MIXES),
}


def pairwise() -> list[dict[str, str]]:
    """Combinations in which every two choices of different factors meet at least once."""
    draw = random.Random(0)

    def pairs(row: dict[str, str]) -> set[tuple[tuple[str, str], ...]]:
        return set(itertools.combinations(sorted(row.items()), 2))

    open_pairs = {
        tuple(sorted(((one, a), (other, b))))
        for one, other in itertools.combinations(FACTORS, 2)
        for a, b in itertools.product(FACTORS[one], FACTORS[other])
    }
    rows = []
    while open_pairs:
        wanted = dict(min(open_pairs))
        candidates = [{k: wanted.get(k, draw.choice(v)) for k, v in FACTORS.items()} for _ in range(30)]
        rows.append(max(candidates, key=lambda row: len(pairs(row) & open_pairs)))
        open_pairs -= pairs(rows[-1])
    return rows


def check_row(row: dict[str, str]) -> None:
    heads = 2 if row["head_aligner"] == "none" else 4
    objective = make(
        s=sizes(heads),
        selector=SELECTORS[row["selector"]](),
        token_aligner=TOKEN_ALIGNERS[row["token_aligner"]](),
        head_aligner=HEAD_ALIGNERS[row["head_aligner"]](),
        weighting=WEIGHTINGS[row["weighting"]](),
        warmup=WARMUPS[row["warmup"]](),
    )
    check_runs(objective, cached_teacher(heads), MIXES[row["mix"]])


@lru_cache
def cached_teacher(heads: int) -> Teacher:
    return build_teacher(heads)


@each("number", range(max(map(len, FACTORS.values()))))
def test_every_choice_runs(number: int) -> None:
    check_row({factor: choices[number % len(choices)] for factor, choices in FACTORS.items()})


@pytest.mark.full
@each("row", pairwise())
def test_every_pair_of_choices_runs(row: dict[str, str]) -> None:
    check_row(row)


def test_training_moves_the_losses_down(teacher: Teacher) -> None:
    """Forty steps on one batch lower every loss by a tenth."""
    objective, student = make(weighting=WEIGHTINGS["equal"]()), build_student()
    images, clean, labels = data()
    tapped, seen = TappedStudent(student, POINTS, True), teacher(clean)
    optimizer = torch.optim.AdamW([*student.parameters(), *objective.parameters()], lr=3e-3)
    history = []
    for step in range(40):
        output = objective(tapped(images), seen, labels, None, step, generator)
        history.append(numbers(output))
        optimizer.zero_grad()
        output.total.backward()
        optimizer.step()
    for name in ("train/ce", *(f"loss/{loss}" for loss in LOSSES)):
        assert history[-1][name] < 0.9 * history[0][name], name
