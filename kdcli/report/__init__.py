"""Figures and pages from results."""

from kdcli.report.figures import check_target, comparison, confusion, curves, pareto, pareto_front
from kdcli.report.page import Report, make_report, write_report

__all__ = [
    "Report",
    "check_target",
    "comparison",
    "confusion",
    "curves",
    "make_report",
    "pareto",
    "pareto_front",
    "write_report",
]
