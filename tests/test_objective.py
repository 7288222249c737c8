import contextlib
import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from basd.components.head_aligners import HEAD_ALIGNERS
from basd.components.losses import LOSSES, TOKEN_LOSSES, LossesConfig
from basd.components.selectors import SELECTORS
from basd.components.sizes import Sizes
from basd.components.target_mixing import mix_attention, mix_tokens
from basd.components.token_aligners import TOKEN_ALIGNERS
from basd.components.warmup import WARMUPS, NoWarmupConfig
from basd.components.weighting import WEIGHTINGS
from basd.data.mixing import Mix
from basd.models.student import StudentOutput, TappedStudent
from basd.models.teacher import Teacher, TeacherOutput
from basd.objective import Objective, ObjectiveConfig, ObjectiveOutput, Parts

torch.set_num_threads(1)  # small tensors: more threads only slow them down

POINTS, CLASSES, BATCH = (1, 3), 5, 4
CUTMIX = Mix("cutmix", 1 - 16 * 12 / 24**2, (8, 24, 6, 18))  # on the edges of patches
MIXUP = Mix("mixup", 0.3)
MIXES = {"none": None, "mixup": MIXUP, "cutmix": CUTMIX}


def perturb(model: nn.Module, amount: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount * torch.randn_like(parameter))


def build_student() -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=24, patch_size=(8, 6), num_classes=CLASSES, embed_dim=12, depth=4, num_heads=2, mlp_ratio=2.0
    )
    perturb(model, 0.1)
    return model


def build_teacher(heads: int = 4, width: int = 16) -> Teacher:
    torch.manual_seed(1)
    model = VisionTransformer(
        img_size=(20, 12), patch_size=4, num_classes=0, embed_dim=width, depth=3, num_heads=heads, reg_tokens=2
    )
    perturb(model, 0.2)
    return Teacher(model)


def sizes(heads: int = 4, width: int = 16, total_steps: int = 100) -> Sizes:
    return Sizes(
        points=POINTS,
        image_size=24,
        student_depth=4,
        student_width=12,
        student_heads=2,
        student_grid=(3, 4),
        teacher_depth=3,
        teacher_width=width,
        teacher_heads=heads,
        teacher_grid=(5, 3),
        total_steps=total_steps,
    )


@contextlib.contextmanager
def isolate(name: str) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, name)))
        yield


def generator(purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(len(purpose))


def make(enabled: tuple[str, ...] = tuple(LOSSES), s: Sizes | None = None, **choices: Any) -> Objective:
    """An objective with these losses on; without a warmup unless one is named."""
    losses = LossesConfig()
    for name in enabled:
        getattr(losses, name).enabled = True
    for key in [k for k in choices if k in LOSSES]:
        for field, value in choices.pop(key).items():
            setattr(getattr(losses, key), field, value)
    parts = Parts(
        losses=losses,
        selector=choices.pop("selector", SELECTORS["adaptive_spectral"]()),
        token_aligner=choices.pop("token_aligner", TOKEN_ALIGNERS["cross_attention"]()),
        head_aligner=choices.pop("head_aligner", HEAD_ALIGNERS["conv"]()),
        weighting=choices.pop("weighting", WEIGHTINGS["uwso"]()),
        warmup=choices.pop("warmup", NoWarmupConfig()),
        objective=choices.pop("objective", ObjectiveConfig()),
        mixing_targets=choices.pop("mixing_targets", "follow"),
    )
    assert not choices
    return Objective(parts, s or sizes(), isolate)


def data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Student images, teacher images, soft labels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (BATCH,), generator=g)
    return (
        torch.randn(BATCH, 3, 24, 24, generator=g),
        torch.randn(BATCH, 3, 20, 12, generator=g),
        F.one_hot(labels, CLASSES).float(),
    )


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return build_teacher()


def run(
    objective: Objective,
    teacher: Teacher | None,
    *,
    student: VisionTransformer | None = None,
    mix: Mix | None = None,
    step: int = 0,
    seed: int = 0,
    diagnose: bool = False,
) -> ObjectiveOutput:
    images, clean, labels = data(seed)
    student = build_student() if student is None else student
    points = POINTS if objective.uses_teacher else ()
    out = TappedStudent(student, points, objective.uses_attention)(images)
    seen = teacher(clean) if teacher is not None else None
    if mix is not None:
        labels = mix.convex(labels)
    return objective(out, seen, labels, mix, step, generator, diagnose=diagnose)


def number(value: Tensor | float) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else value


def numbers(output: ObjectiveOutput) -> dict[str, float]:
    return {name: number(value) for name, value in output.parts.items()}


class Calls:
    """Counts the forward passes of a module and keeps what went in and out of the last."""

    def __init__(self, module: nn.Module | None) -> None:
        self.count = 0
        self.inputs: tuple[Any, ...] = ()
        self.output: Any = None
        assert module is not None
        module.register_forward_hook(self._hook)

    def _hook(self, _module: nn.Module, inputs: tuple, output: Any) -> None:
        self.count, self.inputs, self.output = self.count + 1, inputs, output


def gradients(objective: Objective) -> dict[str, bool]:
    """Whether each parameter has a gradient that is not zero."""
    return {
        name: parameter.grad is not None and bool((parameter.grad != 0).any())
        for name, parameter in objective.named_parameters()
    }


# -- the sum and its parts --------------------------------------------------------------------------------------------


def test_cross_entropy_alone_needs_no_teacher() -> None:
    objective = make(enabled=())
    assert not objective.uses_teacher and not objective.uses_attention
    assert not list(objective.parameters()) and objective.layer_shares() is None
    student = build_student()
    output = run(objective, None, student=student)
    images, _, labels = data()
    expected = F.cross_entropy(student(images), labels)
    assert number(output.total) == pytest.approx(number(expected))
    assert set(output.parts) == {"train/ce", "train/loss"}
    output.total.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_weight_of_the_cross_entropy(weight: float, teacher: Teacher) -> None:
    parts = numbers(run(make(objective=ObjectiveConfig(ce_weight=weight)), teacher))
    plain = numbers(run(make(), teacher))
    assert parts["train/loss"] - plain["train/loss"] == pytest.approx((weight - 1) * plain["train/ce"], abs=1e-5)


def test_named_parts(teacher: Teacher) -> None:
    output = run(make(), teacher)
    expected = {"train/ce", "train/loss", "selector/entropy", "selector/entropy/1", "selector/entropy/3"}
    expected |= {f"{what}/{name}" for what in ("loss", "weight", "ramp") for name in LOSSES}
    assert expected <= set(output.parts)
    assert not any(name.startswith("aligner/") for name in output.parts)
    for name, value in output.parts.items():
        assert isinstance(value, float | int) or (value.ndim == 0 and not value.requires_grad), name
    diagnosed = set(run(make(), teacher, diagnose=True).parts) - set(output.parts)
    kinds = ("input_variance_share", "spatial_variance_share", "row_entropy", "effective_rank")
    assert diagnosed == {f"aligner/{kind}/{point}" for kind in kinds for point in POINTS}


@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("step", [0, 7, 12, 18, 60])
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


@pytest.mark.parametrize("enabled", [c for k in range(1, 5) for c in itertools.combinations(LOSSES, k)])
def test_every_set_of_losses(enabled: tuple[str, ...], teacher: Teacher) -> None:
    objective = make(enabled)
    output = run(objective, teacher)
    assert {name for name in output.parts if name.startswith("weight/")} == {f"weight/{name}" for name in enabled}
    output.total.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


def test_losses_start_near_one(teacher: Teacher) -> None:
    parts = numbers(run(make(), teacher))
    for name in LOSSES:
        assert 0.4 < parts[f"loss/{name}"] < 2.0, name


def test_same_inputs_same_bits(teacher: Teacher) -> None:
    first, second = run(make(), teacher, mix=CUTMIX), run(make(), teacher, mix=CUTMIX)
    assert numbers(first) == numbers(second)


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


@pytest.mark.parametrize("entropy, sign, offset", [("sparsify", 1, 0), ("spread", -1, 1), ("none", 0, 0)])
def test_entropy_term(entropy: str, sign: int, offset: int, teacher: Teacher) -> None:
    config = SELECTORS["adaptive_spectral"](entropy=entropy, entropy_weight=0.3)
    parts = numbers(run(make(selector=config), teacher))
    total = parts["train/ce"] + sum(parts[f"weight/{n}"] * parts[f"loss/{n}"] for n in LOSSES)
    term = 0.3 * (offset + sign * parts["selector/entropy"])
    assert parts["train/loss"] == pytest.approx(total + term, rel=1e-5)
    assert 0 <= parts["selector/entropy"] <= 1
    by_point = [parts[f"selector/entropy/{point}"] for point in POINTS]
    assert parts["selector/entropy"] == pytest.approx(sum(by_point) / 2)


def test_entropy_term_stops_with_attention_alone(teacher: Teacher) -> None:
    objective = make(("attn",), selector=SELECTORS["adaptive_spectral"](entropy_weight=0.3))
    output = run(objective, teacher)
    parts = numbers(output)
    assert parts["train/loss"] == pytest.approx(parts["train/ce"] + parts["loss/attn"], rel=1e-5)
    output.total.backward()
    assert not any(has for name, has in gradients(objective).items() if name.startswith("selector."))


@pytest.mark.parametrize("selector", ["uniform", "forward"])
def test_controls_have_no_entropy_term(selector: str, teacher: Teacher) -> None:
    parts = numbers(run(make(selector=SELECTORS[selector]()), teacher))
    total = parts["train/ce"] + sum(parts[f"weight/{n}"] * parts[f"loss/{n}"] for n in LOSSES)
    assert parts["train/loss"] == pytest.approx(total, rel=1e-5)


# -- off means not computed -------------------------------------------------------------------------------------------


def test_what_is_off_does_not_exist() -> None:
    objective = make(("attn",))
    assert objective.token_aligner is None and objective.projections is None
    assert set(objective.losses) == {"attn"}
    objective = make(("rsd",))
    assert objective.head_aligner is None and objective.projections is None and not objective.uses_attention
    assert make(("rel",)).projections is not None and make(("spectral",)).projections is not None
    assert make(("rel",), s=sizes(width=12)).projections is None


def test_a_loss_with_ramp_zero_is_not_computed(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make(warmup=WARMUPS["staggered"]())  # starts 0, 5, 10, 15
    losses = {name: Calls(objective.losses[name]) for name in LOSSES}
    heads = Calls(objective.head_aligner)
    maps: list[int] = []
    original = TeacherOutput.attention
    monkeypatch.setattr(TeacherOutput, "attention", lambda self, grid: (maps.append(1), original(self, grid))[1])
    for step, expected in ((0, [1, 0, 0, 0]), (6, [2, 1, 0, 0]), (12, [3, 2, 1, 0]), (18, [4, 3, 2, 1])):
        output = run(objective, teacher, step=step)
        assert [losses[name].count for name in LOSSES] == expected
        assert len(maps) == heads.count == expected[2]
        active = [name for name in LOSSES if f"loss/{name}" in output.parts]
        assert active == list(LOSSES)[: 1 + (0, 6, 12, 18).index(step)]


def test_projections_rest_until_a_loss_reads_them(teacher: Teacher) -> None:
    objective = make(warmup=WARMUPS["staggered"]())
    assert objective.projections is not None
    calls = [Calls(module) for module in objective.projections.modules() if isinstance(module, nn.Linear)]
    run(objective, teacher, step=0).total.backward()  # rsd only
    assert not any(call.count for call in calls)
    assert not any(has for name, has in gradients(objective).items() if name.startswith("projections."))


def test_token_parts_rest_while_only_attention_runs(teacher: Teacher) -> None:
    warmup = WARMUPS["staggered"]()
    warmup.starts.rsd = warmup.starts.rel = warmup.starts.spectral = 0.5
    objective = make(warmup=warmup)
    aligner = Calls(objective.token_aligner)
    parts = numbers(run(objective, teacher, step=20))
    assert aligner.count == 0 and "loss/attn" in parts and "loss/rsd" not in parts
    # α gets no gradient from a loss, so there is no entropy term either
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


def test_attention_is_not_rebuilt_without_attn(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: TeacherOutput, grid: tuple[int, int]) -> Tensor:
        raise AssertionError("attention was rebuilt")

    monkeypatch.setattr(TeacherOutput, "attention", refuse)
    run(make(("rsd", "rel", "spectral")), teacher)


# -- gradients --------------------------------------------------------------------------------------------------------

# A constant added to every key leaves the softmax as it is: this one may stand still or drift by rounding.
SOFTMAX_INVARIANT = {"selector.teacher_norm.bias"}
# At the first step W_q is zero: what lies behind it gets its first gradient at the second.
BEHIND_ZERO = ("selector.key.", "selector.student_norm.", "selector.teacher_norm.")


@pytest.mark.parametrize(
    "name, reached",
    [
        ("rsd", {"losses", "selector", "token_aligner"}),
        ("rel", {"projections", "selector", "token_aligner"}),
        ("spectral", {"projections", "selector", "token_aligner"}),
        ("attn", {"head_aligner"}),
    ],
)
@pytest.mark.parametrize("mix", MIXES)
def test_gradients_reach_exactly_what_they_should(name: str, reached: set[str], mix: str, teacher: Teacher) -> None:
    objective, student = make((name,)), build_student()
    run(objective, teacher, student=student, mix=MIXES[mix]).total.backward()
    for key, has in gradients(objective).items():
        expected = key.split(".")[0] in reached and not key.startswith(BEHIND_ZERO)
        if name == "rel" and key.startswith("projections.") and key.endswith("bias"):
            continue  # edges do not feel a shift
        assert has == expected, key
    assert all(p.grad is not None and p.grad.any() for p in student.blocks[:2].parameters())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.model.parameters())


def test_losses_are_what_moves_the_early_blocks(teacher: Teacher) -> None:
    """Each loss alone, without cross-entropy, reaches the student up to the last point."""
    for name in LOSSES:
        student = build_student()
        objective = make((name,), objective=ObjectiveConfig(ce_weight=0.0))
        run(objective, teacher, student=student).total.backward()
        assert all(p.grad is not None and p.grad.any() for p in student.blocks[:2].parameters()), name
        assert student.head.weight.grad is None or not student.head.weight.grad.any()


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
    tapped = TappedStudent(student, POINTS, objective.uses_attention)
    for step in range(steps):
        images, clean, labels = data(step)
        output = objective(tapped(images), teacher(clean), labels, None, step, generator)
        optimizer.zero_grad(set_to_none=True)
        output.total.backward()
        optimizer.step()
    after = {**dict(student.named_parameters()), **dict(objective.named_parameters())}
    return {name: after[name].detach() - before[name].detach() for name in after}


def test_every_parameter_moves_within_three_steps(teacher: Teacher) -> None:
    moved = train(make(), teacher)
    still = [name for name, delta in moved.items() if not delta.any()]
    assert set(still) <= SOFTMAX_INVARIANT


def test_no_parameter_is_driven_by_rounding_alone(teacher: Teacher) -> None:
    """AdamW turns a gradient of pure rounding into full steps: such a parameter would be a random walk."""
    objective = make()
    train(objective, teacher)  # W_q has left zero
    objective.zero_grad()
    run(objective, teacher, seed=5).total.backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None
        # rounding lies seven digits below the terms of a sum; every real gradient here is far above
        assert float(parameter.grad.norm()) > 1e-8 or name in SOFTMAX_INVARIANT, name


def test_mixing_leaves_gradients_finite_for_one_image(teacher: Teacher) -> None:
    objective, student = make(), build_student()
    images, clean, labels = data()
    out = TappedStudent(student, POINTS, True)(images[:1])
    output = objective(out, teacher(clean[:1]), labels[:1], CUTMIX, 0, generator)
    output.total.backward()
    assert torch.isfinite(output.total)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in objective.parameters())


# -- targets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", SELECTORS)
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
    loss = Calls(objective.losses["attn"])
    run(objective, teacher)
    target = loss.inputs[1]
    expected = teacher(data()[1]).attention((3, 4)).mean(0)
    for m in range(2):
        torch.testing.assert_close(target[m], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(target.sum(-1), torch.ones(target.shape[:-1]))


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
@pytest.mark.parametrize("targets", ["follow", "clean"])
@pytest.mark.parametrize("name", LOSSES)
def test_targets_follow_the_mixing(name: str, targets: str, mix: str, teacher: Teacher) -> None:
    """Target mixing comes after the token aligner, on the student's grid."""
    chosen = MIXES[mix]
    assert chosen is not None
    objective = make((name,), mixing_targets=targets)
    loss = Calls(objective.losses[name])
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


def test_rel_and_spectral_share_one_projection(teacher: Teacher) -> None:
    objective = make()
    rel, spectral, rsd = (Calls(objective.losses[name]) for name in ("rel", "spectral", "rsd"))
    run(objective, teacher)
    assert torch.equal(rel.inputs[0], spectral.inputs[0]) and rel.inputs[0].shape == (2, BATCH, 12, 16)
    assert rsd.inputs[0].shape == (2, BATCH, 12, 12)
    assert sum(p.numel() for n, p in objective.named_parameters() if n.startswith("projections.")) == 2 * (12 * 16 + 16)


def test_equal_widths_need_no_projection() -> None:
    objective = make(s=sizes(width=12))
    rel = Calls(objective.losses["rel"])
    student = build_student()
    run(objective, build_teacher(width=12), student=student)
    tokens = TappedStudent(student, POINTS, False)(data()[0]).tokens
    torch.testing.assert_close(rel.inputs[0], tokens)


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_token_counts_are_checked(name: str, teacher: Teacher) -> None:
    """components.md, rule 4: N == h·w is checked."""
    objective = make((name,))
    tokens = torch.randn(2, BATCH, 13, 12, requires_grad=True)
    out = StudentOutput(torch.randn(BATCH, CLASSES), tokens)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        objective(out, teacher(data()[1]), data()[2], None, 0, generator)


def test_a_skipped_attention_loss_does_not_starve_the_others() -> None:
    """Every point skipped: attn has nothing to say, which is not the same as a perfect match."""
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


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("warmup", WARMUPS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("head_aligner", HEAD_ALIGNERS)
@pytest.mark.parametrize("token_aligner", TOKEN_ALIGNERS)
@pytest.mark.parametrize("selector", SELECTORS)
def test_every_combination_runs(
    selector: str, token_aligner: str, head_aligner: str, weighting: str, warmup: str, mix: str
) -> None:
    heads = 2 if head_aligner == "none" else 4
    objective = make(
        s=sizes(heads),
        selector=SELECTORS[selector](),
        token_aligner=TOKEN_ALIGNERS[token_aligner](),
        head_aligner=HEAD_ALIGNERS[head_aligner](),
        weighting=WEIGHTINGS[weighting](),
        warmup=WARMUPS[warmup](),
    )
    check_runs(objective, cached_teacher(heads), MIXES[mix])


TEACHERS: dict[int, Teacher] = {}


def cached_teacher(heads: int) -> Teacher:
    if heads not in TEACHERS:
        TEACHERS[heads] = build_teacher(heads)
    return TEACHERS[heads]


def choices_of(group: str, registry: dict[str, type]) -> list[tuple[str, str, str, Any]]:
    found = []
    for name, config in registry.items():
        for field in dataclasses.fields(config):
            found += [(group, name, field.name, choice) for choice in field.metadata.get("choices", ())]
    return found


FIELDS = [
    *choices_of("losses", LOSSES),
    *choices_of("selector", SELECTORS),
    *choices_of("token_aligner", TOKEN_ALIGNERS),
    *choices_of("head_aligner", HEAD_ALIGNERS),
    *choices_of("weighting", WEIGHTINGS),
    *choices_of("warmup", WARMUPS),
]


@pytest.mark.parametrize("group, name, field, choice", FIELDS)
def test_every_choice_of_a_setting_runs(group: str, name: str, field: str, choice: Any, teacher: Teacher) -> None:
    registry: dict[str, dict[str, Callable[..., Any]]] = {
        "selector": SELECTORS,
        "token_aligner": TOKEN_ALIGNERS,
        "weighting": WEIGHTINGS,
        "warmup": WARMUPS,
        "head_aligner": HEAD_ALIGNERS,
    }
    options: dict[str, Any] = (
        {name: {field: choice}} if group == "losses" else {group: registry[group][name](**{field: choice})}
    )
    check_runs(make(**options), teacher, CUTMIX)


def test_training_moves_the_losses_down(teacher: Teacher) -> None:
    """Forty steps on one batch: every loss ends below its start."""
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


# -- bookkeeping ------------------------------------------------------------------------------------------------------


def test_initial_weights_depend_on_the_name_only() -> None:
    everything = dict(make().named_parameters())
    for name in LOSSES:
        for key, parameter in make((name,)).named_parameters():
            assert torch.equal(parameter, everything[key]), key


def test_weighting_state_survives_the_checkpoint(teacher: Teacher) -> None:
    objective = make()
    run(objective, teacher)
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
