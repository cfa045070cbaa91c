"""A value that may change while training, as a weight or a temperature does."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Ramp:
    """From `first` in a straight line to `last`, which it keeps.

    Attributes:
        over: share of the training after which `last` is reached, above 0, at most 1.
    """

    first: float
    last: float
    over: float = 1.0

    def to(self, weight: float) -> Ramp:
        """The same on its way to another value: one that rises from 0 still does."""
        return Ramp(0.0 if self.first == 0 else weight, weight, self.over)

    def at(self, done: float) -> float:
        """The value when a share of the training is done, 0 … 1."""
        if self.first == self.last:
            return self.last
        return self.first + (self.last - self.first) * min(1.0, done / self.over)


def read_weight(text: str, epochs: int) -> tuple[str, Ramp]:
    """`at=1000`, `at=0:1000` or `at=0:1000:20`: a term's name, and its weight, the last over so many epochs.

    Raises:
        ValueError: it is none of these, or a weight is negative or no number.
    """
    name, equals, value = text.partition("=")
    words = value.split(":")
    form = "must be NAME=WEIGHT, NAME=FIRST:LAST or NAME=FIRST:LAST:EPOCHS"
    if not (name.strip() and equals) or len(words) > 3:
        raise ValueError(form)
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise ValueError(form) from None
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise ValueError("must have weights of 0 or more")
    first, last = numbers[0], numbers[min(1, len(numbers) - 1)]
    if len(numbers) < 3:
        return name.strip(), Ramp(first, last)
    if not 0 < numbers[2] <= epochs:
        raise ValueError(f"must have 1 … {epochs} epochs, as many as there are at most")
    return name.strip(), Ramp(first, last, numbers[2] / epochs)
