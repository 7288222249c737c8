"""Combinations that cannot train are refused before anything is built, in one sentence each."""

from __future__ import annotations

import pytest

from basd.compose import compose
from basd.errors import UserError

ONE_PATCH = ["student.patch_size=40", "losses.rel.enabled=false"]


REFUSED: list[tuple[list[str], str]] = [
    (["head_aligner=none"], "head_aligner=none needs equal head counts, but the student has 3 and the teacher 4"),
    (
        ["method=a2d", "selector=adaptive_spectral"],
        "with attn alone selector=adaptive_spectral has nothing to select",
    ),
    (["method=a2d", "selector=static"], "choose selector=uniform"),
    ([*ONE_PATCH], "losses.spectral.mode=full needs more than one patch"),
    ([*ONE_PATCH, "losses.spectral.mode=phase"], "losses.spectral.mode=phase needs more than one patch"),
    (
        ["student.patch_size=40", "losses.spectral.enabled=false"],
        "losses.rel.vertices=tokens needs more than one patch",
    ),
    (["losses.rel.num_pairs=301"], "losses.rel.num_pairs=301 is more than the 300 pairs of 25 patches"),
    (["losses.rel.vertices=pooled", "recipe.batch_size=16"], "more than the 120 pairs of 16 images"),
    (["losses.rel.vertices=logits", "views=single"], "compares two views, but views=single has one"),
    (["losses.rel.vertices=logits", "losses.rel.edge=difference"], "whose edges are unit differences"),
    (
        ["losses.rel.vertices=logits", "losses.rel.inter_sample_weight=0", "losses.rel.inter_class_weight=0"],
        "are both 0, so nothing is compared",
    ),
    (["losses.rsd.projector=none"], "needs equal widths, but the student's is 48 and the teacher's 64"),
    (["selector=all_to_one", "selector.layer=4"], "selector.layer=4 is not a block of the teacher, whose 4 blocks"),
    (["student.distillation_token=true"], "student.distillation_token=true needs a loss that trains its head"),
    (["method=kd", "student.distillation_token=true"], "enable losses.logit with kind deit_hard or deit_soft"),
    (["mixing.targets=skip"], "mixing.probability"),
    (["method=kd", "objective.ce_weight=0", "weighting.weights.logit=0"], "leave nothing to train"),
    (["method=ce", "objective.ce_weight=0"], "leaves nothing to train"),
]
ALLOWED = [
    ["student.patch_size=40", "losses.rel.enabled=false", "losses.spectral.mode=spatial_mse"],
    ["losses.rel.num_pairs=300"],
    ["losses.rel.pairs=all", "losses.rel.num_pairs=1000"],
    ["head_aligner=a2d"],
    ["head_aligner=none", "losses.attn.enabled=false"],
    ["losses.rsd.projector=none", "student.width=64", "student.heads=4"],
    ["mixing.targets=skip", "mixing.probability=0.5"],
    ["method=ce", "mixing.targets=skip"],
    # a loss that does not compare places learns from mixed batches too
    ["method=kd", "mixing.targets=skip"],
    ["teacher=dinov2_vits14", "teacher.head=own"],
    ["selector=all_to_one", "selector.layer=3"],
]


def test_refused_with_the_way_out() -> None:
    for overrides, said in REFUSED:
        with pytest.raises(UserError) as error:
            compose(overrides)
        message = str(error.value)
        assert said in message, overrides
        assert "\n" not in message, "one thing is wrong, one sentence is said"


def test_allowed() -> None:
    for overrides in ALLOWED:
        compose(overrides)


def test_several_are_listed_together() -> None:
    with pytest.raises(UserError) as error:
        compose(["head_aligner=none", "losses.rel.num_pairs=999", "student.distillation_token=true", "views=single"])
    message = str(error.value)
    assert message.startswith("3 things do not fit:\n")
    for said in ("head_aligner=none", "num_pairs=999", "distillation_token"):
        assert message.count(said) >= 1


def test_several_are_listed_together_for_a_teacher_that_is_not_there_yet() -> None:
    """From the model's structure: nothing is downloaded."""
    with pytest.raises(UserError) as error:
        compose(
            [
                *("teacher=dinov2_vits14", "head_aligner=none", "losses.rsd.projector=none", "teacher.head=own"),
                *("losses.logit.enabled=true", "selector=all_to_one", "selector.layer=12"),
            ]
        )
    message = str(error.value)
    assert message.startswith("4 things do not fit:\n")
    for said in (
        "head_aligner=none needs equal head counts, but the student has 3 and the teacher 6",
        "projector=none needs equal widths, but the student's is 48 and the teacher's 384",
        "selector.layer=12 is not a block of the teacher",
        "teacher.head=own needs a classification head, but vit_small_patch14_dinov2.lvd142m has none",
    ):
        assert said in message
