"""Optimizers and learning rates."""

import math

import torch
from torch import nn

from kdcli.methods import TrainConfig

_WARM_UP, _START, _END = 0.3, 1 / 25, 1e-4  # of onecycle: share of steps, first and last rate over the peak


def learning_rate(schedule: str, peak: float, step: int, steps: int) -> float:
    """Learning rate of one step: a pure function of its number, so it has no state to save.

    step: ÷10 at 80 % (the reference's recipe). cosine: half a cosine from the peak to 0 (Loshchilov & Hutter 2017).
    onecycle: cosine from peak/25 up to the peak over 30 %, then cosine to peak·1e-4 (Smith & Topin 2018).

    Args:
        schedule: one of these.
        peak: the highest rate.
        step: 0 … steps − 1.
    """
    share = step / max(1, steps - 1)
    if schedule == "step":
        return peak * (0.1 if step >= 0.8 * steps else 1.0)
    if schedule == "cosine":
        return peak * _cosine(1.0, 0.0, step / steps)
    if share < _WARM_UP:
        return peak * _cosine(_START, 1.0, share / _WARM_UP)
    return peak * _cosine(1.0, _END, (share - _WARM_UP) / (1 - _WARM_UP))


def _cosine(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


def make_optimizer(config: TrainConfig, *modules: nn.Module) -> torch.optim.Optimizer:
    """The optimizer named in the settings; fused, which is one pass over the weights instead of many."""
    parameters = [value for module in modules for value in module.parameters()]
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            config.lr,
            momentum=0.9,
            nesterov=True,
            weight_decay=config.weight_decay,
            fused=True,
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, config.lr, weight_decay=config.weight_decay, fused=True)
