"""Which method is better: the same recipe for each, paired seeds, and no claim that the runs do not bear out."""

from kdcli.studies.compare.plan import Plan, PlannedRun, make_plan
from kdcli.studies.compare.result import Comparison, RunFigures, Standing, read
from kdcli.studies.compare.run import compare

__all__ = ["Comparison", "Plan", "PlannedRun", "RunFigures", "Standing", "compare", "make_plan", "read"]
