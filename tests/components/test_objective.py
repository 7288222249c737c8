import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from each import each
from objective_fakes import (
    CLASSES,
    CUTMIX,
    LOSSES,
    MIXES,
    POINTS,
    Calls,
    build_student,
    build_teacher,
    data,
    generator,
    gradients,
    make,
    number,
    numbers,
    run,
    sizes,
)
from torch import Tensor, nn

from basd.components.head_aligners import HEAD_ALIGNERS
from basd.components.selectors import SELECTORS
from basd.components.token_aligners import TOKEN_ALIGNERS
from basd.components.warmup import WARMUPS
from basd.components.weighting import WEIGHTINGS
from basd.models.student import TappedStudent
from basd.models.teacher import Teacher
from basd.objective import Objective, ObjectiveConfig


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return build_teacher()


# -- the sum and its parts --------------------------------------------------------------------------------------------


def test_cross_entropy_alone_needs_no_teacher() -> None:
    objective = make(enabled=())
    assert not objective.demands.teacher and not objective.demands.maps
    assert not list(objective.parameters()) and objective.layer_shares() is None
    student = build_student()
    output = run(objective, None, student=student)
    images, _, labels = data()
    expected = F.cross_entropy(student(images), labels)
    assert number(output.total) == pytest.approx(number(expected))
    assert set(output.parts) == {"train/ce", "train/loss"}
    output.total.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_weight_of_the_cross_entropy(teacher: Teacher) -> None:
    plain = numbers(run(make(), teacher))
    for weight in (0.0, 0.5, 2.0):
        parts = numbers(run(make(objective=ObjectiveConfig(ce_weight=weight)), teacher))
        added = (weight - 1) * plain["train/ce"]
        assert parts["train/loss"] - plain["train/loss"] == pytest.approx(added, abs=1e-5), weight


def test_named_parts(teacher: Teacher) -> None:
    output = run(make(), teacher)
    expected = {"train/ce", "train/loss", "selector/entropy", "selector/entropy/1", "selector/entropy/3"}
    expected |= {f"{what}/{name}" for what in ("loss", "weight", "ramp") for name in LOSSES}
    assert expected <= set(output.parts)
    assert not any(name.startswith("aligner/") for name in output.parts)
    for name, value in output.parts.items():
        assert isinstance(value, float | int) or (value.ndim == 0 and not value.requires_grad), name
    for name in LOSSES:
        # every loss starts near 1
        assert 0.4 < number(output.parts[f"loss/{name}"]) < 2.0, name
    diagnosed = set(run(make(), teacher, diagnose=True).parts) - set(output.parts)
    kinds = ("input_variance_share", "spatial_variance_share", "row_entropy", "effective_rank")
    assert diagnosed == {"rsd/floor", *(f"aligner/{kind}/{point}" for kind in kinds for point in POINTS)}


@each("warmup", WARMUPS)
@each("step", [0, 7, 12, 18, 60])
def test_total_is_the_sum_of_the_parts(warmup: str, step: int, teacher: Teacher) -> None:
    output = run(make(warmup=WARMUPS[warmup]()), teacher, step=step)
    parts = numbers(output)
    total = parts["train/ce"] + 0.01 * parts["selector/entropy"]
    for name in LOSSES:
        assert (parts[f"ramp/{name}"] > 0) == (f"loss/{name}" in parts) == (f"weight/{name}" in parts)
        if parts[f"ramp/{name}"] > 0:
            total += parts[f"weight/{name}"] * parts[f"ramp/{name}"] * parts[f"loss/{name}"]
    assert number(output.total) == pytest.approx(total, rel=1e-5)
    assert parts["train/loss"] == number(output.total)


@each("enabled", [c for k in range(1, 5) for c in itertools.combinations(LOSSES, k)])
def test_every_set_of_losses(enabled: tuple[str, ...], teacher: Teacher) -> None:
    objective = make(enabled)
    output = run(objective, teacher)
    assert {name for name in output.parts if name.startswith("weight/")} == {f"weight/{name}" for name in enabled}
    output.total.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


def test_weights_carry_no_gradient(teacher: Teacher) -> None:
    """The gradient of the total is that of Σ w·L with the weights as plain numbers."""
    student = build_student()
    output = run(make(), teacher, student=student)
    output.total.backward()
    got = [parameter.grad.clone() for parameter in student.parameters() if parameter.grad is not None]
    other = build_student()
    parts = numbers(output)
    fixed = WEIGHTINGS["fixed"]()
    for name in LOSSES:
        setattr(fixed.weights, name, parts[f"weight/{name}"])
    run(make(weighting=fixed), teacher, student=other).total.backward()
    expected = [parameter.grad for parameter in other.parameters() if parameter.grad is not None]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# -- entropy term -----------------------------------------------------------------------------------------------------


@each("entropy, sign, offset", [("sparsify", 1, 0), ("spread", -1, 1), ("none", 0, 0)])
def test_entropy_term(entropy: str, sign: int, offset: int, teacher: Teacher) -> None:
    config = SELECTORS["adaptive_spectral"](entropy=entropy, entropy_weight=0.3)
    parts = numbers(run(make(selector=config), teacher))
    total = parts["train/ce"] + sum(parts[f"weight/{n}"] * parts[f"loss/{n}"] for n in LOSSES)
    term = 0.3 * (offset + sign * parts["selector/entropy"])
    assert parts["train/loss"] == pytest.approx(total + term, rel=1e-5)
    assert 0 <= parts["selector/entropy"] <= 1
    by_point = [parts[f"selector/entropy/{point}"] for point in POINTS]
    assert parts["selector/entropy"] == pytest.approx(sum(by_point) / 2)


def test_without_a_gradient_for_the_selector_there_is_no_entropy_term(teacher: Teacher) -> None:
    for selector in ("uniform", "forward"):
        parts = numbers(run(make(selector=SELECTORS[selector]()), teacher))
        total = parts["train/ce"] + sum(parts[f"weight/{n}"] * parts[f"loss/{n}"] for n in LOSSES)
        assert parts["train/loss"] == pytest.approx(total, rel=1e-5), selector
    # the attention loss gives no selector a gradient
    objective = make(("attn",), selector=SELECTORS["adaptive_spectral"](entropy_weight=0.3))
    output = run(objective, teacher)
    parts = numbers(output)
    assert parts["train/loss"] == pytest.approx(parts["train/ce"] + parts["loss/attn"], rel=1e-5)
    output.total.backward()
    assert not any(has for name, has in gradients(objective).items() if name.startswith("selector."))


# -- what is off is neither built nor computed -------------------------------------------------------------------------------------------


ALL = (*LOSSES, "logit", "feature")


def test_a_loss_that_is_off_is_not_built(teacher: Teacher) -> None:
    seen = Teacher(teacher.model, head=nn.Linear(16, CLASSES))
    complete = make(ALL)
    assert {f"loss/{name}" for name in ALL} <= set(numbers(run(complete, seen)))
    for off in ALL:
        rest = make(tuple(name for name in ALL if name != off))
        assert set(complete.losses) - set(rest.losses) == {off}
        assert not {name for name in numbers(run(rest, seen)) if name.endswith(f"/{off}")}, off


@each(
    "enabled, settings, built",
    [
        (("logit",), {}, set()),
        (("rsd",), {"rsd": {"samples": "pre_logits"}}, set()),
        (("rel",), {"rel": {"vertices": "logits"}}, set()),
        (("rsd",), {}, {"selector", "token_aligner"}),
        (("rel",), {}, {"selector", "token_aligner", "projections"}),
        (("spectral",), {}, {"selector", "token_aligner", "projections"}),
        (("attn",), {}, {"selector", "head_aligner"}),
        (("attn",), {"head_aligner": HEAD_ALIGNERS["a2d"]()}, {"head_aligner"}),
        (("feature",), {"feature": {"samples": "cls"}}, {"selector", "projections"}),
        (("feature", "attn"), {}, {"selector", "token_aligner", "projections", "head_aligner"}),
    ],
)
def test_only_what_a_loss_reads_is_built(enabled: tuple[str, ...], settings: dict, built: set[str]) -> None:
    objective = make(enabled, **settings)
    parts = ("selector", "token_aligner", "head_aligner", "projections")
    assert {name for name in parts if getattr(objective, name) is not None} == built
    assert set(objective.losses) == set(enabled) and objective.demands.maps == ("attn" in enabled)
    assert make(("rel",), s=sizes(width=12)).projections is None


def test_a_loss_with_ramp_zero_is_not_computed(teacher: Teacher) -> None:
    objective = make(warmup=WARMUPS["staggered"]())  # starts 0, 5, 10, 15
    # the attention loss is computed from the output of its head aligner, some images at a time
    losses = {name: Calls(objective.head_aligner if name == "attn" else objective.losses[name]) for name in LOSSES}
    assert objective.projections is not None
    projections = [Calls(module) for module in objective.projections.modules() if isinstance(module, nn.Linear)]
    for step, expected in ((0, [1, 0, 0, 0]), (6, [2, 1, 0, 0]), (12, [3, 2, 1, 0]), (18, [4, 3, 2, 1])):
        output = run(objective, teacher, step=step)
        assert [losses[name].count for name in LOSSES] == expected, step
        active = [name for name in LOSSES if f"loss/{name}" in output.parts]
        assert active == list(LOSSES)[: 1 + (0, 6, 12, 18).index(step)]
        if step == 0:
            # rsd alone: nothing reads projected tokens
            assert not any(call.count for call in projections)
            output.total.backward()
            assert not any(has for name, has in gradients(objective).items() if name.startswith("projections."))
    assert all(call.count == 3 for call in projections)


def test_attention_is_not_rebuilt_without_attn() -> None:
    """The other losses run with a teacher whose attention cannot be rebuilt."""
    teacher = Teacher(build_teacher().model, attention=False)
    run(make(("rsd", "rel", "spectral")), teacher)
    run(make(warmup=WARMUPS["staggered"]()), teacher, step=6)
    with pytest.raises(IndexError):
        run(make(("attn",)), teacher)


def test_token_parts_are_not_computed_while_only_attention_runs(teacher: Teacher) -> None:
    warmup = WARMUPS["staggered"]()
    warmup.starts.rsd = warmup.starts.rel = warmup.starts.spectral = 0.5
    objective = make(warmup=warmup)
    aligner = Calls(objective.token_aligner)
    parts = numbers(run(objective, teacher, step=20))
    assert aligner.count == 0 and "loss/attn" in parts and "loss/rsd" not in parts
    # no loss gives α a gradient, so there is no entropy term
    expected = parts["train/ce"] + parts["weight/attn"] * parts["ramp/attn"] * parts["loss/attn"]
    assert parts["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_before_any_start_only_cross_entropy_counts(teacher: Teacher) -> None:
    warmup = WARMUPS["staggered"]()
    for name in LOSSES:
        setattr(warmup.starts, name, 0.5)
    objective = make(warmup=warmup)
    selector = Calls(objective.selector)
    output = run(objective, teacher, step=0)
    assert selector.count == 0
    assert number(output.total) == pytest.approx(numbers(output)["train/ce"])


@each("mix", MIXES)
def test_skip_leaves_mixed_batches_without_any_loss(mix: str, teacher: Teacher) -> None:
    objective = make(mixing_targets="skip")
    selector = Calls(objective.selector)
    parts = numbers(run(objective, teacher, mix=MIXES[mix]))
    present = {name for name in parts if name.startswith("loss/") and name != "loss/attn_skipped_points"}
    assert {f"ramp/{name}" for name in LOSSES} <= set(parts)
    if mix == "none":
        assert present == {f"loss/{name}" for name in LOSSES} and selector.count == 1
        assert parts == numbers(run(make(), teacher))
    else:
        assert not present and selector.count == 0
        assert parts["train/loss"] == parts["train/ce"]
        assert not {name for name in parts if name.startswith(("weight/", "selector/"))}


@each("mix", MIXES)
def test_skip_leaves_losses_that_compare_no_places(mix: str, teacher: Teacher) -> None:
    """Pre-logits features of a mixed batch are compared with features mixed like the labels, as with `follow`."""
    skipping, following = (
        make(("rsd", "rel"), rsd={"samples": "pre_logits"}, mixing_targets=targets) for targets in ("skip", "follow")
    )
    assert skipping.demands.of_places == {"rel"}
    parts = numbers(run(skipping, teacher, mix=MIXES[mix]))
    assert parts["loss/rsd"] == numbers(run(following, teacher, mix=MIXES[mix]))["loss/rsd"]
    assert ("loss/rel" in parts) == (mix == "none")


def test_active_says_which_losses_are_computed() -> None:
    objective = make(warmup=WARMUPS["staggered"]())  # starts 0, 5, 10, 15
    for step, count in ((0, 1), (4, 1), (5, 2), (10, 3), (15, 4)):
        for mix in MIXES.values():
            assert objective.active(mix, step) == list(LOSSES)[:count]
    skipping = make(mixing_targets="skip")
    assert skipping.active(None, 0) == list(LOSSES) and skipping.active(CUTMIX, 0) == []
    assert make(()).active(None, 0) == []


def test_a2d_decays_its_loss_at_every_epoch(teacher: Teacher) -> None:
    """Align-to-Distill's ×0.9 an epoch, on the attention loss alone, times the warmup."""
    s = dataclasses.replace(sizes(total_steps=8), steps_per_epoch=3)
    assert HEAD_ALIGNERS["a2d"]().decay == 0.9
    for decay, warmup in ((0.9, "none"), (0.5, "simultaneous")):
        settings = WARMUPS[warmup]()
        objective = make(("rsd", "attn"), s=s, head_aligner=HEAD_ALIGNERS["a2d"](decay=decay), warmup=settings)
        for step, epoch in enumerate((0, 0, 0, 1, 1, 1, 2, 2)):
            plain = settings.ramp("attn", step, 8)
            parts = numbers(run(objective, teacher, step=step))
            assert parts["ramp/attn"] == pytest.approx(plain * decay**epoch, rel=1e-6), (warmup, step)
            assert parts["ramp/rsd"] == plain
            terms = [parts[f"weight/{n}"] * parts[f"ramp/{n}"] * parts[f"loss/{n}"] for n in ("rsd", "attn")]
            total = parts["train/ce"] + sum(terms) + 0.01 * parts["selector/entropy"]
            assert parts["train/loss"] == pytest.approx(total, rel=1e-5), (warmup, step)
    assert {numbers(run(make(("attn",), s=s), teacher, step=step))["ramp/attn"] for step in (0, 3, 7)} == {1.0}


# -- gradients --------------------------------------------------------------------------------------------------------

# A constant that is added to every key does not change the softmax: this parameter may not move, or by rounding.
SOFTMAX_INVARIANT = {"selector.teacher_norm.bias"}
# W_q starts at zero: these parameters get their first gradient at the second step.
BEHIND_ZERO = ("selector.key.", "selector.student_norm.", "selector.teacher_norm.")


@each(
    "name, reached",
    [
        ("rsd", {"losses", "selector", "token_aligner"}),
        ("rel", {"projections", "selector", "token_aligner"}),
        ("spectral", {"projections", "selector", "token_aligner"}),
        ("attn", {"head_aligner"}),
    ],
)
@each("mix", MIXES)
def test_gradients_reach_exactly_what_they_should(name: str, reached: set[str], mix: str, teacher: Teacher) -> None:
    """Without cross-entropy the student's gradient up to the last point is the loss's own."""
    objective, student = make((name,), objective=ObjectiveConfig(ce_weight=0.0)), build_student()
    run(objective, teacher, student=student, mix=MIXES[mix]).total.backward()
    for key, has in gradients(objective).items():
        expected = key.split(".")[0] in reached and not key.startswith(BEHIND_ZERO)
        if name == "rel" and key.startswith("projections.") and key.endswith("bias"):
            continue  # edges do not feel a shift
        assert has == expected, key
    assert all(p.grad is not None and p.grad.any() for p in student.blocks[:2].parameters())
    assert student.head.weight.grad is None or not student.head.weight.grad.any()
    assert not any(p.requires_grad or p.grad is not None for p in teacher.model.parameters())


def test_detached_aligner_gets_no_gradient_but_the_selector_does(teacher: Teacher) -> None:
    objective = make(token_aligner=TOKEN_ALIGNERS["cross_attention"](gradient="detached"))
    run(objective, teacher).total.backward()
    got = gradients(objective)
    assert not any(has for name, has in got.items() if name.startswith("token_aligner."))
    assert got["selector.bias"]


def train(objective: Objective, teacher: Teacher, steps: int = 3) -> dict[str, Tensor]:
    student = build_student()
    before = copy.deepcopy({**dict(student.named_parameters()), **dict(objective.named_parameters())})
    together = [*student.parameters(), *objective.parameters()]
    optimizer = torch.optim.AdamW(together, lr=1e-3, weight_decay=0.0)
    tapped = TappedStudent(student, POINTS, objective.demands.maps)
    for step in range(steps):
        images, clean, labels = data(step)
        output = objective(tapped(images), teacher(clean), labels, None, step, generator)
        optimizer.zero_grad(set_to_none=True)
        output.total.backward()
        optimizer.step()
    after = {**dict(student.named_parameters()), **dict(objective.named_parameters())}
    return {name: after[name].detach() - before[name].detach() for name in after}


def test_every_parameter_moves_and_none_by_rounding_alone(teacher: Teacher) -> None:
    """AdamW turns a gradient of pure rounding into full steps: such a parameter would be a random walk."""
    objective = make()
    moved = train(objective, teacher)
    assert {name for name, delta in moved.items() if not delta.any()} <= SOFTMAX_INVARIANT
    # W_q is no longer zero
    objective.zero_grad()
    run(objective, teacher, seed=5).total.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        # rounding is 1e-7 of the terms of a sum; every real gradient here is far larger
        assert float(parameter.grad.norm()) > 1e-8 or name in SOFTMAX_INVARIANT, name


def test_mixing_leaves_gradients_finite_for_one_image(teacher: Teacher) -> None:
    objective, student = make(), build_student()
    images, clean, labels = data()
    out = TappedStudent(student, POINTS, True)(images[:1])
    output = objective(out, teacher(clean[:1]), labels[:1], CUTMIX, 0, generator)
    output.total.backward()
    assert torch.isfinite(output.total)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in objective.parameters())


# -- bookkeeping ------------------------------------------------------------------------------------------------------


def test_initial_weights_depend_on_the_name_only() -> None:
    everything = dict(make().named_parameters())
    for name in LOSSES:
        for key, parameter in make((name,)).named_parameters():
            assert torch.equal(parameter, everything[key]), key


def test_same_inputs_give_the_same_bits_and_so_does_a_checkpoint(teacher: Teacher) -> None:
    objective, other = make(), make()
    assert numbers(run(objective, teacher, mix=CUTMIX)) == numbers(run(other, teacher, mix=CUTMIX))
    again = make()
    again.load_state_dict(objective.state_dict())
    for seed in (1, 2):
        assert numbers(run(again, teacher, seed=seed)) == numbers(run(objective, teacher, seed=seed))
    first = numbers(run(make(), teacher, seed=1))
    assert first["weight/rsd"] == pytest.approx(1, rel=1e-5)
    assert numbers(run(objective, teacher, seed=1))["weight/rsd"] != first["weight/rsd"]


def test_decayed_parameters_are_weights_of_maps() -> None:
    objective = make()
    decayed = objective.decayed_parameters()
    known = dict(objective.named_parameters())
    assert decayed and decayed <= set(known)
    assert all(known[name].ndim > 1 for name in decayed)
    assert not any(name.startswith(("selector.", "token_aligner.", "head_aligner.")) for name in decayed)
