"""A teacher's head: its own, or a linear probe fitted once and cached."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import timm
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from basd.data import DATASETS
from basd.data.digits import DigitsConfig
from basd.data.images import ImageSet, Splits
from basd.data.views import eval_view, normalize
from basd.errors import UserError
from basd.models.teacher import DigitsViTConfig, Teacher, TimmTeacherConfig
from basd.training import probes, teachers
from basd.training import random_streams as streams
from basd.training.probes import L2_STRENGTHS, logistic_regression
from basd.training.teachers import (
    HeadFacts,
    PreparedTeacher,
    head_facts,
    prepare_head,
    prepare_teacher,
    weights_fingerprint,
)

CLASSES = 3
CONFIG = TimmTeacherConfig(model="test_vit", image_size=32, weights="random")
DATA = DigitsConfig()
TINY_DIGITS = DigitsViTConfig(epochs=1, width=12, depth=1, heads=2, batch_size=400)
DIGITS = DATASETS["digits"]()


def labelled(seed: int, count: int, classes: int = CLASSES) -> ImageSet:
    """Noisy images whose brightness and top-bottom contrast say the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    images = 100 + 40 * torch.randn(count, 3, 40, 32, generator=generator)
    images += 12 * (labels == 1).view(-1, 1, 1, 1)
    images[:, :, :20] += 15 * (labels == 2).view(-1, 1, 1, 1)
    return ImageSet(images.clamp(0, 255).to(torch.uint8), labels, classes)


def labelled_digits(count: int) -> ImageSet:
    generator = torch.Generator().manual_seed(count)
    images = torch.randint(0, 256, (count, 3, 40, 40), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 10, 10)


def digits_splits() -> Splits:
    return Splits(*(labelled_digits(count) for count in (400, 20, 20)))


@pytest.fixture(scope="module")
def splits() -> Splits:
    return Splits(labelled(0, 150), labelled(1, 70), labelled(2, 40))


@pytest.fixture(scope="module")
def prepared(splits: Splits) -> PreparedTeacher:
    return prepare_teacher(CONFIG, DATA, splits)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BASD_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def fitted_elsewhere(
    prepared: PreparedTeacher, splits: Splits, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, HeadFacts, list[tuple[int, int]]]:
    """A cache with the teacher's probe, the probe's facts, and the progress that its fit told."""
    folder, steps = tmp_path_factory.mktemp("fitted"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BASD_CACHE", str(folder))
        facts = head_facts(prepared, CONFIG, DATA, splits, lambda *step: steps.append(step))
    return folder, facts, steps


@pytest.fixture
def fitted(fitted_elsewhere: tuple[Path, HeadFacts, list], cache: Path) -> tuple[Path, HeadFacts]:
    """The file of a probe in this test's cache, and its facts as they are when it is loaded."""
    folder, facts, _ = fitted_elsewhere
    shutil.copytree(folder / "probes", cache / "probes")
    assert facts.fitted_now and facts.path is not None
    path = cache / facts.path.relative_to(folder)
    return path, dataclasses.replace(facts, path=path, fitted_now=False)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probes of one strength of L2 only; the weak ones take longest."""
    for module in (probes, teachers):
        monkeypatch.setattr(module, "L2_STRENGTHS", L2_STRENGTHS[:1])


def relabelled(splits: Splits, part: str, labels: Any) -> Splits:
    return splits._replace(**{part: dataclasses.replace(getattr(splits, part), labels=labels)})


# -- own heads ---------------------------------------------------------------------------------------------------------


def test_fingerprints_without_a_head_are_those_of_the_bare_model(prepared: PreparedTeacher) -> None:
    with streams.isolated(0, streams.TEACHER_INIT):
        bare = timm.create_model("test_vit", pretrained=False, img_size=32, num_classes=0)
    assert prepared.fingerprint == weights_fingerprint(bare)


def test_own_head_of_the_digits_teacher(cache: Path) -> None:
    splits = digits_splits()
    made = prepare_teacher(TINY_DIGITS, DIGITS, splits)
    head = prepare_head(made, TINY_DIGITS, DIGITS, splits)
    x = torch.randn(4, 3, 40, 40)
    out = Teacher(made.model, head=head)(x)
    with torch.no_grad():
        assert torch.equal(out.logits, made.model(x))
    facts = head_facts(made, TINY_DIGITS, DIGITS, splits)
    assert (facts.kind, facts.validation_top1, facts.test_top1) == ("own", made.validation_top1, made.test_top1)
    assert facts.fingerprint == weights_fingerprint(made.model.head) and facts.path is None
    assert facts.description.startswith("own head, validation top-1 ")
    assert not (cache / "probes").exists()
    # a teacher of a file has its head too
    given = dataclasses.replace(TINY_DIGITS, weights=str(made.path))
    again = prepare_teacher(given, DIGITS, splits)
    assert torch.equal(prepare_head(again, given, DIGITS, splits)(out.features), out.logits)
    assert "not measured" in head_facts(again, given, DIGITS, splits).description


def test_own_head_is_frozen_and_apart_from_the_model(splits: Splits) -> None:
    thousand = Splits(*(dataclasses.replace(part, classes=1000) for part in splits))
    made = prepare_teacher(CONFIG, DATA, thousand)
    head = prepare_head(made, CONFIG, DATA, thousand)
    assert not head.training and not any(p.requires_grad for p in head.parameters())
    made.model.bfloat16()
    assert {p.dtype for p in head.parameters()} == {torch.float32}
    assert head_facts(made, CONFIG, DATA, thousand).kind == "own"


def test_own_head_of_other_classes_is_refused(splits: Splits) -> None:
    with pytest.raises(UserError, match=r"teacher\.head=probe"):
        prepare_teacher(dataclasses.replace(CONFIG, head="own"), DATA, splits)
    # where nothing reads logits, a missing head is no error
    assert prepare_teacher(dataclasses.replace(CONFIG, head="own"), DATA, splits, logits=False).model.num_classes == 0


# -- the regression ----------------------------------------------------------------------------------------------------


def test_regression_is_the_unique_minimum() -> None:
    """Against scikit-learn, whose C weighs the sum of losses: C = 1/(n·l2)."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    labels = ((features[:, 0] > 0).long() + (features[:, 1] + torch.randn(60, generator=generator) > 0.5)).long()
    for l2 in L2_STRENGTHS:
        got = logistic_regression(features, labels, 3, l2)
        reference = LogisticRegression(C=1 / (60 * l2), tol=1e-10, max_iter=10_000)
        reference.fit(features.numpy(), labels.numpy())
        expected = torch.from_numpy(reference.predict_proba(features.numpy()))
        close = {"msg": lambda m, l2=l2: f"L2 {l2}: {m}"}
        probabilities = (features @ got.weight.T + got.bias).softmax(1)
        torch.testing.assert_close(probabilities, expected, rtol=1e-3, atol=1e-4, **close)
        torch.testing.assert_close(got.weight, torch.from_numpy(reference.coef_), rtol=1e-2, atol=1e-3, **close)
        start = logistic_regression(features, labels, 3, 10 * l2)
        warm = logistic_regression(features, labels, 3, l2, start)
        torch.testing.assert_close(warm.weight, got.weight, rtol=1e-2, atol=1e-3, **close)


def test_separable_classes_and_a_class_without_images_stay_finite() -> None:
    features = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]])
    got = logistic_regression(features, torch.tensor([0, 0, 1, 1]), 3, L2_STRENGTHS[-1])
    assert got.weight.isfinite().all() and got.bias.isfinite().all()
    logits = features.double() @ got.weight.T + got.bias
    assert logits.argmax(1).tolist() == [0, 0, 1, 1] and (logits[:, 2] < logits.amax(1) - 3).all()


# -- the probe ---------------------------------------------------------------------------------------------------------


def features_of(prepared: PreparedTeacher, part: ImageSet) -> Tensor:
    with torch.no_grad():
        x = normalize(eval_view(part.images, CONFIG.image_size), CONFIG.mean, CONFIG.std)
        return prepared.model.forward_features(x)[:, 0].double()


def test_probe_is_the_best_regression_on_standardised_features(
    prepared: PreparedTeacher, splits: Splits, fitted: tuple[Path, HeadFacts]
) -> None:
    head = prepare_head(prepared, CONFIG, DATA, splits)
    train, validation = features_of(prepared, splits.train).numpy(), features_of(prepared, splits.validation).numpy()
    mean, std = train.mean(0), train.std(0)
    losses, chosen = {}, {}
    for l2 in L2_STRENGTHS:
        model = LogisticRegression(C=1 / (len(train) * l2), tol=1e-8, solver="newton-cholesky")
        model.fit((train - mean) / std, splits.train.labels.numpy())
        probabilities = model.predict_proba((validation - mean) / std)
        losses[l2] = -numpy.log(probabilities[range(len(validation)), splits.validation.labels.numpy()]).mean()
        chosen[l2] = probabilities
    best = min(losses, key=lambda l2: losses[l2])
    facts = head_facts(prepared, CONFIG, DATA, splits)
    assert facts == fitted[1]
    assert facts.l2 == best and facts.kind == "probe"
    got = head(torch.from_numpy(validation).float()).softmax(1)
    torch.testing.assert_close(got.double(), torch.from_numpy(chosen[best]), rtol=1e-3, atol=1e-3)
    # it learned something, and not everything
    assert losses[best] < 0.9 * numpy.log(CLASSES)
    assert len({round(value, 3) for value in losses.values()}) > 1


def test_reported_accuracies_are_those_of_the_teachers_logits(
    prepared: PreparedTeacher, splits: Splits, fitted: tuple[Path, HeadFacts]
) -> None:
    _, facts = fitted
    teacher = Teacher(prepared.model, head=prepare_head(prepared, CONFIG, DATA, splits))
    for part, said in ((splits.validation, facts.validation_top1), (splits.test, facts.test_top1)):
        x = normalize(eval_view(part.images, CONFIG.image_size), CONFIG.mean, CONFIG.std)
        hits = teacher(x).logits.argmax(1) == part.labels
        assert said == pytest.approx(float(hits.double().mean()))
    assert f"L2 {facts.l2:g}, validation top-1 {100 * facts.validation_top1:.2f} %" in facts.description  # type: ignore[operator]


def test_probe_is_fitted_once_and_cached(
    prepared: PreparedTeacher, splits: Splits, fitted_elsewhere: tuple[Path, HeadFacts, list], fitted: Any
) -> None:
    path, facts = fitted
    steps, total = fitted_elsewhere[2], fitted_elsewhere[2][-1][1]
    assert steps == [(i + 1, total) for i in range(total)]
    again: list[tuple[int, int]] = []
    head = prepare_head(prepared, CONFIG, DATA, splits, lambda *step: again.append(step))
    assert again == [] and not head.training and not any(p.requires_grad for p in head.parameters())
    assert head_facts(prepared, CONFIG, DATA, splits) == facts
    assert {file.suffix for file in path.parent.iterdir()} == {".safetensors", ".json", ".lock"}
    for name, value in head.state_dict().items():
        assert torch.equal(value, load_file(path)[name]), name
    assert facts.fingerprint == weights_fingerprint(head)


def test_a_probe_is_the_same_bits_again_and_leaves_everything_else_as_it_was(
    prepared: PreparedTeacher, splits: Splits, fitted_elsewhere: tuple[Path, HeadFacts, list]
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = head_facts(prepared, CONFIG, DATA, splits)
    assert torch.equal(torch.get_rng_state(), before)
    assert again.fitted_now and again.fingerprint == fitted_elsewhere[1].fingerprint
    assert weights_fingerprint(prepared.model) == prepared.fingerprint
    assert next(prepared.model.parameters()).device.type == "cpu" and not prepared.model.training


def test_the_number_of_threads_changes_no_weight(
    cache: Path, prepared: PreparedTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine with more cores fits the same teacher and the same probe; at these sizes torch would split the sums."""
    digits = digits_splits()
    many = Splits(labelled(0, 300, 120), labelled(1, 40, 120), labelled(2, 20, 120))
    # a weak one: differences of rounding grow over its many iterations
    for module in (probes, teachers):
        monkeypatch.setattr(module, "L2_STRENGTHS", L2_STRENGTHS[3:4])
    found = []
    for threads in (1, 2):
        monkeypatch.setenv("BASD_CACHE", str(cache / str(threads)))
        torch.set_num_threads(threads)
        try:
            teacher = prepare_teacher(TINY_DIGITS, DIGITS, digits)
            probe = head_facts(prepared, CONFIG, DATA, many)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
        assert teacher.fitted_now and probe.fitted_now
        found.append((teacher.fingerprint, probe.fingerprint))
    assert found[0] == found[1]


def test_other_teachers_data_and_views_have_probes_of_their_own(
    prepared: PreparedTeacher, splits: Splits, quick: None
) -> None:
    larger = dataclasses.replace(CONFIG, image_size=48)
    brighter = dataclasses.replace(CONFIG, mean=[0.3, 0.3, 0.3])
    moved = relabelled(splits, "train", (splits.train.labels + 1) % CLASSES)
    other = dataclasses.replace(prepared, fingerprint="0" * 16)
    facts = [
        head_facts(prepared, CONFIG, DATA, splits),
        head_facts(prepare_teacher(larger, DATA, splits), larger, DATA, splits),
        head_facts(prepared, brighter, DATA, splits),
        head_facts(prepared, CONFIG, DATA, moved),
        head_facts(other, CONFIG, DATA, splits),
    ]
    assert len({fact.path for fact in facts}) == len(facts)
    assert all(fact.fitted_now for fact in facts)
    # the same weights on the same data: the same probe
    assert len({fact.fingerprint for fact in facts}) == len(facts) - 1


def test_processes_that_ask_together_fit_one_probe(prepared: PreparedTeacher, splits: Splits, quick: None) -> None:
    # each opens the lock's file for itself, as processes do
    with ThreadPoolExecutor(4) as pool:
        facts = list(pool.map(lambda _: head_facts(prepared, CONFIG, DATA, splits), range(4)))
    assert sorted(fact.fitted_now for fact in facts) == [False, False, False, True]
    assert len({fact.fingerprint for fact in facts}) == 1


def test_features_that_do_not_vary_do_no_harm(splits: Splits, quick: None) -> None:
    made = prepare_teacher(CONFIG, DATA, splits)
    with torch.no_grad():
        made.model.norm.weight[0], made.model.norm.bias[0] = 0.0, 0.3
    assert features_of(made, splits.train)[:, 0].unique().tolist() == pytest.approx([0.3])
    head: Any = prepare_head(dataclasses.replace(made, fingerprint="1" * 16), CONFIG, DATA, splits)
    assert head.weight.isfinite().all() and head.weight[:, 0].abs().max() < 1e-6
    assert head.weight[:, 1:].abs().max() > 1e-3


def test_data_without_labels_is_one_sentence(prepared: PreparedTeacher, splits: Splits) -> None:
    for part in ("train", "validation"):
        holes = getattr(splits, part).labels.clone()
        holes[3] = -1
        for labels in (None, holes, holes[:0]):
            with pytest.raises(UserError, match=f"needs labels, but the {part} split") as caught:
                prepare_head(prepared, CONFIG, DATA, relabelled(splits, part, labels))
            assert "\n" not in str(caught.value), part


def test_a_test_split_without_labels_leaves_its_accuracy_open(
    prepared: PreparedTeacher, splits: Splits, quick: None
) -> None:
    """The test split is there to be reported: neither the probe nor its choice reads it."""
    complete = head_facts(prepared, CONFIG, DATA, splits)
    hidden = relabelled(splits, "test", torch.full_like(splits.test.labels, -1))
    for _ in range(2):
        facts = head_facts(prepared, CONFIG, DATA, hidden)
        assert (facts.fingerprint, facts.l2) == (complete.fingerprint, complete.l2)
        assert facts.test_top1 is None and "test" not in facts.description
    assert not facts.fitted_now and complete.test_top1 is not None


# -- the cache ---------------------------------------------------------------------------------------------------------


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20])


def test_a_damaged_cache_is_one_sentence(prepared: PreparedTeacher, splits: Splits, quick: None) -> None:
    facts = head_facts(prepared, CONFIG, DATA, splits)
    assert facts.path is not None
    cases: list[tuple[str, Callable[[Path], None], str]] = [
        (".safetensors", cut_off, "linear probe"),
        (".json", cut_off, "is damaged; remove it"),
        (".safetensors", flip_one_bit, "is damaged; remove it"),
    ]
    for suffix, damage, said in cases:
        damaged = facts.path.with_suffix(suffix)
        damage(damaged)
        with pytest.raises(UserError, match=said) as caught:
            prepare_head(prepared, CONFIG, DATA, splits)
        assert "\n" not in str(caught.value) and str(damaged) in str(caught.value), (suffix, damage)
        damaged.unlink()
        assert head_facts(prepared, CONFIG, DATA, splits) == facts, (suffix, damage)


def test_one_flipped_bit_of_a_cached_teacher_is_noticed() -> None:
    splits = digits_splits()
    made = prepare_teacher(TINY_DIGITS, DIGITS, splits)
    assert made.path is not None and made.fitted_now
    again = prepare_teacher(TINY_DIGITS, DIGITS, splits)
    assert (again.fingerprint, again.test_top1, again.fitted_now) == (made.fingerprint, made.test_top1, False)
    flip_one_bit(made.path)
    with pytest.raises(UserError, match="is damaged; remove it"):
        prepare_teacher(TINY_DIGITS, DIGITS, splits)


def test_facts_from_before_the_fingerprint_still_load(
    prepared: PreparedTeacher, splits: Splits, fitted: tuple[Path, HeadFacts]
) -> None:
    path, expected = fitted
    beside = path.with_suffix(".json")
    facts = json.loads(beside.read_text())
    assert facts.pop("weights") == expected.fingerprint
    beside.write_text(json.dumps(facts))
    assert head_facts(prepared, CONFIG, DATA, splits) == expected


def test_facts_of_another_shape_are_one_sentence(
    prepared: PreparedTeacher, splits: Splits, fitted: tuple[Path, HeadFacts]
) -> None:
    path, _ = fitted
    for written in (
        *("3", "[]", "null", "{}", '{"l2": 0.1}'),
        '{"l2": null, "validation_top1": 0.5, "test_top1": 0.5}',
        '{"l2": "0.1", "validation_top1": 0.5, "test_top1": 0.5}',
        '{"l2": 0.1, "validation_top1": [0.5], "test_top1": 0.5}',
        '{"l2": 0.1, "validation_top1": 0.5, "test_top1": true}',
        '{"l2": 0.1, "validation_top1": 0.5, "test_top1": 0.5, "weights": 7}',
        '{"l2": 0.1, "validation_top1": 0.5, "test_top1": 0.5, "weights": "0000000000000000"}',
    ):
        path.with_suffix(".json").write_text(written)
        with pytest.raises(UserError, match="is damaged; remove it") as caught:
            head_facts(prepared, CONFIG, DATA, splits)
        assert "\n" not in str(caught.value), written


def test_what_could_not_be_written_whole_is_fitted_again(
    prepared: PreparedTeacher, splits: Splits, cache: Path, monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    """A disk that is full while weights or facts reach it: nothing of half a file bears the name of a whole one."""
    sync = os.fsync
    for written in (0, 1):
        # a file and its folder are synced each
        left = iter([True] * 2 * written)

        def full(descriptor: int, left: Any = left) -> None:
            if not next(left, False):
                raise OSError(28, "No space left on device")
            sync(descriptor)

        with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left on device"):
            patch.setattr(os, "fsync", full)
            prepare_head(prepared, CONFIG, DATA, splits)
        whole = [path.suffix for path in (cache / "probes").iterdir() if path.suffix in (".safetensors", ".json")]
        assert whole == [".safetensors"] * written
    assert head_facts(prepared, CONFIG, DATA, splits).fitted_now


def test_a_complete_cache_that_is_read_only_serves(
    prepared: PreparedTeacher, splits: Splits, fitted: tuple[Path, HeadFacts], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, facts = fitted

    # permissions would not stop root
    def read_only(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(fcntl, "flock", read_only)
    assert head_facts(prepared, CONFIG, DATA, splits) == facts
    path.unlink()
    with pytest.raises(UserError, match="Permission denied.*set BASD_CACHE"):
        prepare_head(prepared, CONFIG, DATA, splits)


def test_an_unwritable_cache_is_one_sentence(
    prepared: PreparedTeacher, splits: Splits, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "file").write_text("in the way")
    monkeypatch.setenv("BASD_CACHE", str(cache / "file"))
    with pytest.raises(UserError, match="set BASD_CACHE"):
        prepare_head(prepared, CONFIG, DATA, splits)


def test_features_that_are_not_finite_are_one_sentence(splits: Splits) -> None:
    made = prepare_teacher(CONFIG, DATA, splits)
    with torch.no_grad():
        made.model.norm.bias[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        prepare_head(dataclasses.replace(made, fingerprint="2" * 16), CONFIG, DATA, splits)
