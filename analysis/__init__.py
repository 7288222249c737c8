"""From MLflow runs to frames, statistics and tables: `load` the arms of a table, `compare` its rows, `write_report`;
`histories`, `weight_history` and `selector_history` tell how the arms went.

The modules imported here are light; mlflow, pandas, scipy and rich are imported when a function first needs them.
(`load` and `histories` the functions deliberately cover the modules of these names, so that `analysis.load("losses")` works.)
"""

from analysis.factorial_report import FactorialReport, build_factorial
from analysis.gallery import Gallery
from analysis.histories import histories, selector_history, weight_history
from analysis.index import write_index
from analysis.layout import Layout, LayoutRow, Reported
from analysis.load import load
from analysis.metrics import Metric, metric
from analysis.planned import layout_of, plan_of
from analysis.power import seeds_needed
from analysis.report import Report, write_report
from analysis.statistics import Comparison, compare
from analysis.tables import Table, build_table

__all__ = [
    "Comparison",
    "FactorialReport",
    "Gallery",
    "Layout",
    "LayoutRow",
    "Metric",
    "Report",
    "Reported",
    "Table",
    "build_factorial",
    "build_table",
    "compare",
    "histories",
    "layout_of",
    "load",
    "metric",
    "plan_of",
    "seeds_needed",
    "selector_history",
    "weight_history",
    "write_index",
    "write_report",
]
