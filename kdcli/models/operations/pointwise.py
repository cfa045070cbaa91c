"""Element by element."""

from __future__ import annotations

import math

from torch import Tensor, nn

from kdcli.base.errors import KdError
from kdcli.base.text import dims
from kdcli.models.operations.shapes import Shape, only


def relu(inputs: list[Shape], *, negative_slope: float = 0.0) -> tuple[nn.Module, Shape]:
    """max(x, 0) + slope · min(x, 0)."""
    return nn.LeakyReLU(negative_slope) if negative_slope else nn.ReLU(), only(inputs)


def prelu(inputs: list[Shape], *, shared: bool = False) -> tuple[nn.Module, Shape]:
    """max(x, 0) + slope · min(x, 0), a learned slope for each channel, or one for all."""
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


class Abs(nn.Module):
    """Magnitudes."""

    def forward(self, values: Tensor) -> Tensor:
        return values.abs()


def absolute(inputs: list[Shape]) -> tuple[nn.Module, Shape]:
    """|x|."""
    return Abs(), only(inputs)


class Power(nn.Module):
    """(shift + scale · x)^power."""

    def __init__(self, power: float, scale: float, shift: float) -> None:
        super().__init__()
        self.power, self.scale, self.shift = power, scale, shift

    def forward(self, values: Tensor) -> Tensor:
        if self.scale != 1:
            values = values * self.scale
        if self.shift:
            values = values + self.shift
        return values if self.power == 1 else values.pow(self.power)

    def extra_repr(self) -> str:
        return f"power={self.power:g}, scale={self.scale:g}, shift={self.shift:g}"


def power(
    inputs: list[Shape], *, power: float = 1.0, scale: float = 1.0, shift: float = 0.0
) -> tuple[nn.Module, Shape]:
    """(shift + scale · x)^power."""
    return Power(power, scale, shift), only(inputs)


class Exp(nn.Module):
    """base^(shift + scale · x); no base: e."""

    def __init__(self, base: float | None, scale: float, shift: float) -> None:
        super().__init__()
        self.inner = scale * (1.0 if base is None else math.log(base))
        self.outer = math.exp(shift) if base is None else base**shift

    def forward(self, values: Tensor) -> Tensor:
        return (values * self.inner).exp() * self.outer

    def extra_repr(self) -> str:
        return f"{self.outer:g} · exp({self.inner:g} · x)"


def exp(
    inputs: list[Shape], *, base: float | None = None, scale: float = 1.0, shift: float = 0.0
) -> tuple[nn.Module, Shape]:
    """base^(shift + scale · x)."""
    _check_base(base)
    return Exp(base, scale, shift), only(inputs)


class Log(nn.Module):
    """Logarithm of shift + scale · x to a base; no base: e."""

    def __init__(self, base: float | None, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift
        self.factor = 1.0 if base is None else 1 / math.log(base)

    def forward(self, values: Tensor) -> Tensor:
        return (values * self.scale + self.shift).log() * self.factor

    def extra_repr(self) -> str:
        return f"{self.factor:g} · log({self.scale:g} · x + {self.shift:g})"


def log(
    inputs: list[Shape], *, base: float | None = None, scale: float = 1.0, shift: float = 0.0
) -> tuple[nn.Module, Shape]:
    """log(shift + scale · x) to a base."""
    _check_base(base)
    if base == 1:
        raise KdError("there is no logarithm to the base 1")
    return Log(base, scale, shift), only(inputs)


def _check_base(base: float | None) -> None:
    if base is not None and base <= 0:
        raise KdError(f"base {base:g} is not above 0")


def dropout(inputs: list[Shape], *, ratio: float = 0.5, scale_train: bool = True) -> tuple[nn.Module, Shape]:
    """Dropout; without `scale_train` what is left is not scaled up in training, but all is scaled down in use."""
    module: nn.Module = nn.Dropout(ratio)
    return module if scale_train else nn.Sequential(module, Power(1.0, 1 - ratio, 0.0)), only(inputs)
