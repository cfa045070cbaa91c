"""Comparison of methods: the same recipe and seeds for each, verdicts from paired runs."""

from kdcli.studies.compare.plan import Plan, make_plan
from kdcli.studies.compare.result import Comparison
from kdcli.studies.compare.run import compare
