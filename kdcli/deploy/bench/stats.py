"""Percentiles, intervals and verdicts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy.stats

Floats = npt.NDArray[np.float64]
SMALLEST = 1.02  # a ratio nearer to 1 than this is called no difference, however narrow its interval
BEYOND = 10  # samples that must lie beyond a percentile for it to be told
_RESAMPLES = 10_000


def percentile(values: Floats, share: float) -> float | None:
    """The value that `share` per cent lie below; None where fewer than ten lie beyond it."""
    if len(values) * (100 - share) / 100 < BEYOND and share > 95:
        return None
    return float(np.percentile(values, share))


def ratio_interval(sittings: Sequence[Floats], seed: int = 0) -> tuple[float, float, float]:
    """A ratio between the bounds of its bootstrap 95 % interval.

    Rounds of one sitting share where in memory the models lie and how the machine was: it is the sittings that are
    drawn anew. As there are few, the interval is the expanded percentile interval (Hesterberg, "What Teachers Should
    Know About the Bootstrap", 2015), which is as wide as Student's t asks.

    Args:
        sittings: ratios of the rounds of each sitting, any positive numbers; of one sitting alone, the rounds are
            drawn.

    Returns:
        Lower bound, ratio (the exponential of the mean of the sittings' median log ratios), upper bound.
    """
    logs = [np.log(np.asarray(one, np.float64)) for one in sittings if len(one)]
    medians = np.array([np.median(one) for one in logs]) if len(logs) > 1 else logs[0]
    middle, count = float(medians.mean()), len(medians)
    if count < 2:
        return 0.0, float(np.exp(middle)), float("inf")  # one round tells nothing of its chance
    random = np.random.default_rng(seed)
    means = medians[random.integers(0, count, (_RESAMPLES, count))].mean(axis=1)
    tail = 100 * scipy.stats.norm.cdf(-np.sqrt(count / (count - 1)) * scipy.stats.t.ppf(0.975, count - 1))
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(np.exp(min(low, middle))), float(np.exp(middle)), float(np.exp(max(high, middle)))


def verdict(low: float, ratio: float, high: float) -> str:
    """`faster`, `slower` or `no difference`: of an interval that leaves out 1, and a ratio that is worth a word."""
    if low > 1 and ratio >= SMALLEST:
        return "faster"
    if high < 1 and ratio <= 1 / SMALLEST:
        return "slower"
    return "no difference"


def half_width(low: float, ratio: float, high: float) -> float:
    """Half the interval's width, as a share of the ratio."""
    return (high - low) / (2 * ratio)
