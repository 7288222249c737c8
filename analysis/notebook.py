"""What the notebooks begin with: the directory of the runs, and figures that look like those of the reports."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from basd.errors import UserError

ON_SCREEN = 130  # dots an inch, at which the small type of a paper's figures can be read
# a remark of tqdm on what Jupyter has not installed; no bar is shown
warnings.filterwarnings("ignore", message="IProgress not found")


def enter(project: str | Path | None = None) -> Path:
    """Go to the directory where `basd grid` was run, and give figures the style of the reports; returns it.

    Without `project` it is the nearest directory, from the present one upwards, that holds `runs`. UserError: none does.
    """
    here = Path.cwd()
    places = [Path(project).expanduser().resolve()] if project is not None else [here, *here.parents]
    found = next((place for place in places if (place / "runs").is_dir()), None)
    if found is None:
        where = f"{places[0]} holds" if project is not None else f"Neither {here} nor a directory above it holds"
        raise UserError(f"{where} no runs: name the directory where basd grid was run, enter('DIRECTORY').")
    os.chdir(found)
    from matplotlib import rcParams

    from analysis.style import use

    use()
    rcParams["figure.dpi"] = ON_SCREEN
    return found
