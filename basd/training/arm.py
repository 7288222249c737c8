"""One arm in training: student, objective, optimizer, and their state. An arm never knows that others train beside it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from basd.components.comparison import TWO_VIEWS, TwoViews
from basd.components.sizes import Sizes
from basd.config import Config
from basd.data.feed import evaluation_batches, worker_count
from basd.data.images import ImageSource
from basd.data.views import normalize
from basd.distributed import average_gradients, join_shares, own_share, rank, world
from basd.errors import UserError
from basd.evaluation.classification import classification_metrics, predict_batches
from basd.models.student import StudentOutput, TappedStudent, build_student
from basd.models.taps import grid_of
from basd.models.teacher import TeacherOutput, TeacherShape
from basd.objective import Objective, Parts
from basd.training import random_streams as streams
from basd.training.batches import StepBatch, TeacherViews
from basd.training.ema import WeightAverage
from basd.training.memory import bytes_of
from basd.training.precision import autocast, choose_precision, compiler, half_type, make_scaler
from basd.training.recipe import learning_rate, parse_duration

EVALUATION_BATCH = 256
# Under this loss scale even float16's smallest number would be lost: gradients are not finite for another reason.
LEAST_LOSS_SCALE = 2.0**-24


# In the reason of an arm that diverged.
NON_FINITE = "not finite"


class NonFiniteLossError(RuntimeError):
    """The loss of a step is not a number; the arm fails, its cohort goes on."""


Scalars = dict[str, Tensor | float]


class Answers(NamedTuple):
    """A student's logits (n, C) and the labels (n,) of the readable images of a split, on the CPU."""

    logits: Tensor
    labels: Tensor
    unreadable: int

    def metrics(self, split: str) -> dict[str, float]:
        """`<split>/top1`, `/top5`, `/nll`, `/ece`."""
        values = classification_metrics(self.logits, self.labels)
        if self.unreadable:
            values["unreadable"] = float(self.unreadable)
        return {f"{split}/{name}": value for name, value in values.items()}


class TrainingArm:
    """Trains one student. `step` counts finished steps; a step takes in `recipe.accumulation` parts of its batch."""

    def __init__(
        self,
        config: Config,
        teacher: TeacherShape | None,
        classes: int,
        steps_per_epoch: int,
        device: torch.device,
    ) -> None:
        self.config = config
        self.device = device
        self.steps_per_epoch = steps_per_epoch
        recipe = config.recipe
        self.total_steps = parse_duration(recipe.duration, steps_per_epoch)
        self.warmup_steps = parse_duration(recipe.lr_warmup, steps_per_epoch, self.total_steps)
        self.step = 0
        # the last α of each epoch that has one, (M, L) as lists: the selector's history
        self.selector_history: list[dict[str, Any]] = []
        with streams.isolated(config.seed, streams.STUDENT_INIT):
            self.student = build_student(config.student, classes).to(device)
        self.objective = self._build_objective(config, teacher).to(device)
        demands = self.objective.demands
        # before the taps: their hooks would be copied with the student
        self.average = WeightAverage(self.student, recipe.ema_decay) if recipe.ema_decay > 0 else None
        points = config.points if demands.points else ()
        self.tapped = TappedStudent(self.student, points, demands.maps, compiler(config.runtime.compile, device))
        self.optimizer = torch.optim.AdamW(self._parameter_groups(), lr=recipe.lr, fused=True)
        self.precision = choose_precision(config.runtime.precision, device)
        self._half = half_type(config.runtime.precision, device)
        self._scaler = make_scaler(device, self._half)
        # parts of the running step that are taken in, and what they said
        self._taken: list[Scalars] = []

    def _build_objective(self, config: Config, teacher: TeacherShape | None) -> Objective:
        parts = Parts(
            losses=config.losses,
            selector=config.selector,
            token_aligner=config.token_aligner,
            head_aligner=config.head_aligner,
            weighting=config.weighting,
            warmup=config.warmup,
            objective=config.objective,
            mixing_targets=getattr(config.mixing, "targets", "follow"),
        )
        assert teacher is not None or not config.enabled
        sizes = Sizes(
            points=config.points,
            image_size=config.student.image_size,
            student_depth=config.student.depth,
            student_width=config.student.width,
            student_heads=config.student.heads,
            student_grid=grid_of(self.student),
            teacher_depth=teacher.depth if teacher else 0,
            teacher_width=teacher.width if teacher else 0,
            teacher_heads=teacher.heads if teacher else 0,
            teacher_grid=teacher.grid if teacher else (0, 0),
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
        )
        return Objective(parts, sizes, lambda name: streams.isolated(config.seed, f"{streams.COMPONENT_INIT}/{name}"))

    def _parameter_groups(self) -> list[dict[str, Any]]:
        undecayed = self.student.no_weight_decay()
        decayed = self.objective.decayed_parameters()
        groups: dict[bool, list[Tensor]] = {True: [], False: []}
        for name, parameter in self.student.named_parameters():
            groups[parameter.ndim > 1 and name not in undecayed].append(parameter)
        for name, parameter in self.objective.named_parameters():
            groups[name in decayed].append(parameter)
        return [
            {"params": groups[True], "weight_decay": self.config.recipe.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ]

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def weights(self) -> list[Tensor]:
        """Everything that is the same on every process from the first step on."""
        modules = [self.student, self.objective, *([self.average.student] if self.average else [])]
        return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]

    def train_step(self, batch: StepBatch, teacher: TeacherViews | None) -> Scalars | None:
        """One part of a step; after its last part the named parts of the objective, the learning rate and the gradient norm.

        With `recipe.accumulation` = 1 the one part is the step. Before the last part: None.
        """
        count, part = self.config.recipe.accumulation, len(self._taken)
        images, targets, mix = batch.student_images(self.config)
        self.student.train()
        self.objective.train()
        purpose = streams.ARM_STEP if part == 0 else f"{streams.ARM_STEP}/{part}"
        if rank() > 0:
            # drop path draws in here: images of other processes have other masks
            purpose = f"{purpose}/rank{rank()}"
        with streams.isolated(self.config.seed, purpose, batch.epoch, batch.step):
            with autocast(self.device, self._half):
                student: StudentOutput = self.tapped(images)
                seen, views = self._teacher_side(batch, teacher, self.objective.active(mix, self.step))
            diagnose = part == 0 and (self.step == 0 or self._epoch_ends)
            output = self.objective(student, seen, targets, mix, self.step, batch.generator, diagnose, views)
            # the loss of all processes: they decide alike
            loss = float(output.parts["train/loss"])
            if not math.isfinite(loss):
                raise NonFiniteLossError(f"the loss of step {self.step} is {NON_FINITE} ({loss})")
            if part == 0:
                self.optimizer.zero_grad(set_to_none=True)
            total = output.total if count == 1 else output.total / count
            (total if self._scaler is None else self._scaler.scale(total)).backward()
        self._taken.append(output.parts)
        if part + 1 < count:
            return None
        return self._finish_step()

    @property
    def _epoch_ends(self) -> bool:
        """Whether the running step is the last of an epoch."""
        return (self.step + 1) % self.steps_per_epoch == 0 or self.step + 1 == self.total_steps

    def _finish_step(self) -> Scalars:
        """Update the weights with the gradients of all parts."""
        recipe, epoch_ends = self.config.recipe, self._epoch_ends
        rate = learning_rate(self.step, self.total_steps, self.warmup_steps, recipe.lr, recipe.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        parts = _means(self._taken)
        self._taken = []
        parts["train/lr"] = rate
        average_gradients(self.parameters)
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        if recipe.clip_grad > 0:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, recipe.clip_grad)
            # of a step that the scaler leaves out there is none
            if self._scaler is None or bool(norm.isfinite()):
                parts["train/grad_norm"] = norm
        if self._scaler is None:
            self.optimizer.step()
        else:
            self._scaled_step(self._scaler, parts)
        self.step += 1
        if self.average is not None:
            self.average.update(self.student, self.step)
        if epoch_ends:
            self._remember_selector()
        return parts

    def _scaled_step(self, scaler: torch.amp.GradScaler, parts: Scalars) -> None:
        """The optimizer's step, left out where the scaled gradients overflowed: the scale is then lowered, and that is all."""
        scaler.step(self.optimizer)
        scaler.update()
        scale = scaler.get_scale()
        if scale < LEAST_LOSS_SCALE:
            raise NonFiniteLossError(
                f"the gradients of step {self.step} are {NON_FINITE} at any loss scale; choose runtime.precision=bf16 or fp32."
            )
        parts["train/loss_scale"] = scale

    def _teacher_side(
        self, batch: StepBatch, teacher: TeacherViews | None, active: list[str]
    ) -> tuple[TeacherOutput | None, TwoViews | None]:
        """What the teacher saw, and the second view of both models, where an active loss reads them."""
        if not active:
            return None, None
        assert teacher is not None
        mixed = getattr(self.config.mixing, "targets", None) == "same_input"
        seen = teacher.mixed(self.config) if mixed else teacher.clean()
        if not any(TWO_VIEWS in getattr(self.config.losses, name).reads for name in active):
            return seen, None
        real = self.tapped(batch.real_images(self.config)).logits
        return seen, TwoViews(real, teacher.virtual(self.config))

    def _remember_selector(self) -> None:
        shares = self.objective.layer_shares()
        if shares is not None:
            self.selector_history.append({"step": self.step, "alpha": shares.tolist()})
            # an epoch without an active loss has no α to write
            self.objective.set_layer_shares(None)

    @property
    def exported(self) -> VisionTransformer:
        """The student that is evaluated and exported: the average where there is one, else the last weights."""
        return self.student if self.average is None else self.average.student

    def parameter_counts(self) -> dict[str, float]:
        """Numbers of parameters of the exported student, and of everything else that is trained."""
        parts = {"cost/student_parameters": self.student, "cost/distillation_parameters": self.objective}
        return {name: float(sum(p.numel() for p in part.parameters())) for name, part in parts.items()}

    def held_bytes(self) -> int:
        """Bytes that stay between steps: weights, gradients, optimizer, average."""
        tensors = self.weights
        tensors += [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        states = self.optimizer.state.values()
        tensors += [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return bytes_of(tensors)

    def evaluate(self, images: ImageSource, split: str) -> dict[str, float]:
        """`<split>/top1`, `/top5`, `/nll`, `/ece` of the student that would be exported now, in float32."""
        return self.answer(images, split).metrics(split)

    def answer(self, images: ImageSource, split: str) -> Answers:
        """What the student that would be exported now says of a split, in float32."""
        student = self.exported.eval()
        data = self.config.data

        def forward(view: Tensor) -> Tensor:
            return student(normalize(view, data.mean, data.std))

        # each process takes its share of the images
        seen = images if world() == 1 else images.subset(own_share(len(images)))
        size, share = self.config.student.image_size, getattr(data, "eval_crop", 1.0)
        workers = worker_count(self.config.runtime.workers, self.device)
        views = evaluation_batches(seen, size, share, EVALUATION_BATCH, self.device, workers)
        logits, labels = (join_shares(part, len(images)) for part in predict_batches(forward, views))
        # what cannot be decoded is left out
        readable = labels >= 0
        if not readable.any():
            raise UserError(f"no image of the {split} split can be decoded; check the data.")
        return Answers(logits[readable], labels[readable], int((~readable).sum()))

    def state(self) -> dict[str, Any]:
        """Everything that a later step depends on."""
        return {
            "step": self.step,
            "student": self.student.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "selector_history": self.selector_history,
            "layer_shares": self.objective.layer_shares(),
            "average": None if self.average is None else self.average.state(),
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.selector_history = list(state["selector_history"])
        self.objective.set_layer_shares(state.get("layer_shares"))
        self.step = int(state["step"])
        if self.average is not None:
            self.average.load(state["average"])
        # begun in another precision there is none, and this one starts afresh
        if self._scaler is not None and state.get("scaler"):
            self._scaler.load_state_dict(state["scaler"])

    def export(self, directory: Path) -> None:
        """The student as timm-loadable safetensors, and the selector's history as CSV, by rename."""
        fresh = directory / "student.safetensors.tmp"
        save_file({name: value.contiguous() for name, value in self.exported.state_dict().items()}, fresh)
        os.replace(fresh, directory / "student.safetensors")
        if self.selector_history:
            artifacts = directory / "artifacts"
            artifacts.mkdir(exist_ok=True)
            lines = ["step,point,layer,share"]
            for entry in self.selector_history:
                for point, row in zip(self.config.points, entry["alpha"], strict=True):
                    lines += [f"{entry['step']},{point},{layer},{share:.6g}" for layer, share in enumerate(row)]
            (artifacts / "selector_history.csv").write_text("\n".join(lines) + "\n")


def _means(taken: Sequence[Scalars]) -> Scalars:
    """Scalars of a step: their means over the parts of it that have them."""
    if len(taken) == 1:
        return dict(taken[0])
    names = dict.fromkeys(name for scalars in taken for name in scalars)
    values = {name: [scalars[name] for scalars in taken if name in scalars] for name in names}
    return {name: sum(found[1:], start=found[0]) / len(found) for name, found in values.items()}
