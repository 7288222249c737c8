"""The figures beside a table: how its arms were trained, and what the trained models look at. One choice of figures, by file name."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.files import figures_of
from analysis.layout import Layout
from analysis.load import DEFAULT_TRACKING_URI
from basd.errors import UserError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from analysis.trained import TrainedArm

# Each level draws what the one before it does, and more.
TABLE, TRAINING, MODELS = "table", "training", "models"
# Images of the validation split that models are looked at with, and the one whose attention is drawn.
IMAGES, IMAGE = 32, 0
PARAMETERS = "cost/parameters"
# What stands in the file names of its figures: of all rows, and of one.
_OWN = re.compile(r"curves|cost|distance|(losses|selector|attention|spectra|radial|cka)-[A-Za-z0-9_-]+")
# Points of a noisy curve that are left after smoothing, about.
SMOOTH = 20


@dataclass
class Gallery:
    """What a report draws of its runs. `rows`: those that get figures of their own; `problems`: what could not be drawn, and why.

    Figures of training need the tracking store alone; those of models also the students' weights, their data and teacher.
    """

    level: str
    rows: Sequence[str]
    cells: Mapping[str, Mapping[int, str]]  # row → seed → arm key
    tracking_uri: str = DEFAULT_TRACKING_URI
    setting: str | None = None
    runs: Path = Path("runs")
    problems: list[str] = field(default_factory=list)

    def draw(self, frame: pd.DataFrame, layout: Layout, directory: Path) -> list[Path]:
        """Write NAME.WHAT and NAME.WHAT-ROW as PDF and PNG for the arms of `frame` (`analysis.load`); returns the paths."""
        from analysis.style import save, style

        written: list[Path] = []
        makers = {TABLE: [], TRAINING: [self._training], MODELS: [self._training, self._models]}[self.level]
        with style():
            for make in makers:
                for what, figure in make(frame, layout):
                    if figure is not None:
                        written += save(figure, directory / f"{layout.name}.{what}")
        return written

    def _training(self, frame: pd.DataFrame, layout: Layout) -> Iterator[tuple[str, Figure | None]]:
        from analysis import history_figures
        from analysis.histories import histories, selector_history

        labels = {row.name: row.label for row in layout.rows}
        read: dict[str, Any] = {"tracking_uri": self.tracking_uri, "setting": self.setting, "missing": True}
        # validated too seldom for a curve: the student's own loss, which all rows share
        for curve in (_curve_of(layout), "train/ce"):
            curves = histories(layout.name, curve, rows=self.cells, **read)
            steps = curves["step"].nunique()
            if steps > 1:
                # a loss of single batches is noisy
                smooth = max(1, steps // SMOOTH) if curve.startswith("train/") else 1
                yield "curves", history_figures.learning_curves(curves, curve, labels, smooth=smooth)
                break
        shown = next((one.name for one in layout.metrics if one.tested), None)
        if shown is not None:
            cost = "time/step_milliseconds" if _alone(frame) else PARAMETERS
            yield "cost", history_figures.cost_against(_with_parameters(frame), cost, shown, labels, layout.reference)
        own = {row: self.cells[row] for row in self.rows if row in set(frame["row"])}
        if not own:
            return
        paths = histories(layout.name, ["loss/*", "ramp/*", "weight/*"], rows=own, **read)
        mixtures = selector_history(layout.name, rows=own, **read)
        for row in own:
            yield f"losses-{as_file_name(row)}", history_figures.trajectories(paths, row, labels[row])
            yield f"selector-{as_file_name(row)}", history_figures.selector_map(mixtures, row)

    def _models(self, frame: pd.DataFrame, layout: Layout) -> Iterator[tuple[str, Figure | None]]:
        from analysis import model_figures
        from analysis.trained import Distances
        from basd.training.device import cpu_threads

        own: dict[str, Callable[[TrainedArm], Figure]] = {
            "attention": lambda arm: model_figures.attention_maps(arm, IMAGE),
            "spectra": model_figures.spectra,
            "radial": model_figures.radial_spectra,
            "cka": model_figures.similarity,
        }
        labels = {row.name: row.label for row in layout.rows}
        distances: list[Distances] = []
        for row in self.rows:
            arm = self._open(row, labels.get(row, row), frame)
            if arm is None:
                continue
            # the bytes of a figure must not depend on the number of cores
            with cpu_threads(1):
                made = {f"{what}-{as_file_name(row)}": make(arm) for what, make in own.items()}
                distances.append(Distances.of(arm))
            yield from made.items()
        if distances:
            yield "distance", model_figures.attention_distance(distances)

    def _open(self, row: str, label: str, frame: pd.DataFrame) -> TrainedArm | None:
        """The finished arm of a row's first seed; None, with the reason among the problems, where it cannot be opened."""
        from analysis.trained import open_arm

        finished = frame[(frame["row"] == row) & (frame["status"] == "FINISHED")].sort_values("seed")
        if finished.empty:
            self.problems.append(f"Row '{row}' has no finished arm: no figures of its model.")
            return None
        key = str(finished.iloc[0]["arm_key"])
        try:
            return open_arm(
                key, runs=self.runs, tracking_uri=self.tracking_uri, setting=self.setting, count=IMAGES, name=label
            )
        except UserError as error:
            self.problems.append(f"Row '{row}': no figures of its model: {error}")
            return None


def remove_figures(name: str, directory: Path, keep: Collection[Path]) -> None:
    """Remove what a gallery has drawn of the table NAME, apart from the files in `keep`."""
    for figure in figures_of(name, directory):
        if _OWN.fullmatch(figure.removeprefix(f"{name}.").removesuffix(".png")):
            for path in (directory / figure, (directory / figure).with_suffix(".pdf")):
                if path not in keep:
                    path.unlink(missing_ok=True)


def as_file_name(row: str) -> str:
    """A row's name in a file name: what stands there beside letters, digits, dashes and underscores becomes an underscore."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", row)


def _curve_of(layout: Layout) -> str:
    """What is logged on the way of the table's first metric: its validation form, or validation accuracy."""
    first = layout.metrics[0].name
    return first.replace("test/", "val/") if first.startswith(("test/", "val/")) else "val/top1"


def _alone(frame: pd.DataFrame) -> bool:
    """Whether every arm was trained by itself, so that its time is its own."""
    return "time/arms_in_cohort" in frame and bool((frame["time/arms_in_cohort"] == 1).all())


def _with_parameters(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with what an arm trains in all: its student, and what distillation adds to it."""
    parts = ["cost/student_parameters", "cost/distillation_parameters"]
    if not set(parts) <= set(frame):
        return frame
    return frame.assign(**{PARAMETERS: frame[parts].sum(axis=1, min_count=len(parts))})
