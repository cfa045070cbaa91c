"""Figures and pages from results."""

from kdcli.report.figures import comparison, confusion, curves, pareto, pareto_front
from kdcli.report.page import Report, make_report
