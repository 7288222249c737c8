"""From MLflow runs to frames, statistics and tables: `load` the arms of a table, `compare` its rows, `write_report`.

The modules imported here are light; mlflow, pandas, scipy and rich are imported when a function first needs them.
(`load` the function deliberately covers `load` the module, so that `analysis.load("losses")` works.)
"""

from analysis.factorial_report import FactorialReport, build_factorial
from analysis.load import load
from analysis.power import seeds_needed
from analysis.report import Report, write_report
from analysis.statistics import Comparison, compare
from analysis.tables import Layout, LayoutRow, Metric, Table, build_table, metric

__all__ = [
    "Comparison",
    "FactorialReport",
    "Layout",
    "LayoutRow",
    "Metric",
    "Report",
    "Table",
    "build_factorial",
    "build_table",
    "compare",
    "load",
    "metric",
    "seeds_needed",
    "write_report",
]
