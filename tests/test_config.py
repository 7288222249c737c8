"""Schema, keys and messages: what is equal folds, what differs does not, what is wrong is said before anything is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from tiny import TINY, MemoryRecorder, same_bits, state_of

from basd.compose import compose, group_choices, overridden_keys, setting_name
from basd.config import FrozenArm, from_dict, keys_of, normalized, without_effect
from basd.errors import UserError
from basd.training.cohort import train_cohort

MakeArm = Callable[..., FrozenArm]
RSD_ALONE = ["losses.rel.enabled=false", "losses.attn.enabled=false", "losses.spectral.enabled=false"]


@cache
def key_of(*overrides: str) -> str:
    return keys_of(compose(overrides).config, teacher_fingerprint="t", data_fingerprint="d").arm


def test_the_default_is_the_complete_method() -> None:
    config = compose().config
    assert config.enabled == ("rsd", "rel", "attn", "spectral")
    names = {group: getattr(config, group).name for group in ("views", "mixing", "selector", "token_aligner")}
    assert names == {
        "views": "dual",
        "mixing": "mixup_cutmix",
        "selector": "adaptive_spectral",
        "token_aligner": "cross_attention",
    }
    assert (config.head_aligner.name, config.weighting.name, config.warmup.name) == ("conv", "uwso", "staggered")


BAD: list[tuple[list[str], list[str]]] = [
    (["selector=unifrm"], ["selector=unifrm is not known", "did you mean uniform?", "adaptive_spectral"]),
    (["method=bassd"], ["did you mean basd?", "ce"]),
    (["losses.rsd.kapa=1"], ["losses.rsd.kapa is not a setting of losses.rsd", "did you mean kappa?"]),
    (["lossses.rsd.kappa=1"], ["lossses.rsd.kappa is not a setting", "did you mean losses?"]),
    (["selctor=uniform"], ["selctor is not a setting", "did you mean selector?"]),
    (["losses.rsd.kappa=abc"], ["losses.rsd.kappa=abc", "could not be converted to Float"]),
    (["losses.rsd.kappa=-1"], ["losses.rsd.kappa=-1.0 must be at least 0"]),
    (["losses.rsd.center=middle"], ["losses.rsd.center=middle is not known", "position"]),
    (["seed=1.5"], ["seed=1.5"]),
    (["seed=1,2"], ['"seed=1,2" holds several values']),
    (["seed"], ['"seed" is not an override; write KEY=VALUE']),
    (["+seed=1"], ["cannot be added or removed"]),
    (["recipe.duration=20"], ["recipe.duration", "is not a length"]),
    (["recipe.duration=10%"], ["recipe.duration", "needs a whole to be a part of"]),
    (["student.points=[1,9]"], ["student.points holds block 9, but the student's 4 blocks are 0 to 3"]),
    (["student.points=9"], ["student.points=9 must be between 1 and the student's 4 blocks"]),
    (["student.points=[2,1]"], ["must be increasing"]),
    (["student.points=all"], ["must be a count of points or a list"]),
    (["student.width=50"], ["student.width=50 does not divide by student.heads=3"]),
    (["student.patch_size=7"], ["student.image_size=40 is not a multiple of student.patch_size=7"]),
    (["head_aligner=none"], ["head_aligner=none needs equal head counts", "choose head_aligner=conv"]),
    (["data.crop_scale=[1.0,0.5]"], ["data.crop_scale must be [low, high]"]),
    ([f"losses.{n}.enabled=false" for n in ("rsd", "rel", "attn", "spectral")], ["every loss off", "method=ce"]),
]


def test_bad_input_is_one_message_with_the_way_out() -> None:
    for overrides, said in BAD:
        with pytest.raises(UserError) as error:
            compose(overrides)
        for part in said:
            assert part in str(error.value), overrides


def test_all_problems_are_listed_together() -> None:
    with pytest.raises(UserError) as error:
        compose(["student.points=[1,9]", "student.width=50", "head_aligner=none", "recipe.duration=soon"])
    lines = str(error.value).splitlines()
    assert lines[0] == "4 things do not fit:"
    assert len(lines) == 5


def test_from_dict_refuses_what_the_command_line_would() -> None:
    values = compose().config.to_dict()
    assert from_dict(values) == compose().config
    broken = {**values, "sed": 1, "selector": {**values["selector"], "temperature": "hot"}}
    with pytest.raises(UserError) as error:
        from_dict(broken)
    assert "sed is not a setting; did you mean seed?" in str(error.value)
    assert "selector.temperature='hot' must be a number" in str(error.value)


# pairs that are trained below
FOLDED: list[tuple[list[str], list[str]]] = [
    # one loss: its UW-SO weight is 1
    (
        ["losses.rel.enabled=false", "losses.attn.enabled=false", "losses.spectral.enabled=false"],
        [
            "losses.rel.enabled=false",
            "losses.attn.enabled=false",
            "losses.spectral.enabled=false",
            "weighting=equal",
        ],
    ),
    (["weighting=fixed"], ["weighting=equal"]),
    (["selector.entropy=none"], ["selector.entropy_weight=0"]),
    (["warmup.starts.rel=0.0", "warmup.starts.attn=0.0", "warmup.starts.spectral=0.0"], ["warmup=simultaneous"]),
    (["warmup=simultaneous", "warmup.length=0"], ["warmup=none"]),
    (["mixing.probability=0"], ["mixing=none"]),
    (["mixing.switch=1"], ["mixing=cutmix"]),
    (["mixing.switch=0", "mixing.cutmix_alpha=0.3"], ["mixing=mixup"]),
    (["views.strong=three_augment", "views.magnitude=3"], ["views.strong=three_augment"]),
    (["views.num_ops=0", "views.strong=randaugment_full"], ["views.num_ops=0", "views.op_probability=0"]),
    (["views.op_probability=0", "views.strong=randaugment_full"], ["views.op_probability=0", "views.magnitude=1"]),
    (["losses.rsd.samples=cls", "losses.rsd.center=global"], ["losses.rsd.samples=cls"]),
    (["losses.rel.pairs=all", "losses.rel.num_pairs=5"], ["losses.rel.pairs=all"]),
    (["method=vrm", "losses.rel.num_pairs=5", "selector=alp"], ["method=vrm", "losses.rel.pairs=all"]),
    (["method=kd", "losses.logit.kind=deit_soft"], ["method=kd"]),
    (["method=deit_hard", "losses.logit.temperature=2.0"], ["method=deit_hard"]),
    (["method=layer_matching", "weighting=dwa"], ["method=layer_matching", "weighting=equal"]),
    (["warmup=none", "weighting.order=ramp_then_weights"], ["warmup=none"]),
    (["student.points=1", "head_aligner.stack=all"], ["student.points=1"]),
    (
        [*RSD_ALONE, "token_aligner=student_projection"],
        [*RSD_ALONE, "token_aligner=interpolate"],
    ),
]
EQUAL: list[tuple[list[str], list[str]]] = [
    (["runtime.threads=2", "tracking.uri=sqlite:///x.db", "runtime.directory=elsewhere"], []),
    (["student.points=[1,3]", "student.depth=4"], ["student.points=2"]),
    (
        ["warmup=staggered", *(f"warmup.starts.{n}=0.0" for n in ("rel", "attn", "spectral"))],
        ["warmup=simultaneous"],
    ),
    (["method=ce", "selector=uniform"], ["method=ce", "selector=forward", "student.points=2"]),
    (["method=ce", "weighting=equal"], ["method=ce", "teacher.depth=2", "mixing.targets=clean"]),
    (["losses.rsd.enabled=false", "losses.rsd.kappa=0.5"], ["losses.rsd.enabled=false"]),
    (["losses.attn.enabled=false", "head_aligner=none"], ["losses.attn.enabled=false"]),
    (["views=single"], ["views=single", "method=basd"]),
]


def test_equal_computations_have_one_key() -> None:
    for one, other in (*EQUAL, *FOLDED):
        assert key_of(*one) == key_of(*other), (one, other)


def test_different_computations_have_different_keys() -> None:
    pairs = [
        (["method=ce"], ["method=ce", "views.geometry=independent"]),
        (["method=ce"], ["method=ce", "mixing=cutmix"]),
        (["weighting=uwso"], ["weighting=equal"]),
        (["warmup.length=0.2"], []),
    ]
    for one, other in pairs:
        assert key_of(*one) != key_of(*other), (one, other)


def test_every_semantic_field_is_in_the_key() -> None:
    """Change each leaf of the default configuration: the key must change, or the field be one that is off."""
    from basd.config import NOT_SEMANTIC, flatten

    config = compose().config
    base = keys_of(config, teacher_fingerprint="t", data_fingerprint="d").arm
    effective = dict(flatten(normalized(config)))
    for key in effective:
        section, _, rest = key.partition(".")
        assert section not in NOT_SEMANTIC
        values = config.to_dict()
        node = values
        *parents, leaf = key.split(".")
        for parent in parents:
            node = node[parent]
        old = node[leaf]
        choices = _choices(config, key)
        node[leaf] = next(choice for choice in choices if choice != old) if choices else _other(old)
        if rest == "name" or leaf == "enabled" or key == "student.points":
            continue
        rebuilt = _rebuild(config, values)
        assert keys_of(rebuilt, teacher_fingerprint="t", data_fingerprint="d").arm != base, key
    assert keys_of(config, teacher_fingerprint="u", data_fingerprint="d").arm != base
    assert keys_of(config, teacher_fingerprint="t", data_fingerprint="e").arm != base


def _choices(config, key):
    *parents, leaf = key.split(".")
    for parent in parents:
        config = getattr(config, parent)
    return {f.name: f.metadata.get("choices") for f in dataclasses.fields(config)}[leaf]


def _other(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, list):
        return [_other(item) for item in value]
    return f"{value}x"


def _rebuild(config, values):
    """The configuration with these values, unchecked: only its keys are looked at."""

    def put(node, fresh):
        changes = {}
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            changes[field.name] = (
                put(value, fresh[field.name]) if dataclasses.is_dataclass(value) else fresh[field.name]
            )
        return dataclasses.replace(node, **changes)

    return put(config, values)


def test_cohort_key_is_shared_by_rows_and_split_by_seed_batch_and_teacher() -> None:
    def cohort(*overrides: str) -> str:
        return keys_of(compose(overrides).config, teacher_fingerprint="t", data_fingerprint="d").cohort

    same = {cohort(), cohort("method=ce"), cohort("selector=uniform"), cohort("mixing=none"), cohort("recipe.lr=0.01")}
    assert len(same) == 1
    others = [cohort("seed=1"), cohort("recipe.batch_size=32"), cohort("teacher.depth=3"), cohort("data.split_seed=1")]
    assert len({*same, *others, cohort("recipe.duration=3 epochs")}) == 6


def test_fields_without_effect_are_reported() -> None:
    overrides = ["losses.rsd.enabled=false", "losses.rsd.kappa=0.5", "mixing=none", "seed=3", "runtime.threads=2"]
    notices = without_effect(compose(overrides).config, overridden_keys(overrides))
    assert notices == ["losses.rsd.kappa has no effect in this combination"]
    effective = ["selector.entropy_weight=0", "warmup=simultaneous", "warmup.length=0", "teacher.weights=x.safetensors"]
    assert without_effect(compose(effective).config, overridden_keys(effective)) == []
    ce = ["method=ce", "selector=uniform", "selector.name=uniform"]
    assert "selector has no effect in this combination" in without_effect(compose(ce).config, overridden_keys(ce))
    alone = [f"losses.{name}.enabled=false" for name in ("rsd", "rel", "spectral")] + ["selector.entropy_weight=0.5"]
    assert "selector.entropy_weight has no effect" in without_effect(compose(alone).config, overridden_keys(alone))[0]


@pytest.mark.parametrize(
    "pairs", [FOLDED[:1] + FOLDED[5:6], pytest.param(FOLDED, marks=pytest.mark.full)], ids=["two", "all"]
)
def test_folded_arms_train_to_the_same_bits(
    pairs: list[tuple[list[str], list[str]]], tiny_arm: MakeArm, tmp_path: Path
) -> None:
    """All as one cohort, in which an arm has the bits that it has alone."""
    # more than an epoch
    arms = [tiny_arm(*overrides, "recipe.duration=6 steps") for pair in pairs for overrides in pair]
    directories = [tmp_path / str(number) for number in range(len(arms))]
    results = train_cohort(arms, directories, [MemoryRecorder() for _ in arms])
    assert {result.status for result in results} == {"complete"}
    for number, pair in enumerate(pairs):
        one, other = (2 * number + place for place in range(2))
        assert arms[one].arm_key == arms[other].arm_key, pair
        assert same_bits(state_of(directories[one]), state_of(directories[other])), pair


def test_setting_names() -> None:
    def name(*overrides: str) -> str:
        return setting_name(overrides)

    plain = "digits-digits_vit-digits_tiny-digits"
    assert name() == plain
    assert name("runtime.threads=2", "seed=4", "tracking.uri=sqlite:///x.db") == plain
    changed = name("recipe.lr=0.01")
    assert changed.startswith(f"{plain}-")
    assert len(changed) == len(plain) + 7
    assert changed == name("recipe.lr=0.01", "runtime.threads=3")
    assert changed != name("recipe.lr=0.02")
    assert name("selector=uniform", "method=ce") == plain, "a component is not the setting"
    assert name("student=deit_tiny", "data.image_size=224", "teacher=dinov2_vits14").startswith(
        "digits-dinov2_vits14-deit_tiny-digits-"
    )


def test_choices_name_every_preset() -> None:
    choices = group_choices()
    assert {"basd", "ce"} <= set(choices["method"])
    assert {"digits_vit", "dinov2_vits14", "timm"} <= set(choices["teacher"])
    compose(TINY)


@pytest.mark.full
def test_every_preset_can_be_chosen() -> None:
    for group, names in group_choices().items():
        for name in names:
            # these need other settings beside them
            if (group, name) not in (("student", "deit_tiny"), ("head_aligner", "none"), ("data", "timm")):
                assert compose([f"{group}={name}"]).choices[group] == name


@pytest.mark.parametrize(
    "methods",
    [("basd", "a2d", "spectralkd"), pytest.param(tuple(group_choices()["method"]), marks=pytest.mark.full)],
    ids=["some", "all"],
)
def test_a_preset_goes_with_other_parts_than_its_own(methods: tuple[str, ...]) -> None:
    """What a preset sets of a part that was exchanged is left out; what was said on the command line goes before it."""
    exchanged = ["mixing=none", "weighting=equal", "selector=uniform", "token_aligner=interpolate", "warmup=none"]
    for method in methods:
        config = compose([f"method={method}", *exchanged], combinations=False).config
        names = (config.mixing.name, config.weighting.name, config.selector.name)
        assert names == ("none", "equal", "uniform"), method
        said = compose([f"method={method}", "mixing=cutmix", "mixing.targets=skip"], combinations=False).config
        assert (said.mixing.name, said.mixing.targets) == ("cutmix", "skip"), method
        kept = compose([f"method={method}", "mixing=cutmix"]).config
        assert kept.mixing.targets == compose([f"method={method}"]).config.mixing.targets, method


def test_weights_of_a_preset_and_of_the_command_line() -> None:
    config = compose(["method=spectralkd", "weighting.weights.logit=0.5"]).config
    assert (config.weighting.weights.logit, config.weighting.weights.spectral) == (0.5, 0.2)
    with pytest.raises(UserError, match="mixing.targets"):
        compose(["method=kd", "preset.mixing.targets=clean"])
