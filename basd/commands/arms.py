"""train, teacher, export: single arms and what they are trained from."""

from __future__ import annotations

import argparse
from pathlib import Path

from basd.commands.common import console, run_sections, teacher_progress
from basd.errors import UserError


def train(given: argparse.Namespace, overrides: list[str]) -> int:
    if given.multirun:
        from basd.multirun import multirun

        return multirun(overrides, again=given.again)
    from basd.grid.single import train_one

    screen = console(given.quiet)
    progress = teacher_progress(screen, given.quiet)
    try:
        status, _ = train_one(overrides, screen=screen, again=given.again, quiet=given.quiet, teacher_progress=progress)
        return status
    finally:
        progress.close()


def teacher(given: argparse.Namespace, overrides: list[str]) -> int:
    from basd.compose import compose
    from basd.grid.plan import prepare
    from basd.models.teacher import teacher_title

    screen = console(given.quiet)
    config = compose(overrides).config
    progress = teacher_progress(screen, given.quiet)
    try:
        prepared = prepare(config, progress).teacher
    finally:
        progress.close()
    shape = f"{len(prepared.model.blocks)} blocks, width {prepared.model.embed_dim}"
    screen.print(
        f"{teacher_title(config.teacher)}: {shape}, {prepared.accuracy}, weights {prepared.fingerprint}", markup=False
    )
    if config.teacher.weights_file is not None:
        from basd.models.checkpoints import read_checkpoint

        file = read_checkpoint(config.teacher.weights_file).file
        screen.print(f"From {file.path}: {file.description}", markup=False)
    elif prepared.path is not None:
        screen.print(f"{'Fitted and cached' if prepared.fitted_now else 'Cached'}: {prepared.path}", markup=False)
    if config.demands.logits and config.teacher.name != "digits_vit":
        from basd.data import load
        from basd.training.teachers import head_facts

        facts = head_facts(prepared, config.teacher, config.data, load(config.data))
        screen.print(f"Logits: {facts.description}" + (f", {facts.path}" if facts.path else ""), markup=False)
    return 0


def export(given: argparse.Namespace, overrides: list[str]) -> int:
    import tempfile

    words = [given.run, *overrides]
    named = [word for word in words if "=" not in word or (Path(word) / "arm.json").is_file()]
    if not named:
        raise UserError("export needs a RUN beside the settings: an arm key, an arm's directory or an MLflow run id.")
    if len(named) > 1:
        raise UserError(f"export writes one run at a time, not {' and '.join(named)}; call it once for each.")
    overrides = [word for word in words if word not in named]
    setting, config = run_sections(overrides)
    uri, screen = config.tracking.uri, console(given.quiet)
    with tempfile.TemporaryDirectory() as scratch:
        from basd.grid.finished import asked, find_finished, tracked_run
        from basd.tracking.mlflow_store import shown as hidden

        arm = find_finished(named[0], Path(config.runtime.directory), uri, setting, Path(scratch))
        screen.print(f"{arm.name} seed={arm.seed} of {arm.setting} (arm {arm.label}), from {arm.place}", markup=False)
        run = tracked_run(arm, uri) if given.register else None
        if given.register and run is None:
            raise UserError(
                f"--register needs the arm's finished run in MLflow ({hidden(uri)}); send it there with basd sync NAME."
            )
        # below what can be refused at once: these imports take seconds
        from basd.export import ONNX_TOLERANCE, export

        target = Path(given.output) if given.output else Path("exports") / arm.label
        made = export(arm, target, onnx=given.onnx, force=given.force)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in arm.metrics.items())
    screen.print(
        f"Written: {made.directory} ({shown}); timm loads it, and its logits are the student's bit for bit.",
        markup=False,
    )
    screen.print(f'Load: timm.create_model("local-dir:{made.directory}", pretrained=True)', markup=False)
    if made.onnx_difference is not None:
        within = f"largest difference {made.onnx_difference:.1e} of the largest logit, allowed {ONNX_TOLERANCE:.0e}"
        screen.print(f"ONNX: opset {made.onnx_opset}, any batch size; {within}.", markup=False)
    if run is not None:
        from basd.tracking.mlflow_store import open_client
        from basd.tracking.registry import register, tags_of

        name, run_id = arm.setting, str(run.info.run_id)
        version, new = asked(
            uri, lambda: register(open_client(uri), name, run_id, made.directory, made.digest, tags_of(run))
        )
        how = "Registered as" if new else "Registered before as"
        screen.print(f"{how} version {version} of {name} in MLflow (models:/{name}/{version}).", markup=False)
    return 0
