"""Operations on each value by itself."""

from __future__ import annotations

import math

from torch import Tensor, nn

from kdcli.base.errors import KdError
from kdcli.base.text import dims
from kdcli.models.operations.shapes import Function, Shape, only


def relu(inputs: list[Shape], *, negative_slope: float = 0.0) -> tuple[nn.Module, Shape]:
    """max(x, 0) + slope · min(x, 0)."""
    return nn.LeakyReLU(negative_slope) if negative_slope else nn.ReLU(), only(inputs)


def prelu(inputs: list[Shape], *, shared: bool = False) -> tuple[nn.Module, Shape]:
    """max(x, 0) + slope · min(x, 0) with a learned slope per channel, or one for all."""
    shape = only(inputs)
    if not shape:
        raise KdError(f"it takes C or C×H×W, its input is {dims(shape)}")
    return nn.PReLU(1 if shared else shape[0]), shape


def elu(inputs: list[Shape], *, alpha: float = 1.0) -> tuple[nn.Module, Shape]:
    """x above 0, alpha · (exp(x) − 1) below."""
    return nn.ELU(alpha), only(inputs)


def sigmoid(inputs: list[Shape]) -> tuple[nn.Module, Shape]:
    """1 / (1 + exp(−x))."""
    return nn.Sigmoid(), only(inputs)


def tanh(inputs: list[Shape]) -> tuple[nn.Module, Shape]:
    """tanh x."""
    return nn.Tanh(), only(inputs)


def softplus(inputs: list[Shape]) -> tuple[nn.Module, Shape]:
    """log(1 + exp(x)), Caffe's BNLL."""
    return nn.Softplus(), only(inputs)


def absolute(inputs: list[Shape]) -> tuple[nn.Module, Shape]:
    """|x|."""
    return Function("Abs()", lambda values: values.abs()), only(inputs)


def power(
    inputs: list[Shape], *, power: float = 1.0, scale: float = 1.0, shift: float = 0.0
) -> tuple[nn.Module, Shape]:
    """(shift + scale · x)^power."""

    def compute(values: Tensor) -> Tensor:
        if scale != 1:
            values = values * scale
        if shift:
            values = values + shift
        return values if power == 1 else values.pow(power)

    return Function(f"Power(power={power:g}, scale={scale:g}, shift={shift:g})", compute), only(inputs)


def exp(
    inputs: list[Shape], *, base: float | None = None, scale: float = 1.0, shift: float = 0.0
) -> tuple[nn.Module, Shape]:
    """base^(shift + scale · x), with base e by default."""
    _check_base(base)
    inner = scale * (1.0 if base is None else math.log(base))
    outer = math.exp(shift) if base is None else base**shift
    description = f"Exp({outer:g} · exp({inner:g} · x))"
    return Function(description, lambda values: (values * inner).exp() * outer), only(inputs)


def log(
    inputs: list[Shape], *, base: float | None = None, scale: float = 1.0, shift: float = 0.0
) -> tuple[nn.Module, Shape]:
    """log(shift + scale · x) to a base, e by default."""
    _check_base(base)
    if base == 1:
        raise KdError("there is no logarithm to the base 1")
    factor = 1.0 if base is None else 1 / math.log(base)
    description = f"Log({factor:g} · log({scale:g} · x + {shift:g}))"
    return Function(description, lambda values: (values * scale + shift).log() * factor), only(inputs)


def _check_base(base: float | None) -> None:
    if base is not None and base <= 0:
        raise KdError(f"base {base:g} is not above 0")


def dropout(inputs: list[Shape], *, ratio: float = 0.5, scale_train: bool = True) -> tuple[nn.Module, Shape]:
    """Dropout. Without `scale_train`, values are not scaled up in training, but scaled down at inference."""
    module: nn.Module = nn.Dropout(ratio)
    if not scale_train:
        module = nn.Sequential(module, power(inputs, scale=1 - ratio)[0])
    return module, only(inputs)
