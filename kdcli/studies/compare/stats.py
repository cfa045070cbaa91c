"""Statistics of paired runs: the interval of a mean difference, verdicts, and Holm's correction."""

import math
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from kdcli.base.results import Probability
from kdcli.engine.records import Record

BETTER, WORSE, INCONCLUSIVE = "better", "worse", "inconclusive"
ONE_SEED = "one seed: no claim"
LEVEL = 0.95


# an interval from two seeds is up to thirteen times as wide as the differences
Points = Annotated[float, Field(ge=-1e4, le=1e4, allow_inf_nan=False)]
Interval = tuple[Points, Points]


class Summary(Record):
    """Statistics of a sample; None for one value, except the mean.

    `deviation` is the sample's standard deviation (n − 1); `interval` the 95 % interval of the mean by Student's t of
    n − 1 degrees of freedom; `p` two-sided, of the mean being 0.
    """

    count: Annotated[int, Field(ge=1, lt=2**53)]
    mean: Points
    deviation: Points | None = None
    interval: Interval | None = None
    p: Probability | None = None


def summary(values: Sequence[float], resolution: float = 0.0) -> Summary:
    """Mean, spread and t-interval (Student 1908) of one value or more.

    Of paired differences this is the paired t-test. Accuracies are shares of whole images: a few differences may be
    equal by that alone, and would then seem to be known exactly. Their deviation is therefore taken to be at least
    that of the rounding of two accuracies, resolution / √6, where `resolution` is the step of a value; 0: no limit.
    """
    from scipy import special

    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Summary(count=1, mean=mean)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    error = max(deviation, resolution / math.sqrt(6)) / math.sqrt(count)
    half = float(special.stdtrit(count - 1, 0.5 + LEVEL / 2)) * error
    ratio = abs(mean) / error if error > 0 else math.inf if mean else 0.0
    p = 2 * float(special.stdtr(count - 1, -ratio))
    interval = mean - half, mean + half
    return Summary(count=count, mean=mean, deviation=deviation, interval=interval, p=p)


def verdict(difference: Summary) -> str:
    """`better` or `worse` only if the whole interval is on one side of 0."""
    if difference.interval is None:
        return ONE_SEED
    low, high = difference.interval
    return BETTER if low > 0 else WORSE if high < 0 else INCONCLUSIVE


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for all of these comparisons together (Holm 1979), in the order given."""
    ranked = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(ranked):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
