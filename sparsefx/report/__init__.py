"""What a compilation did and why: rows, totals, graphs, as objects, text and plain data."""

from sparsefx.report.explain import explain
from sparsefx.report.report import Report
from sparsefx.report.rows import Row
from sparsefx.report.totals import Flops, Totals

__all__ = ["Flops", "Report", "Row", "Totals", "explain"]
