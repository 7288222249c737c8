"""One arm in training: student, objective, optimizer, and their state. An arm never knows that others train beside it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from basd.components.comparison import TWO_VIEWS, TwoViews
from basd.components.sizes import Sizes
from basd.config import Config
from basd.data.images import ImageSet
from basd.data.views import eval_view, normalize
from basd.evaluation.classification import classification_metrics, predict
from basd.models.student import StudentOutput, TappedStudent, build_student
from basd.models.taps import grid_of
from basd.models.teacher import TeacherOutput, TeacherShape
from basd.objective import Objective, Parts
from basd.training import random_streams as streams
from basd.training.batches import StepBatch, TeacherViews
from basd.training.recipe import learning_rate, parse_duration

EVALUATION_BATCH = 256


class NonFiniteLossError(RuntimeError):
    """The loss of a step is not a number; the arm fails, its cohort goes on."""


class TrainingArm:
    """Trains one student. `step` counts finished steps."""

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
        self.tapped = TappedStudent(self.student, config.points if demands.points else (), demands.maps)
        self.optimizer = torch.optim.AdamW(self._parameter_groups(), lr=recipe.lr, fused=True)

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

    def train_step(self, batch: StepBatch, teacher: TeacherViews | None) -> dict[str, Tensor | float]:
        """One step; returns the named parts of the objective, the learning rate and the gradient norm."""
        recipe = self.config.recipe
        epoch_ends = (self.step + 1) % self.steps_per_epoch == 0 or self.step + 1 == self.total_steps
        rate = learning_rate(self.step, self.total_steps, self.warmup_steps, recipe.lr, recipe.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images, targets, mix = batch.student_images(self.config)
        self.student.train()
        self.objective.train()
        with streams.isolated(self.config.seed, streams.ARM_STEP, batch.epoch, batch.step):
            student: StudentOutput = self.tapped(images)
            seen, views = self._teacher_side(batch, teacher, self.objective.active(mix, self.step))
            diagnose = self.step == 0 or epoch_ends
            output = self.objective(student, seen, targets, mix, self.step, batch.generator, diagnose, views)
            if not math.isfinite(float(output.total.detach())):
                raise NonFiniteLossError(f"the loss of step {self.step} is not finite ({float(output.total.detach())})")
            self.optimizer.zero_grad(set_to_none=True)
            output.total.backward()
        norm = None
        if recipe.clip_grad > 0:
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, recipe.clip_grad)
        self.optimizer.step()
        self.step += 1
        parts = dict(output.parts)
        parts["train/lr"] = rate
        if norm is not None:
            parts["train/grad_norm"] = norm
        if epoch_ends:
            self._remember_selector()
        return parts

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

    def evaluate(self, images: ImageSet, split: str) -> dict[str, float]:
        """`<split>/top1`, `/top5`, `/nll`, `/ece` of the student as it is now."""
        self.student.eval()
        data = self.config.data

        def forward(part: Tensor) -> Tensor:
            view = eval_view(part.to(self.device), self.config.student.image_size)
            return self.student(normalize(view, data.mean, data.std))

        with torch.no_grad():
            logits = predict(forward, images.images, EVALUATION_BATCH)
        return {f"{split}/{name}": value for name, value in classification_metrics(logits, images.labels).items()}

    def state(self) -> dict[str, Any]:
        """Everything that a later step depends on."""
        return {
            "step": self.step,
            "student": self.student.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "selector_history": self.selector_history,
            "layer_shares": self.objective.layer_shares(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.student.load_state_dict(state["student"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.selector_history = list(state["selector_history"])
        self.objective.set_layer_shares(state.get("layer_shares"))
        self.step = int(state["step"])

    def export(self, directory: Path) -> None:
        """The student as timm-loadable safetensors, and the selector's history as CSV, by rename."""
        fresh = directory / "student.safetensors.tmp"
        save_file({name: value.contiguous() for name, value in self.student.state_dict().items()}, fresh)
        os.replace(fresh, directory / "student.safetensors")
        if self.selector_history:
            artifacts = directory / "artifacts"
            artifacts.mkdir(exist_ok=True)
            lines = ["step,point,layer,share"]
            for entry in self.selector_history:
                for point, row in zip(self.config.points, entry["alpha"], strict=True):
                    lines += [f"{entry['step']},{point},{layer},{share:.6g}" for layer, share in enumerate(row)]
            (artifacts / "selector_history.csv").write_text("\n".join(lines) + "\n")
