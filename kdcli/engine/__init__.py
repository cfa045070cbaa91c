"""The only training loop, and evaluation."""

from kdcli.engine.evaluate import Evaluation, evaluate, measure
from kdcli.engine.fit import fit
from kdcli.engine.result import Epoch, Result
from kdcli.engine.run_dir import RunDir

__all__ = ["Epoch", "Evaluation", "Result", "RunDir", "evaluate", "fit", "measure"]
