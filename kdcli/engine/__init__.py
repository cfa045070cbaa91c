"""The only training loop, and evaluation."""

from kdcli.engine.evaluate import Evaluation, evaluate, measure
from kdcli.engine.fit import Epoch, Result, fit
from kdcli.engine.run_dir import RunDir

__all__ = ["Epoch", "Evaluation", "Result", "RunDir", "evaluate", "fit", "measure"]
