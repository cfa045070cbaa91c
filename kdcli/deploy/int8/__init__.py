"""Float32 ONNX → static int8 (QDQ), by one recipe or by the one that is worth most here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kdcli.deploy.int8.recipe import Recipe
from kdcli.deploy.int8.static import Quantiser, excluded_nodes, needs_reduced_range
from kdcli.deploy.int8.trials import Trial, search

__all__ = [
    "Quantisation",
    "Quantiser",
    "Recipe",
    "Trial",
    "excluded_nodes",
    "judged",
    "needs_reduced_range",
    "search",
]


@dataclass(frozen=True)
class Quantisation:
    """How a network was quantised, and what it cost.

    Attributes:
        recipe: its name, see `Recipe`.
        calibration_images: train images that set the activations' ranges.
        reduce_range: weights have 7 bits, because this CPU's 8-bit products could overflow.
        images: train images, none of them used for calibration, that judge the result.
        agreement: per cent of them with the float32 network's first class.
        float_accuracy, int8_accuracy: per cent of them right.
    """

    recipe: str
    calibration_images: int
    reduce_range: bool
    images: int = 0
    agreement: float = 0.0
    float_accuracy: float = 0.0
    int8_accuracy: float = 0.0


def judged(
    quantisation: Quantisation, *, images: int, agreement: float, float_accuracy: float, int8_accuracy: float
) -> Quantisation:
    """The same with its costs filled in."""
    return replace(
        quantisation,
        images=images,
        agreement=agreement,
        float_accuracy=float_accuracy,
        int8_accuracy=int8_accuracy,
    )
