"""`basd export`: what timm and ONNX Runtime make of the files, against the student that was trained."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import onnx
import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

import basd.export as exporting
from basd.cli import main
from basd.config import FrozenArm
from basd.data import load
from basd.data.digits import DigitsConfig
from basd.errors import UserError
from basd.grid.finished import FinishedArm
from basd.grid.worker import prepare
from basd.models.student import StudentConfig, build_student
from basd.tracking.journal import Journal
from basd.tracking.mirror import Mirror
from basd.training.cohort import train_cohort

SETTING = "tiny"


def train(arm: FrozenArm, folder: Path, name: str | None = None, run_tag: str = "", mirrored: bool = True) -> Path:
    directory = folder / "runs" / SETTING / (name or arm.arm_key)
    prepare(arm, directory)
    journal = Journal(directory)
    (result,) = train_cohort([arm], [directory], [journal])
    journal.end(result.status, result.reason, result.metrics)
    journal.close()
    assert result.status == "complete", result.reason
    if mirrored:
        mirror = Mirror(f"sqlite:///{folder}/mlflow.db")
        mirror.add(directory, run_tag=run_tag)
        assert mirror.drain(), mirror.problem
    return directory


@pytest.fixture(scope="module")
def trained(tiny_arm: Callable[..., FrozenArm], tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A plain student with a repetition, and one with the distillation token, in runs/ and in MLflow."""
    folder = tmp_path_factory.mktemp("trained")
    plain = tiny_arm("method=ce", "recipe.duration=4 steps", "recipe.lr=0.01")
    token = tiny_arm("method=deit_hard", "student.distillation_token=true", "recipe.duration=2 steps", seed=1)
    train(plain, folder)
    train(plain, folder, f"{plain.arm_key}-again-1", "again-1")
    train(token, folder)
    return SimpleNamespace(folder=folder, plain=plain.arm_key, token=token.arm_key)


@pytest.fixture
def here(trained: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the working directory; MLflow's artifacts stay where they were written."""
    shutil.copytree(trained.folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


def logits_of(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(images)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    before = sorted(path.name for path in Path().iterdir())
    assert main(["export", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("basd: ")
    assert "Traceback" not in captured.out + captured.err
    assert sorted(path.name for path in Path().iterdir()) == before
    return captured.err


# -- what is written -----------------------------------------------------------------------------------------------------


def test_the_export_is_the_student_that_was_tested(here: Path, trained: SimpleNamespace) -> None:
    assert main(["export", trained.plain[:7]]) == 0
    directory = here / "exports" / trained.plain
    config = config_of(directory)
    model = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
    # the very numbers that training logged, from what the export says of classes, size and statistics
    data = config["pretrained_cfg"]
    test = load(DigitsConfig(image_size=data["input_size"][1])).test
    mean, std = (torch.tensor(data[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.inference_mode():
        found = model((test.images / 255 - mean) / std)
    metrics = config["basd"]["metrics"]
    nll = torch.nn.functional.cross_entropy(found, test.labels).item()
    assert nll == pytest.approx(metrics["test/nll"], rel=1e-5)
    assert (found.argmax(1) == test.labels).double().mean().item() == pytest.approx(metrics["test/top1"])
    assert config["label_names"] == list("0123456789")
    arm = json.loads((here / "runs" / SETTING / trained.plain / "arm.json").read_text())
    assert config["basd"]["code_version"] == arm["version"]
    assert (config["basd"]["arm_key"], config["basd"]["seed"]) == (trained.plain, 0)
    # timm's class from the arguments alone
    args = config["basd"]["args"]
    rebuilt = VisionTransformer(**args)
    rebuilt.load_state_dict(load_file(here / "runs" / SETTING / trained.plain / "student.safetensors"))
    images = torch.randn(3, *data["input_size"])
    assert torch.equal(logits_of(rebuilt, images), logits_of(model, images))
    assert timm.data.resolve_model_data_config(model)["mean"] == data["mean"]


def test_with_a_distillation_token_both_heads_speak(here: Path, trained: SimpleNamespace) -> None:
    assert main(["export", trained.token, "--output", "out"]) == 0
    model = timm.create_model("local-dir:out", pretrained=True)
    student = build_student(StudentConfig(**arm_of(here, trained.token)["config"]["student"]), 10)
    student.load_state_dict(load_file(here / "runs" / SETTING / trained.token / "student.safetensors"))
    images = torch.randn(3, 3, 20, 20)
    assert torch.equal(logits_of(model, images), logits_of(student, images))
    head, second = model.forward_head(model.forward_features(images), pre_logits=True).shape, model.head_dist
    assert head[-1] == second.in_features
    student.train()
    one, other = student(images)
    assert not torch.equal(one, other)


def arm_of(folder: Path, key: str) -> dict[str, Any]:
    return json.loads((folder / "runs" / SETTING / key / "arm.json").read_text())


@pytest.mark.parametrize("token", [False, True])
def test_at_deit_tiny_sizes_timm_takes_the_file_by_its_own_name(token: bool, tmp_path: Path) -> None:
    config = StudentConfig(distillation_token=token)
    student = build_student(config, 1000)
    save_file(student.state_dict(), tmp_path / "student.safetensors")
    arm = finished(tmp_path / "student.safetensors", config)
    made = exporting.export(arm, tmp_path / "out")
    name = "deit_tiny_distilled_patch16_224" if token else "deit_tiny_patch16_224"
    model = timm.create_model(name, checkpoint_path=str(made.directory / "model.safetensors"))
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(logits_of(model, images), logits_of(student, images))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "student.safetensors"]


def finished(weights: Path, student: StudentConfig, **changes: Any) -> FinishedArm:
    facts: dict[str, Any] = {
        "arm_key": "0" * 16,
        "configuration_key": "1" * 16,
        "mark": "",
        "setting": "somewhere",
        "name": "ce",
        "seed": 0,
        "version": "v1",
        "student": vars(student),
        "data": {"name": "digits", "mean": [0.5] * 3, "std": [0.25] * 3},
        "metrics": {"test/top1": 0.5},
        "weights": weights,
        "place": "runs/somewhere",
    }
    return FinishedArm(**{**facts, **changes})


def test_onnx_gives_the_same_logits_for_any_batch(here: Path, trained: SimpleNamespace, capsys) -> None:
    assert main(["export", trained.token, "--onnx"]) == 0
    said = capsys.readouterr().out
    assert float(re.search(r"largest difference (\S+) of", said).group(1)) <= exporting.ONNX_TOLERANCE
    directory = here / "exports" / trained.token
    written = onnx.load(directory / "model.onnx")
    assert [dim.dim_param or dim.dim_value for dim in written.graph.input[0].type.tensor_type.shape.dim][1:] == [
        3,
        20,
        20,
    ]
    assert str(here).encode() not in (directory / "model.onnx").read_bytes()
    assert str(Path(timm.__file__).parent).encode() not in (directory / "model.onnx").read_bytes()
    session = onnxruntime.InferenceSession(directory / "model.onnx", providers=["CPUExecutionProvider"])
    model = timm.create_model(f"local-dir:{directory}", pretrained=True)
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, 20, 20)
        (logits,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), logits_of(model, images), rtol=0, atol=1e-4)
    # an export without ONNX leaves none of the earlier one behind
    assert main(["export", trained.token, "--force"]) == 0
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]


# -- where it is found ---------------------------------------------------------------------------------------------------


def run_ids(folder: Path) -> dict[str, str]:
    """Arm key, with the mark of a repetition, → run id; configurations by "parent"."""
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == SETTING]
    found = {}
    for run in client.search_runs([experiment.experiment_id]):
        tags = run.data.tags
        name = "-".join(filter(None, [tags.get("basd.arm_key", "parent"), tags.get("basd.run")]))
        found[name] = run.info.run_id
    return found


def test_key_directory_and_run_id_mean_the_same_arm(here: Path, trained: SimpleNamespace) -> None:
    wanted = load_file(here / "runs" / SETTING / trained.plain / "student.safetensors")
    run_id = run_ids(here)[trained.plain]
    for number, reference in enumerate([trained.plain, f"runs/{SETTING}/{trained.plain}", run_id]):
        assert main(["export", reference, "--output", f"out{number}"]) == 0
        found = load_file(f"out{number}/model.safetensors")
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
        assert config_of(Path(f"out{number}"))["basd"]["arm_key"] == trained.plain
    assert main(["export", f"{trained.plain}-again-1"]) == 0
    assert config_of(here / "exports" / f"{trained.plain}-again-1")["basd"]["repetition"] == "again-1"


def test_without_the_files_mlflow_has_them(here: Path, trained: SimpleNamespace) -> None:
    wanted = here / "elsewhere" / SETTING / trained.plain
    (here / "runs").rename(here / "elsewhere")
    ids = run_ids(here)
    references = [trained.plain[:9], ids[trained.plain], f"{trained.plain}-again-1"]
    for number, reference in enumerate(references):
        assert main(["export", reference, "--output", f"out{number}"]) == 0
        assert load_file(f"out{number}/model.safetensors").keys() == load_file(wanted / "student.safetensors").keys()
    first, last = (config_of(here / f"out{number}")["basd"] for number in (0, 2))
    assert first["metrics"] == config_of_metrics(wanted)
    assert (first["repetition"], last["repetition"]) == ("", "again-1")
    # a directory whose student is gone: its copy in MLflow
    (here / "elsewhere").rename(here / "runs")
    (here / "runs" / SETTING / trained.plain / "student.safetensors").unlink()
    assert main(["export", trained.plain, "--output", "out9"]) == 0


def config_of_metrics(directory: Path) -> dict[str, float]:
    last = json.loads((directory / "journal.jsonl").read_text().splitlines()[-1])
    return {name: value for name, value in sorted(last["metrics"].items()) if name.startswith("test/")}


def test_an_arm_trained_without_a_tracker_is_exported_from_its_directory(here: Path, trained: SimpleNamespace) -> None:
    source, plain = here / "runs" / SETTING / trained.plain, here / "gpu"
    plain.mkdir()
    for name in ("arm.json", "student.safetensors"):
        shutil.copy(source / name, plain)
    (plain / "metrics.jsonl").write_text(json.dumps({"step": 4, "metrics": {"test/top1": 0.25}}) + "\n")
    assert main(["export", "gpu", "--output", "out"]) == 0
    assert config_of(here / "out")["basd"]["metrics"] == {"test/top1": 0.25}


def test_register_makes_a_version_that_leads_to_the_run_and_loads(here: Path, trained: SimpleNamespace, capsys) -> None:
    assert main(["export", trained.plain, "--register"]) == 0
    assert f"version 1 of {SETTING}" in capsys.readouterr().out
    assert main(["export", trained.plain, "--register", "--force"]) == 0
    assert "before as version 1" in capsys.readouterr().out
    client = mlflow.MlflowClient(f"sqlite:///{here}/mlflow.db")
    (version,) = client.search_model_versions(f"name='{SETTING}'")
    assert version.run_id == run_ids(here)[trained.plain]
    assert version.tags["basd.arm_key"] == trained.plain
    source = Path(client.get_model_version_download_uri(SETTING, version.version).removeprefix("file://"))
    assert sorted(path.name for path in source.iterdir()) == ["config.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{source}", pretrained=True)
    wanted = load_file(here / "runs" / SETTING / trained.plain / "student.safetensors")
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())


# -- what is refused -----------------------------------------------------------------------------------------------------


def test_an_empty_folder_knows_no_run_and_gets_no_database(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert "no arm abc is known" in refusal(["abc"], capsys)
    assert f"no arm {'a' * 32} is known" in refusal(["a" * 32], capsys)
    assert "neither an arm's directory nor an arm key" in refusal(["../nowhere"], capsys)
    assert "neither" in refusal(["abc' OR 1"], capsys)
    (tmp_path / "runs").mkdir()
    assert "it has no arm.json" in refusal(["runs"], capsys)
    assert "needs a RUN beside the settings" in refusal(["seed=1"], capsys)
    assert "one run at a time, not abc and def" in refusal(["abc", "def"], capsys)


def test_unknown_ambiguous_and_unfinished_runs_are_refused(here: Path, trained: SimpleNamespace, capsys) -> None:
    assert "no arm 0123456789abcdef is known" in refusal(["0123456789abcdef"], capsys)
    assert "gathers the seeds" in refusal([run_ids(here)["parent"]], capsys)
    twin = trained.plain[:8] + ("0" if trained.plain[8] != "0" else "1") * 8
    shutil.copytree(here / "runs" / SETTING / trained.plain, here / "runs" / SETTING / twin)
    said = refusal([trained.plain[:8]], capsys)
    assert "means 2 arms" in said and twin in said and trained.plain in said
    shutil.copytree(here / "runs" / SETTING / trained.plain, here / "runs" / "other" / trained.plain)
    assert "setting=" in refusal([trained.plain], capsys)
    assert main(["export", f"setting={SETTING}", trained.plain]) == 0
    (here / "mlflow.db").unlink()
    journal = here / "runs" / "other" / trained.plain / "journal.jsonl"
    whole = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(whole[:1]))
    capsys.readouterr()
    assert "is not finished (about step" in refusal([str(journal.parent)], capsys)
    last = json.loads(whole[-1])
    journal.write_text(
        "".join([*whole[:-1], json.dumps({**last, "end": "failed", "reason": "loss is not finite"}) + "\n"])
    )
    assert "failed and has no student: loss is not finite" in refusal([str(journal.parent)], capsys)


def test_missing_and_damaged_files_are_refused(here: Path, trained: SimpleNamespace, capsys) -> None:
    weights = here / "runs" / SETTING / trained.plain / "student.safetensors"
    other = here / "runs" / SETTING / trained.token / "student.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in refusal([trained.plain], capsys)
    weights.write_bytes(other.read_bytes())
    assert "are not those of the student that its configuration describes" in refusal([trained.plain], capsys)
    state = load_file(other.parent / "student.safetensors")
    save_file({name: torch.full_like(value, torch.nan) for name, value in state.items()}, other)
    assert "not finite" in refusal([trained.token], capsys)
    weights.unlink()
    (here / "mlflow.db").unlink()
    assert "student.safetensors is missing" in refusal([trained.plain], capsys)
    (weights.parent / "arm.json").write_text("{")
    assert "cannot be read as a frozen arm" in refusal([trained.plain], capsys)


def test_hostile_names_stay_inside_the_output(here: Path, trained: SimpleNamespace, capsys) -> None:
    directory = here / "runs" / SETTING / trained.plain
    arm = json.loads((directory / "arm.json").read_text())
    (directory / "arm.json").write_text(json.dumps({**arm, "name": "../../x", "setting": "/tmp/../x"}))
    assert main(["export", trained.plain]) == 0
    assert [path.name for path in (here / "exports").iterdir()] == [trained.plain]
    capsys.readouterr()
    (directory / "arm.json").write_text(json.dumps({**arm, "arm_key": "../../../x"}))
    assert "does not describe an arm" in refusal([trained.plain], capsys)
    # a server that answers with such tags
    (here / "runs").rename(here / "away")
    client = mlflow.MlflowClient(f"sqlite:///{here}/mlflow.db")
    run_id = run_ids(here)[trained.token]
    client.set_tag(run_id, "basd.run", "../../../x")
    assert "does not describe an arm" in refusal([run_id], capsys)


def test_what_lies_in_the_output_directory_is_not_overwritten(here: Path, trained: SimpleNamespace, capsys) -> None:
    assert main(["export", trained.plain, "--output", "out"]) == 0
    capsys.readouterr()
    assert "holds an export already" in refusal([trained.token, "--output", "out"], capsys)
    assert config_of(here / "out")["basd"]["arm_key"] == trained.plain
    assert main(["export", trained.token, "--output", "out", "--force"]) == 0
    assert config_of(here / "out")["basd"]["arm_key"] == trained.token
    capsys.readouterr()
    assert "holds other files" in refusal([trained.plain, "--output", "runs", "--force"], capsys)
    (here / "file").write_text("x")
    assert "is a file" in refusal([trained.plain, "--output", "file", "--force"], capsys)


def test_an_export_that_loads_as_another_model_is_refused(
    here: Path, trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    create = timm.create_model

    def other(*arguments: Any, **options: Any) -> torch.nn.Module:
        model = create(*arguments, **options)
        model.blocks[0].attn.scale *= 1.5
        model.blocks[0].attn.fused_attn = False
        return model

    monkeypatch.setattr(exporting.timm, "create_model", other)
    assert "its logits differ" in refusal([trained.plain, "--output", "out"], capsys)
    monkeypatch.setattr(exporting.timm, "create_model", lambda name, **_: create("deit_tiny_patch16_224"))
    assert "its weights differ" in refusal([trained.plain, "--output", "out"], capsys)


@pytest.mark.full
def test_onnx_that_strays_or_has_no_packages_is_refused(
    here: Path, trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "ONNX_TOLERANCE", -1.0)
        assert "ONNX's logits differ" in refusal([trained.plain, "--onnx", "--output", "out"], capsys)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        exporting.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    with pytest.raises(UserError, match=re.escape("--onnx needs onnxscript: pip install 'basd[onnx]'")):
        exporting.check_onnx_extra()
    assert "pip install 'basd[onnx]'" in refusal([trained.plain, "--onnx", "--output", "out"], capsys)


def test_register_needs_a_run(here: Path, trained: SimpleNamespace, capsys) -> None:
    (here / "mlflow.db").unlink()
    assert "basd sync" in refusal([trained.plain, "--register"], capsys)
