"""From MLflow runs to frames, statistics and tables: `load` the arms of a table, `compare` its rows, `write_report`.

The modules imported here are light; mlflow, pandas, scipy and rich are imported when a function first needs them.
(`load` the function deliberately covers `load` the module, so that `analysis.load("losses")` works.)
"""

from analysis.load import load
from analysis.metrics import Metric, metric
from analysis.report import Report, write_report
from analysis.statistics import Comparison, compare
from analysis.tables import Layout, LayoutRow, Table, build_table

__all__ = [
    "Comparison",
    "Layout",
    "LayoutRow",
    "Metric",
    "Report",
    "Table",
    "build_table",
    "compare",
    "load",
    "metric",
    "write_report",
]
