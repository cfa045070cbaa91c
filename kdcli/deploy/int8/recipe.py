"""Int8 recipes and their names."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

RANGES = ("minmax", "entropy", "percentile")


@dataclass(frozen=True)
class Recipe:
    """One way to quantise; weights are int8 in all of them.

    Activation ranges are calibrated by `minmax`, the extremes; `entropy`, the range with the least KL divergence from
    the histogram; `percentile`, 99.999 % of the values.
    """

    signed: bool = False  # activations are int8 (S8S8) instead of uint8 (U8S8)
    per_channel: bool = True  # one scale per output channel of the weights instead of one per tensor
    ranges: str = "minmax"
    float_first: bool = False  # the first layer with weights stays float32
    float_last: bool = False

    @classmethod
    def parse(cls, name: str) -> Recipe:
        """The recipe of a name such as `u8s8-channel-minmax-last`, which `config.INT8_RECIPE` matches."""
        types, scope, ranges, *kept = name.split("-")
        return cls(types == "s8s8", scope == "channel", ranges, "first" in kept, "last" in kept)

    def __str__(self) -> str:
        parts = ["s8s8" if self.signed else "u8s8", "channel" if self.per_channel else "tensor", self.ranges]
        return "-".join([*parts, *["first"] * self.float_first, *["last"] * self.float_last])

    def variants(self) -> list[Recipe]:
        """Recipes that differ from this one in a single setting other than the ranges."""
        return [
            replace(self, per_channel=not self.per_channel),
            replace(self, signed=not self.signed),
            replace(self, float_first=not self.float_first),
            replace(self, float_last=not self.float_last),
        ]


@dataclass(frozen=True)
class Quantisation:
    """How a network was quantised, and the cost."""

    recipe: str  # name of a `Recipe`
    calibration_images: int  # train images that set the activation ranges
    reduce_range: bool  # weights have 7 bits, because 8-bit products could overflow on this CPU
    images: int  # train images, not used for calibration, on which the result was measured
    agreement: float  # per cent of them with the float32 network's top-1 class
    float_accuracy: float  # per cent
    int8_accuracy: float  # per cent

    def to_metadata(self) -> dict[str, Any]:
        """Plain values for the metadata of the file."""
        recipe = Recipe.parse(self.recipe)
        return {
            "weights": f"int8 per {'channel' if recipe.per_channel else 'tensor'}",
            "activations": "int8" if recipe.signed else "uint8",
            **asdict(self),
        }
