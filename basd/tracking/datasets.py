"""The data of an arm as MLflow's datasets, from what its arm.json says: no image is read."""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

SPLITS = ("train", "validation", "test")
CONTEXT = "mlflow.data.context"
DIGITS = "https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html"


def datasets_of(spec: Mapping[str, Any]) -> list[DatasetInput]:
    """One dataset for each split, named as the data; the digest is the data's fingerprint and the split.

    Empty where the arm does not say what its data is. An arm frozen before sizes were kept has datasets without a profile.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data, fingerprint = spec.get("config", {}).get("data", {}), spec.get("data_fingerprint")
    if not data.get("name") or not fingerprint:
        return []
    kind, source = _source(data)
    sizes = spec.get("data_sizes", {})
    found = []
    for split in SPLITS:
        # MLflow knows a dataset by name and digest, so that splits of one digest would be one
        profile = {"num_rows": sizes[split], "classes": sizes["classes"]} if split in sizes else None
        dataset = Dataset(
            name=_name(data),
            digest=f"{fingerprint}-{split}",
            source_type=kind,
            source=json.dumps(source),
            schema=json.dumps(_schema(data)),
            profile=json.dumps(profile) if profile else None,
        )
        found.append(DatasetInput(dataset, [InputTag(CONTEXT, split)]))
    return found


def _name(data: Mapping[str, Any]) -> str:
    """The data set's own name; of a folder, the folder's."""
    if data.get("dataset"):
        return str(data["dataset"])[:500]
    return Path(data["root"]).name[:500] if data["name"] == "folder" and data.get("root") else str(data["name"])


def _source(data: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """MLflow's type of the source, and the source as the pages of that type read it."""
    kind, _, name = str(data.get("dataset", "")).partition("/")
    if kind == "hfds" and not Path(name).expanduser().exists():
        return "hugging_face", {"path": name}
    place = name if kind == "hfds" else data.get("root")
    if place:
        return "local", {"uri": urllib.parse.quote(str(Path(place).expanduser()))}
    return "external", {"url": DIGITS} if data["name"] == "digits" else {}


def _schema(data: Mapping[str, Any]) -> dict[str, Any]:
    """As MLflow's own array datasets: images (N,3,H,W) and labels (N,); -1 where a size is not fixed."""
    side = int(data.get("image_size", -1))

    def tensor(dtype: str, *shape: int) -> str:
        return json.dumps([{"type": "tensor", "tensor-spec": {"dtype": dtype, "shape": list(shape)}}])

    return {"mlflow_tensorspec": {"features": tensor("uint8", -1, 3, side, side), "targets": tensor("int64", -1)}}
