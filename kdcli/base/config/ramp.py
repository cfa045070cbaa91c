"""Values that change linearly during training: weights and temperatures."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Ramp:
    """Linear from `first` to `last`, then constant.

    Attributes:
        over: share of the training after which `last` is reached, above 0, at most 1.
    """

    first: float
    last: float
    over: float = 1.0

    def to(self, weight: float) -> Ramp:
        """The same ramp to another value; a rise from 0 stays one."""
        return Ramp(0.0 if self.first == 0 else weight, weight, self.over)

    def at(self, done: float) -> float:
        """The value when a share of the training is done, 0 … 1."""
        if self.first == self.last:
            return self.last
        return self.first + (self.last - self.first) * min(1.0, done / self.over)


def read_weight(text: str, epochs: int) -> tuple[str, Ramp]:
    """Name and weight of a term from `at=1000`, `at=0:1000` or `at=0:1000:20`, the last over 20 epochs.

    Raises:
        ValueError: another form, or a weight that is negative or not finite.
    """
    name, _, value = text.partition("=")
    try:
        first, *rest = (float(word) for word in value.split(":"))
    except ValueError:
        rest = [math.nan] * 3
    if not name.strip() or len(rest) > 2:
        raise ValueError("must be NAME=WEIGHT, NAME=FIRST:LAST or NAME=FIRST:LAST:EPOCHS")
    last = rest[0] if rest else first
    over = rest[1] if len(rest) == 2 else epochs
    if not all(math.isfinite(number) and number >= 0 for number in (first, last)):
        raise ValueError("must have weights of 0 or more")
    if not 0 < over <= epochs:
        raise ValueError(f"must have 1 … {epochs} epochs, as many as there are at most")
    return name.strip(), Ramp(first, last, over / epochs)
