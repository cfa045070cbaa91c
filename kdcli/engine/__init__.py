"""The only training loop, and evaluation."""

from kdcli.engine.evaluate import Evaluation, evaluate, measure
from kdcli.engine.fit import fit
from kdcli.engine.result import Metrics, Result
from kdcli.engine.run_dir import RunDir

__all__ = ["Evaluation", "Metrics", "Result", "RunDir", "evaluate", "fit", "measure"]
