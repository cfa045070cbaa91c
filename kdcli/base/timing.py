"""Interleaved timing. Every comparison of speeds in kd is made here."""

import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_WARM_S, _LONGEST_WARM_S = 0.1, 2.0
_STABLE = 0.95  # of the pace before: no faster than this is warm


def interleaved(
    calls: Sequence[Callable[[], Any]],
    *,
    rounds: int,
    repeats: int = 1,
    settle: bool = True,
    budget_s: float = math.inf,
    seed: int = 0,
    on_round: Callable[[int], None] = lambda done: None,
) -> Floats:
    """Seconds of each call, (rounds, calls, repeats).

    Calls take turns in each round, in random order. Garbage collection waits meanwhile.

    Args:
        repeats: timed calls in each turn.
        settle: begin each turn with an untimed call: the call before it has filled the caches.
        budget_s: no further round begins after this many seconds; the first round is always made.
        on_round: called with the number of rounds done.
    """
    order, started = np.random.default_rng(seed), time.perf_counter()
    seconds: list[Floats] = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        while len(seconds) < rounds and (not seconds or time.perf_counter() - started < budget_s):
            turn = np.zeros((len(calls), repeats))
            for index in order.permutation(len(calls)):
                if settle:
                    calls[index]()
                turn[index] = [seconds_of(calls[index]) for _ in range(repeats)]
            seconds.append(turn)
            on_round(len(seconds))
    finally:
        if collecting:
            gc.enable()
    return np.stack(seconds)  # (rounds, calls, repeats)


def warm_up(call: Callable[[], Any], *, at_least_s: float = _WARM_S, until_stable: bool = True) -> None:
    """Repeat a call for `at_least_s`, and, with `until_stable`, until it gets no faster, for at most 2 s."""
    begun, before = time.perf_counter(), math.inf
    while time.perf_counter() - begun < _LONGEST_WARM_S:
        started, count = time.perf_counter(), 0
        while count < 3 or time.perf_counter() - started < at_least_s:
            call()
            count += 1
        pace = (time.perf_counter() - started) / count
        if not until_stable or pace > _STABLE * before:
            return
        before = pace


def seconds_of(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def median_interval(values: Floats) -> tuple[float, float, float]:
    """Lower bound, median and upper bound of the median's 95 % interval, from order statistics alone.

    The number of values below the true median is binomial with probability ½.
    """
    import scipy.stats

    ordered = np.sort(values)
    below = max(int(scipy.stats.binom.ppf(0.025, len(ordered), 0.5)) - 1, 0)
    return float(ordered[below]), float(np.median(ordered)), float(ordered[-1 - below])
