"""Comparison of methods: the same recipe and seeds for each, verdicts from paired runs."""

from kdcli.studies.compare.plan import Plan, PlannedRun, make_plan
from kdcli.studies.compare.result import Comparison, RunFigures, Standing, read
from kdcli.studies.compare.run import compare

__all__ = ["Comparison", "Plan", "PlannedRun", "RunFigures", "Standing", "compare", "make_plan", "read"]
