"""Every notebook and every figure of a small real grid, as a user makes them."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from project import Project

import analysis
from analysis.notebook import enter
from basd.cli import main
from basd.errors import UserError

NOTEBOOKS = sorted((Path(analysis.__file__).parent / "notebooks").glob("*.ipynb"))
TABLE = "small"
# of the whole table; of each row in `figures`
OF_ALL = {"forest", "shapley", "interactions", "curves", "cost", "distance"}
OF_A_ROW = {"losses", "selector", "attention", "spectra", "radial", "cka"}


@pytest.fixture
def here(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a directory in which a table was trained; the test runs in it."""
    monkeypatch.setenv("BASD_CACHE", str(project.cache))
    monkeypatch.chdir(project.copy(tmp_path))
    return tmp_path


def test_notebooks_are_stored_as_a_text() -> None:
    assert len(NOTEBOOKS) == 4
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        words = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
        assert all(not cell.outputs and cell.execution_count is None for cell in code), path
        assert words[0].source.startswith("# ") and 2 * len(words) >= len(code), path
        assert sum("parameters" in cell.metadata.get("tags", ()) for cell in code) == 1, path


# how many pictures each one draws of a table with two rows to look at
@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "pictures"),
    [("1_tour", 5), ("2_attention_and_spectra", 8), ("3_paper_tables", 3), ("4_designing_an_ablation", 1)],
)
def test_notebooks_run_from_top_to_bottom(name: str, pictures: int, here: Path) -> None:
    (path,) = [path for path in NOTEBOOKS if path.stem == name]
    notebook = nbformat.read(path, as_version=4)
    # as papermill does it, so that only what a user may change is changed
    place = next(n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(f"TABLE = {TABLE!r}"))
    where = {"metadata": {"path": str(here / "reports")}}
    NotebookClient(notebook, kernel_name="python3", timeout=300, startup_timeout=300, resources=where).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert sum("image/png" in output.get("data", ()) for output in outputs) == pictures


def drawn(folder: Path) -> set[str]:
    """What the figures of the table show; each is there as PNG and PDF."""
    names = {path.name for path in folder.glob(f"{TABLE}.*.png")}
    assert {name.replace(".png", ".pdf") for name in names} == {path.name for path in folder.glob(f"{TABLE}.*.pdf")}
    return {re.fullmatch(rf"{TABLE}\.(.*)\.png", name)[1] for name in names}  # type: ignore[index]


OWN = {f"{what}-rsd_attn" for what in OF_A_ROW}


def reports_of(here: Path) -> Path:
    (folder,) = [path for path in (here / "reports").iterdir() if path.name.startswith("digits-")]
    return folder


def test_a_report_draws_its_table_its_training_and_its_models(here: Path) -> None:
    assert main(["report", TABLE, "--figures", "models"]) == 0
    folder = reports_of(here)
    assert drawn(folder) == OF_ALL | OWN
    page, index = (folder / f"{TABLE}.html").read_text(), (here / "reports" / "index.html").read_text()
    assert all(f"{TABLE}.{what}.png" in page and f"{TABLE}.{what}.png" in index for what in OF_ALL | OWN)


@pytest.mark.full
def test_figures_are_of_the_runs_that_the_table_has_now(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--all"]) == 0
    folder = reports_of(here)
    # the same runs give the same bytes, figures too, and a smaller report leaves what is of the same runs
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["report", TABLE, "--figures", "models"]) == 0 and main(["report", TABLE, "--figures", "table"]) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    # figures of other runs do not stay: as if an arm were another run's since
    runs = folder / f"{TABLE}.runs.csv"
    runs.write_text(runs.read_text().replace("rsd", "RSD"))
    capsys.readouterr()
    # nor do figures of models that are not here any more
    for path in here.glob("runs/*/*/student.safetensors"):
        path.unlink()
    assert main(["report", TABLE, "--figures", "models"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("no figures of its model") == 1
    assert drawn(folder) == OF_ALL - {"distance"} | {name for name in OWN if name.startswith(("losses", "selector"))}


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
