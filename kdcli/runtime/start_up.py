"""What a start can do without."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch.optim import Optimizer


def spare_the_compiler() -> None:
    """Keep torch from importing its compiler for an optimizer that nobody compiles: two seconds of each start.

    torch marks some of the optimizer's methods as not to be traced, and imports the tracer at their first call to say
    so. Here they are given as their own untraced form. Where a release of torch does this in another way, nothing
    changes but the time.
    """
    for method in vars(Optimizer).values():
        plain = getattr(method, "__wrapped__", None)
        if plain is not None and not hasattr(plain, "__dynamo_disable"):
            setattr(plain, "__dynamo_disable", plain)


def plain_step(optimizer: Optimizer) -> Callable[[], None]:
    """The optimizer's step without hooks, and without what torch wraps around it for its compiler."""
    step = inspect.unwrap(type(optimizer).step)

    def run() -> None:
        with torch.no_grad():
            step(optimizer)

    return run
