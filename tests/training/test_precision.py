"""Half precision changes how a step is computed and nothing else; what cannot be compiled goes on without."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from tiny import MemoryRecorder, same_bits, state_of
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook
from watching import student_steps

from basd.compose import compose
from basd.config import FrozenArm, from_dict
from basd.models.student import TappedStudent
from basd.models.teacher import Teacher, TeacherOutput
from basd.objective import Objective
from basd.training import precision
from basd.training.cohort import train_cohort
from basd.training.precision import choose_precision, compiler, make_scaler

MakeArm = Callable[..., FrozenArm]
CPU = torch.device("cpu")
STEPS = "recipe.duration=4 steps"
SHORT = "recipe.duration=2 steps"


def train(arm: FrozenArm, folder: Path, **callbacks) -> tuple[MemoryRecorder, list]:
    recorder = MemoryRecorder()
    return recorder, train_cohort([arm], [folder], [recorder], **callbacks)


def first_losses(recorder: MemoryRecorder) -> dict[str, float]:
    return {name: value for name, value in recorder.results[0][1].items() if name.startswith(("loss/", "train/ce"))}


def test_auto_is_bf16_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    for wanted, device, has, chosen in (
        ("auto", "cpu", True, "fp32"),
        ("auto", "cuda", True, "bf16"),
        ("auto", "cuda", False, "fp32"),
        ("fp16", "cuda", True, "fp16"),
        ("bf16", "cpu", False, "bf16"),
        ("fp32", "cuda", True, "fp32"),
    ):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert choose_precision(wanted, torch.device(device)) == chosen, (wanted, device, has)


@pytest.fixture(scope="module")
def reference(few_arm: MakeArm, tmp_path_factory: pytest.TempPathFactory) -> MemoryRecorder:
    recorder, _ = train(few_arm(STEPS, "warmup=none"), tmp_path_factory.mktemp("fp32"))
    return recorder


@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_half_precision_trains_close_to_float32(
    half: str, few_arm: MakeArm, reference: MemoryRecorder, tmp_path: Path
) -> None:
    outputs: list[TeacherOutput] = []
    scores: set[torch.dtype] = set()
    totals: set[torch.dtype] = set()

    def seen(module: torch.nn.Module, inputs: tuple, output: Any) -> None:
        if isinstance(module, Objective):
            scores.add(inputs[0].scores.dtype)
            outputs.append(inputs[1])
            totals.add(output.total.dtype)

    arm = few_arm(STEPS, "warmup=none", f"runtime.precision={half}")
    handle = register_module_forward_hook(seen)
    try:
        recorder, (result,) = train(arm, tmp_path)
    finally:
        handle.remove()
    assert result.status == "complete", result.reason
    assert {value.dtype for value in state_of(tmp_path).values()} == {torch.float32}
    assert scores == {precision.HALF[half]} and totals == {torch.float32}
    # the maps are kept in the teacher's precision, once a step
    assert len({id(output) for output in outputs}) == 4
    assert {outputs[0].attention((5, 5)).dtype, outputs[0].tokens.dtype} == {precision.HALF[half], torch.float32}
    sums = outputs[0].attention((5, 5)).float().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=0.02)
    expected, got = first_losses(reference), first_losses(recorder)
    assert got == pytest.approx(expected, rel=0.05, abs=0.01)
    assert got != expected, "nothing was computed in half precision"


def test_precision_and_compile_are_no_part_of_the_arm(few_arm: MakeArm) -> None:
    plain, half = few_arm(), few_arm("runtime.precision=bf16", "runtime.compile=on")
    assert plain.arm_key == half.arm_key
    assert plain.cohort_key != half.cohort_key, "the teacher's forward differs"
    assert plain.cohort_key == few_arm("runtime.precision=auto").cohort_key


def test_another_precision_on_resume_is_said(
    few_arm: MakeArm, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stops = iter([False, False, True])
    arm = few_arm(STEPS, "method=ce", "runtime.precision=fp16")
    train(arm, tmp_path, stop=lambda: next(stops))
    with caplog.at_level(logging.WARNING):
        _, (result,) = train(few_arm(STEPS, "method=ce"), tmp_path / "none")
        assert "goes on" not in caplog.text
        recorder = MemoryRecorder()
        recorder.events = [(0, {})] * 100
        (result,) = train_cohort([few_arm(STEPS, "method=ce", "runtime.precision=bf16")], [tmp_path], [recorder])
    assert result.status == "complete"
    assert "bf16" in caplog.text
    assert "fp16" in caplog.text


# -- the loss scale ----------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's scaler with a scale that overflows at first and changes with almost every step."""
    quick = partial(torch.amp.GradScaler, init_scale=2.0**24, growth_interval=2)
    monkeypatch.setattr(torch.amp, "GradScaler", quick)


def test_only_float16_is_scaled() -> None:
    assert make_scaler(CPU, None) is None
    assert make_scaler(CPU, torch.bfloat16) is None
    assert isinstance(make_scaler(CPU, torch.float16), torch.amp.GradScaler)


def test_a_step_that_the_scaler_leaves_out_is_no_failure(few_arm: MakeArm, tmp_path: Path, quick_scale: None) -> None:
    heads: list[Tensor] = []

    def seen(student: VisionTransformer, _arm: int, _step: int) -> None:
        heads.append(student.head.weight.detach().clone())

    with student_steps(seen):
        recorder, (result,) = train(
            few_arm("recipe.duration=12 steps", "runtime.precision=fp16", "runtime.log_every=1"), tmp_path
        )
    heads.append(state_of(tmp_path)["head.weight"])
    assert result.status == "complete", result.reason
    steps = [values for _, values in recorder.results if "train/loss_scale" in values]
    scales = [2.0**24, *(values["train/loss_scale"] for values in steps)]
    skipped = [after < before for before, after in itertools.pairwise(scales)]
    assert skipped[0]
    assert not all(skipped)
    assert len(heads) == len(skipped) + 1
    for step, left_out in enumerate(skipped):
        assert torch.equal(heads[step + 1], heads[step]) == left_out, step
    assert all(("train/grad_norm" in values) != left_out for values, left_out in zip(steps, skipped, strict=True))
    assert all(math.isfinite(value) for values in steps for value in values.values())


def test_float16_resumes_bit_for_bit_with_its_scale(few_arm: MakeArm, tmp_path: Path, quick_scale: None) -> None:
    arm = few_arm("recipe.duration=7 steps", "runtime.precision=fp16", "runtime.log_every=1")
    whole, _ = train(arm, tmp_path / "whole")
    recorder = MemoryRecorder()
    calls = iter(range(100))
    train_cohort([arm], [tmp_path / "cut"], [recorder], stop=lambda: next(calls) >= 4)
    saved = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["arm"]["scaler"]
    assert saved["scale"] != 2.0**24, "the scale of the checkpoint is not the one it would start with"
    train_cohort([arm], [tmp_path / "cut"], [recorder])
    assert recorder.results == whole.results
    assert same_bits(state_of(tmp_path / "cut"), state_of(tmp_path / "whole"))


def test_gradients_that_no_scale_makes_finite_fail_the_arm(
    few_arm: MakeArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(student: VisionTransformer, _arm: int, step: int) -> None:
        if step == 0:
            student.head.weight.register_hook(lambda gradient: gradient * math.inf)

    # a few steps above the least scale
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**-21))
    with student_steps(broken):
        _, (result,) = train(few_arm("method=ce", "runtime.precision=fp16"), tmp_path)
    assert result.status == "failed"
    assert "not finite at any loss scale; choose runtime.precision=bf16" in result.reason


# -- compile -----------------------------------------------------------------------------------------------------------

SMALL = {"img_size": 12, "patch_size": 4, "num_classes": 5, "embed_dim": 24, "depth": 2, "num_heads": 3}
MODELS: dict[str, Callable[[], VisionTransformer]] = {
    "drop_path": lambda: VisionTransformer(**SMALL, drop_path_rate=0.5),
    "layer_scale": lambda: VisionTransformer(**SMALL, init_values=0.5),
    "qk_norm": lambda: VisionTransformer(**SMALL, qk_norm=True),
    "pre_norm": lambda: VisionTransformer(**SMALL, pre_norm=True),
    "registers": lambda: VisionTransformer(**SMALL, reg_tokens=4, no_embed_class=True),
    "distilled": lambda: VisionTransformerDistilled(**SMALL),
}


def counting(graphs: list[int]) -> Callable:
    def backend(graph: torch.fx.GraphModule, _inputs: list) -> Callable:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    return backend


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before or after."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.full
def test_tapped_forward_passes_are_one_graph_and_bit_equal(
    monkeypatch: pytest.MonkeyPatch, fresh_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    graphs: list[int] = []
    monkeypatch.setattr(precision, "BACKEND", counting(graphs))
    for name in MODELS:
        graphs.clear()
        wrap = compiler("on", CPU)
        torch.manual_seed(0)
        model, images = MODELS[name]().train(), torch.randn(4, 3, 12, 12)
        outputs = []
        for student in (TappedStudent(model, (0, 1), True), TappedStudent(model, (0, 1), True, wrap)):
            torch.manual_seed(1)
            out = student(images)
            outputs.append([out.logits, out.tokens, out.scores, out.cls, out.features])
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True)), name
        assert len(graphs) == 1, name
        frozen = MODELS[name]()
        seen = [Teacher(frozen)(images), Teacher(frozen, wrap=wrap)(images)]
        for read in (lambda o: o.tokens, lambda o: o.cls, lambda o: o.attention((2, 2)), lambda o: o.features):
            assert torch.equal(read(seen[0]), read(seen[1])), name
        assert len(graphs) == 2, name
    said = [record for record in caplog.records if record.name.startswith("basd")]
    assert not said, "a graph break would have been said"


def test_arms_of_a_cohort_share_their_graph(
    few_arm: MakeArm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_compiler: None
) -> None:
    graphs: list[int] = []
    monkeypatch.setattr(precision, "BACKEND", counting(graphs))
    rows = [("warmup=none",), ("selector=uniform",)]
    arms = [few_arm(*row, SHORT, "runtime.compile=on") for row in rows]
    recorders = [MemoryRecorder() for _ in arms]
    results = train_cohort(arms, [tmp_path / arm.arm_key for arm in arms], recorders)
    assert {result.status for result in results} == {"complete"}
    assert len(graphs) == 2, "one for the teacher, one for the students"
    eager, _ = train(few_arm(*rows[0], SHORT), tmp_path / "eager")
    assert eager.results == recorders[0].results


@pytest.mark.full
@pytest.mark.parametrize(("half", "backend"), [("bf16", "aot_eager"), ("fp32", "inductor")])
def test_compiled_steps_are_close_to_eager_ones(
    backend: str,
    half: str,
    few_arm: MakeArm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fresh_compiler: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(precision, "BACKEND", backend)
    arm = (STEPS, "warmup=none", "student.drop_path=0.0", f"runtime.precision={half}", "runtime.log_every=1")
    eager, _ = train(few_arm(*arm), tmp_path / "eager")
    compiled, (result,) = train(few_arm(*arm, "runtime.compile=on"), tmp_path / "compiled")
    assert result.status == "complete", result.reason
    assert "torch.compile does not work" not in caplog.text
    close = {"rel": 1e-3, "abs": 1e-5} if half == "fp32" else {"rel": 0.05, "abs": 0.02}
    for (_, expected), (_, got) in zip(eager.results[:3], compiled.results[:3], strict=True):
        for name in (name for name in expected if name.startswith(("loss/", "train/"))):
            assert got[name] == pytest.approx(expected[name], **close), name


def test_what_cannot_be_compiled_goes_on_without_and_says_so_once(
    few_arm: MakeArm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fresh_compiler: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # a sentence is said once a process
    unheard = f"no compiler in {tmp_path}"

    def backend(graph, inputs):
        raise OSError(f"{unheard}\nand much more")

    monkeypatch.setattr(precision, "BACKEND", backend)
    arms = [few_arm(*row, SHORT, "runtime.compile=on") for row in ((), ("selector=uniform",))]
    recorders = [MemoryRecorder() for _ in arms]
    with caplog.at_level(logging.WARNING):
        results = train_cohort(arms, [tmp_path / arm.arm_key for arm in arms], recorders)
    assert {result.status for result in results} == {"complete"}
    said = [record.getMessage() for record in caplog.records if "torch.compile" in record.getMessage()]
    assert len(said) == 1
    assert unheard in said[0]
    assert "runtime.compile=off" in said[0]
    assert "\n" not in said[0]
    eager, _ = train(few_arm(SHORT), tmp_path / "eager")
    assert eager.results == recorders[0].results


def test_an_error_of_the_model_itself_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, fresh_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "BACKEND", "eager")
    student = TappedStudent(MODELS["layer_scale"](), (0,), False, compiler("on", CPU))
    with pytest.raises(AssertionError, match="doesn't match model"):
        student(torch.randn(1, 3, 20, 20))


def test_compile_is_on_for_cuda_and_off_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def function() -> None: ...

    assert compiler("auto", CPU)(function) is function
    assert compiler("off", torch.device("cuda"))(function) is function
    assert isinstance(compiler("auto", torch.device("cuda"))(function), precision.Compiled)
    assert isinstance(compiler("on", CPU)(function), precision.Compiled)
    config = from_dict(compose(["runtime.compile=on", "runtime.precision=fp16"]).config.to_dict())
    assert (config.runtime.compile, config.runtime.precision) == ("on", "fp16")
