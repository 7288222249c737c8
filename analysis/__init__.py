"""From MLflow runs to frames, statistics and tables: `load` the arms of a table, `compare` its rows, `write_report`.

The modules imported here are light; mlflow, pandas, scipy and rich are imported when a function first needs them.
(`load` the function deliberately covers `load` the module, so that `analysis.load("losses")` works.)
"""

from analysis.index import write_index
from analysis.layout import Layout, LayoutRow, Metric, Reported, metric
from analysis.load import load
from analysis.report import Report, write_report
from analysis.statistics import Comparison, compare
from analysis.tables import Table, build_table

__all__ = [
    "Comparison",
    "Layout",
    "LayoutRow",
    "Metric",
    "Report",
    "Reported",
    "Table",
    "build_table",
    "compare",
    "load",
    "metric",
    "write_index",
    "write_report",
]
