"""Operations on each value by itself: the module for some arguments; the shape stays."""

import math

from torch import Tensor, nn

from kdcli.base.errors import KdError
from kdcli.models.operations.shapes import Function


def relu(negative_slope: float = 0.0) -> nn.Module:
    """max(x, 0) + slope · min(x, 0)."""
    return nn.LeakyReLU(negative_slope) if negative_slope else nn.ReLU()


def absolute() -> nn.Module:
    """|x|."""
    return Function("Abs()", lambda values: values.abs())


def power(power: float = 1.0, scale: float = 1.0, shift: float = 0.0) -> nn.Module:
    """(shift + scale · x)^power."""

    def compute(values: Tensor) -> Tensor:
        if scale != 1:
            values = values * scale
        if shift:
            values = values + shift
        return values if power == 1 else values.pow(power)

    return Function(f"Power(power={power:g}, scale={scale:g}, shift={shift:g})", compute)


def exp(base: float | None = None, scale: float = 1.0, shift: float = 0.0) -> nn.Module:
    """base^(shift + scale · x), with base e by default."""
    inner = scale * (1.0 if base is None else math.log(_positive(base)))
    outer = math.exp(shift) if base is None else base**shift
    description = f"Exp({outer:g} · exp({inner:g} · x))"
    return Function(description, lambda values: (values * inner).exp() * outer)


def log(base: float | None = None, scale: float = 1.0, shift: float = 0.0) -> nn.Module:
    """log(shift + scale · x) to a base, e by default."""
    if base == 1:
        raise KdError("there is no logarithm to the base 1")
    factor = 1.0 if base is None else 1 / math.log(_positive(base))
    description = f"Log({factor:g} · log({scale:g} · x + {shift:g}))"
    return Function(description, lambda values: (values * scale + shift).log() * factor)


def _positive(base: float) -> float:
    if base <= 0:
        raise KdError(f"base {base:g} is not above 0")
    return base


def dropout(ratio: float = 0.5, scale_train: bool = True) -> nn.Module:
    """Dropout. Without `scale_train`, values are not scaled up in training, but scaled down at inference."""
    module = nn.Dropout(ratio)
    return module if scale_train else nn.Sequential(module, power(scale=1 - ratio))
