"""Ways to quantise, by name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Ranges = Literal["minmax", "entropy", "percentile"]


@dataclass(frozen=True)
class Recipe:
    """One way to quantise; weights are int8 in all of them.

    Attributes:
        signed: activations are int8 (S8S8), not uint8 (U8S8).
        per_channel: a scale for each output channel's weights, not one for the tensor.
        ranges: how activations' ranges are found: their extremes; the range whose histogram loses the least
            information (KL divergence); or what holds 99.999 % of the values.
        float_first, float_last: the first or last layer with weights stays float32.
    """

    signed: bool = False
    per_channel: bool = True
    ranges: Ranges = "minmax"
    float_first: bool = False
    float_last: bool = False

    @classmethod
    def parse(cls, name: str) -> Recipe:
        """The recipe of a name such as `u8s8-channel-minmax-last`; `config.INT8_RECIPE` says which there are."""
        words = name.split("-")
        return next(
            cls(words[0] == "s8s8", words[1] == "channel", ranges, "first" in words[3:], "last" in words[3:])
            for ranges in _RANGES
            if ranges == words[2]
        )

    def __str__(self) -> str:
        words = ["s8s8" if self.signed else "u8s8", "channel" if self.per_channel else "tensor", self.ranges]
        return "-".join([*words, *["first"] * self.float_first, *["last"] * self.float_last])

    def variants(self) -> list[Recipe]:
        """This recipe with one thing but its ranges changed, each."""
        return [
            replace(self, per_channel=not self.per_channel),
            replace(self, signed=not self.signed),
            replace(self, float_first=not self.float_first),
            replace(self, float_last=not self.float_last),
        ]


_RANGES: tuple[Ranges, ...] = ("minmax", "entropy", "percentile")
OF_EACH_RANGES = tuple(Recipe(ranges=ranges) for ranges in _RANGES)
