"""Every notebook and every figure of a small real grid, as a user makes them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient
from tiny import TINY

import analysis
from analysis.notebook import enter
from basd.cli import main
from basd.errors import UserError

NOTEBOOKS = sorted((Path(analysis.__file__).parent / "notebooks").glob("*.ipynb"))
TABLE = "small"
SWITCHES = {loss: {"on": [], "off": [f"losses.{loss}.enabled=false"]} for loss in ("rsd", "attn")}
ABLATION = {
    "question": "Do rsd and attn earn their place?",
    "reference": "rsd+attn",
    "seeds": [0, 1, 2],
    "overrides": ["method=basd"],
    "factors": SWITCHES,
    "figures": ["rsd+attn"],
}
# of the whole table; of each row in `figures`
OF_ALL = {"forest", "shapley", "interactions", "curves", "cost", "distance"}
OF_A_ROW = {"losses", "selector", "attention", "spectra", "radial", "cka"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory in which a table was trained; the tests run in it."""
    folder, patch = tmp_path_factory.mktemp("project"), pytest.MonkeyPatch()
    patch.setenv("BASD_CACHE", str(tmp_path_factory.mktemp("cache")))
    patch.chdir(folder)
    (folder / "experiments").mkdir()
    (folder / "experiments" / f"{TABLE}.yaml").write_text(yaml.safe_dump(ABLATION, sort_keys=False))
    probes = ["runtime.probes=true", "recipe.validate_every=1", "runtime.threads=1"]
    assert main(["grid", TABLE, *(text for text in TINY if not text.startswith(("runtime.probes", "recipe.val"))), *probes, "--quiet"]) == 0  # fmt: skip
    yield folder
    patch.undo()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_as_a_text(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    words = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert words[0].source.startswith("# ") and 2 * len(words) >= len(code)
    assert sum("parameters" in cell.metadata.get("tags", ()) for cell in code) == 1


# how many pictures each one draws of a table with two rows to look at
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pictures"),
    [("1_tour", 5), ("2_attention_and_spectra", 8), ("3_paper_tables", 3), ("4_designing_an_ablation", 1)],
)
def test_notebooks_run_from_top_to_bottom(name: str, pictures: int, project: Path) -> None:
    (path,) = [path for path in NOTEBOOKS if path.stem == name]
    notebook = nbformat.read(path, as_version=4)
    # as papermill does it, so that only what a user may change is changed
    place = next(n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(f"TABLE = {TABLE!r}"))
    below = project / "reports"
    below.mkdir(exist_ok=True)
    where = {"metadata": {"path": str(below)}}
    NotebookClient(notebook, kernel_name="python3", timeout=300, startup_timeout=300, resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert sum("image/png" in output.get("data", ()) for output in outputs) == pictures


@pytest.mark.slow
def test_a_report_draws_its_table_its_training_and_its_models(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--all"]) == 0
    (folder,) = [path for path in (project / "reports").iterdir() if path.name.startswith("digits-")]

    def drawn() -> set[str]:
        names = {path.name for path in folder.glob("*.png")}
        assert {name.replace(".png", ".pdf") for name in names} == {path.name for path in folder.glob("*.pdf")}
        return {re.fullmatch(rf"{TABLE}\.(.*)\.png", name)[1] for name in names}  # type: ignore[index]

    own = {f"{what}-rsd_attn" for what in OF_A_ROW}
    assert drawn() == OF_ALL | own
    page, index = (folder / f"{TABLE}.html").read_text(), (project / "reports" / "index.html").read_text()
    assert all(f"{TABLE}.{what}.png" in page and f"{TABLE}.{what}.png" in index for what in OF_ALL | own)

    # the same runs give the same bytes, figures too, and a smaller report leaves what is of the same runs
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["report", "--all"]) == 0 and main(["report", TABLE, "--figures", "table"]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    # figures of other runs do not stay: as if an arm were another run's since
    runs = folder / f"{TABLE}.runs.csv"
    runs.write_text(runs.read_text().replace("rsd", "RSD"))
    capsys.readouterr()
    # a student that is not here any more is fetched from the tracking store
    students = list(project.rglob("student.safetensors"))
    kept = {path: path.read_bytes() for path in students}
    try:
        for path in students:
            path.unlink()
        assert main(["report", TABLE, "--figures", "models"]) == 0
    finally:
        for path, data in kept.items():
            path.write_bytes(data)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("no figures of its model") == 1
    assert drawn() == OF_ALL - {"distance"} | {name for name in own if name.startswith(("losses", "selector"))}


def test_a_notebook_finds_its_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = tmp_path / "here" / "analysis"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    with pytest.raises(UserError, match="nor a directory above it holds") as raised:
        enter()
    # a notebook shows the sentence alone
    assert raised.value._render_traceback_() == [str(raised.value)]
    with pytest.raises(UserError, match="holds no runs"):
        enter(tmp_path)
    (tmp_path / "here" / "runs").mkdir()
    assert enter() == tmp_path / "here" == Path(os.getcwd())
    monkeypatch.chdir(tmp_path)
    assert enter("here") == tmp_path / "here"
