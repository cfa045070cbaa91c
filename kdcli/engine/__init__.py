"""The only training loop, chains of trainings, and evaluation."""

from kdcli.engine.fit import fit, fit_chain, resume_config
from kdcli.engine.records import Evaluation, Metrics, RunResult, evaluate, measure, read_metrics, read_result
from kdcli.engine.run_dir import RunDir
