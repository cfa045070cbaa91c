"""Percentiles, bootstrap intervals of ratios, and verdicts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.stats

from kdcli.base.timing import Floats

SMALLEST = 1.02  # ratios nearer to 1 are called no difference, however narrow the interval
BEYOND = 10  # samples that must lie beyond a reported percentile above the 95th
_RESAMPLES = 10_000


def percentile(values: Floats, share: float) -> float | None:
    """The value that `share` per cent lie below; None where fewer than ten lie beyond it."""
    if len(values) * (100 - share) / 100 < BEYOND and share > 95:
        return None
    return float(np.percentile(values, share))


def ratio_interval(sessions: Sequence[Floats], seed: int = 0) -> tuple[float, float, float]:
    """Bootstrap 95 % interval of a ratio.

    Rounds of one session share the models' place in memory and the state of the machine, so sessions are resampled,
    not rounds. As there are few, the interval is the expanded percentile interval (Hesterberg, "What Teachers Should
    Know About the Bootstrap", 2015), which is as wide as Student's t requires.

    Args:
        sessions: ratios of the rounds of each session, positive; of a single session, rounds are resampled.

    Returns:
        Lower bound, ratio (the exponential of the mean of the sessions' median log ratios), upper bound; 0 and
        infinity around a single round.
    """
    logs = [np.log(np.asarray(ratios, np.float64)) for ratios in sessions]
    medians = np.array([np.median(ratios) for ratios in logs]) if len(logs) > 1 else logs[0]
    middle, count = float(medians.mean()), len(medians)
    if count < 2:
        return 0.0, float(np.exp(middle)), float("inf")
    random = np.random.default_rng(seed)
    means = medians[random.integers(0, count, (_RESAMPLES, count))].mean(axis=1)
    tail = 100 * scipy.stats.norm.cdf(-np.sqrt(count / (count - 1)) * scipy.stats.t.ppf(0.975, count - 1))
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(np.exp(min(low, middle))), float(np.exp(middle)), float(np.exp(max(high, middle)))


def verdict(low: float, ratio: float, high: float) -> str:
    """`faster`, `slower` or `no difference`: the interval must exclude 1, and the ratio be 2 % away from it."""
    if low > 1 and ratio >= SMALLEST:
        return "faster"
    if high < 1 and ratio <= 1 / SMALLEST:
        return "slower"
    return "no difference"
