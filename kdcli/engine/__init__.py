"""The only training loop, chains of trainings, and evaluation."""

from kdcli.engine.chain import continued, fit_chain
from kdcli.engine.evaluate import Evaluation, evaluate, measure
from kdcli.engine.fit import fit
from kdcli.engine.result import Metrics, Result
from kdcli.engine.run_dir import RunDir

__all__ = [
    "Evaluation",
    "Metrics",
    "Result",
    "RunDir",
    "continued",
    "evaluate",
    "fit",
    "fit_chain",
    "measure",
]
