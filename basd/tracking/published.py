"""A report's own MLflow run: found by a tag, described in words, with the report's files; sent once, and again when it changed."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from basd.tracking.files import file_lock
from basd.tracking.mlflow_store import Store
from basd.tracking.runs import open_runs

TABLE = "basd.table"
FILES = "mlflow.basd.files"  # digest of the files that the run has; MLflow's pages do not list it


def digest_of(files: Mapping[str, bytes]) -> str:
    """16 hex digits that name files and what is in them."""
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\n{len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def publish_run(
    store: Store,
    identity: tuple[str, str],
    *,
    name: str,
    description: str,
    files: Mapping[str, bytes],
    tags: Mapping[str, str] | None = None,
    params: Mapping[str, str] | None = None,
) -> str:
    """Bring the run with the tag `identity` up to date, made if missing, and return its id. Call it under the setting's lock.

    `files`: artifact's path → content; they are uploaded where one of them is not what the run has. `params` are those of a
    new run: MLflow lets nobody change them.
    """
    tag, value = identity
    found = store.runs(**{tag.replace(".", "__"): value})
    run = found[0] if found else store.client.get_run(store.create(name, {tag: value}, params or {}, _now()))
    run_id, has = str(run.info.run_id), run.data.tags
    store.describe(run, description)
    store.tag(run_id, {key: text for key, text in (tags or {}).items() if has.get(key) != text})
    digest = digest_of(files)
    if files and has.get(FILES) != digest:
        with tempfile.TemporaryDirectory(prefix="basd-") as scratch:
            for path, content in files.items():
                (Path(scratch) / path).parent.mkdir(parents=True, exist_ok=True)
                (Path(scratch) / path).write_bytes(content)
            store.client.log_artifacts(run_id, scratch)
        # after the files: cut off in between, they are sent again
        store.tag(run_id, {FILES: digest})
    return run_id


def publish_table(
    uri: str,
    setting: str,
    lock: Path,
    *,
    name: str,
    description: str,
    tags: Mapping[str, str],
    files: Mapping[str, bytes],
) -> bool:
    """Bring the run of a table's report up to date; returns whether there was something to send.

    It has no key of an arm or a configuration and no `basd.ablation.<name>`, so that no reader of arms counts it. `lock`: held
    meanwhile, so that of several processes one makes the run.
    """
    if _is_published(uri, setting, name, digest_of(files)):
        return False
    with file_lock(lock):
        store = Store(uri, setting)
        run_id = publish_run(
            store, (TABLE, name), name=f"table: {name}", description=description, tags=tags, files=files
        )
        if store.client.get_run(run_id).info.status != "FINISHED":
            store.close(run_id, "FINISHED", _now())
    return True


def _is_published(uri: str, setting: str, name: str, digest: str) -> bool:
    """Whether the run has these files already: asked by reading alone, which is quick."""
    with closing(open_runs(uri)) as reader:
        numbers = [one.number for one in reader.experiments() if one.name == setting and one.stage == "active"]
        runs = [run for number in numbers for run in reader.runs(number, TABLE) if run.tags.get(TABLE) == name]
    return any(run.tags.get(FILES) == digest and run.status == "FINISHED" for run in runs)


def _now() -> int:
    return time.time_ns() // 1_000_000
