"""Arms frames and layouts made by hand, as fixtures that are functions."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import pytest
from made import make_frame, make_layout

from analysis import Layout


@pytest.fixture
def frame_of() -> Callable[..., pd.DataFrame]:
    return make_frame


@pytest.fixture
def layout_of() -> Callable[..., Layout]:
    return make_layout
