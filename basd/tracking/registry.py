"""Exported students in MLflow's model registry: versions of a model that bears the setting's name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

# Where the exported files lie among the run's artifacts.
ARTIFACTS = "export"
DIGEST = "basd.weights_sha256"


def register(
    client: MlflowClient, name: str, run_id: str, directory: Path, digest: str, tags: Mapping[str, Any]
) -> tuple[str, bool]:
    """Upload an exported directory as artifacts of its run and make it a version of the model `name`.

    Returns the version and whether it is new: the same weights of the same run are registered once. The files are plain
    safetensors, JSON and ONNX; nothing is pickled, and nothing needs BASD to be read.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.runs_artifact_repo import RunsArtifactRepository

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # uploaded again in any case: ONNX may have come since
    client.log_artifacts(run_id, str(directory), ARTIFACTS)
    for version in client.search_model_versions(f"name='{name}' and run_id='{run_id}'"):
        if version.tags.get(DIGEST) == digest:
            return str(version.version), False
    source = RunsArtifactRepository.get_underlying_uri(f"runs:/{run_id}/{ARTIFACTS}", client.tracking_uri)
    made = client.create_model_version(name, source, run_id=run_id, tags={**tags, DIGEST: digest})
    return str(made.version), True


def tags_of(run: Run) -> dict[str, str]:
    """What of an arm's run its model version repeats, so that it can be searched."""
    names = ("basd.arm_key", "basd.configuration_key", "basd.seed", "basd.version", "basd.run")
    return {name: run.data.tags[name] for name in names if name in run.data.tags}
