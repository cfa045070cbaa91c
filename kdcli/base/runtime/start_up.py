"""What a start can do without, and what a long computation had better be told."""

from __future__ import annotations

import ctypes
import inspect
import sys
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


def keep_freed_memory() -> bool:
    """Let this process keep the memory it frees instead of giving it back and asking for it anew in each step.

    glibc maps each large block afresh, and the kernel fills it with zeros, page by page: a sixth of a LeNet's step.
    Results do not change.

    Returns:
        Whether the C library here could be told so.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1))


def plain_step(optimizer: Optimizer) -> Callable[[], None]:
    """The optimizer's step without hooks, and without what torch wraps around it for its compiler."""
    step = inspect.unwrap(type(optimizer).step)

    def run() -> None:
        with torch.no_grad():
            step(optimizer)

    return run
