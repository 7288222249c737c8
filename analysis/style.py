"""One look for every figure: readable at the width of a column, colours that colour-blind readers tell apart, PDF and PNG."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from basd.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Inches: a column of a two-column page, and the whole width of one.
COLUMN, PAGE = 3.35, 6.9
# Okabe and Ito's colours (2008), in the order in which figures use them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
GREY = "#8C8C8C"
_SETTINGS: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 300,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.4,
    "pdf.fonttype": 42,
    # the same figure gives the same bytes
    "svg.hashsalt": "basd",
}


@contextmanager
def style() -> Iterator[None]:
    """Figures made within look alike; settings of the caller's own figures stay as they are."""
    import matplotlib

    # no display is needed, and none of a notebook is taken away
    if "matplotlib.pyplot" not in sys.modules:
        matplotlib.use("Agg")
    with matplotlib.rc_context():
        use()
        yield


def use() -> None:
    """The look for all figures from here on, as a notebook wants it."""
    import matplotlib
    import seaborn
    from cycler import cycler

    matplotlib.rcParams.update({**seaborn.axes_style("whitegrid"), **_SETTINGS})
    matplotlib.rcParams["axes.prop_cycle"] = cycler(color=COLOURS)


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write STEM.pdf and STEM.png, each by a rename, and close the figure; the same figure gives the same bytes."""
    from matplotlib import pyplot

    written = []
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        for suffix, metadata in ((".pdf", {"CreationDate": None, "Producer": None}), (".png", {"Software": None})):
            target = stem.with_name(f"{stem.name}{suffix}")
            fresh = stem.with_name(f".{stem.name}.{os.getpid()}{suffix}")
            figure.savefig(fresh, metadata=metadata, bbox_inches="tight", pad_inches=0.02)
            os.replace(fresh, target)
            written.append(target)
    except OSError as error:
        raise UserError(
            f"The figure cannot be written to {stem.parent} ({error.strerror or error}): choose a directory that can."
        ) from error
    finally:
        pyplot.close(figure)
    return written
