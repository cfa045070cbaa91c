"""Normalisation, and the learned factors and summands that follow it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcli.base.errors import KdError
from kdcli.base.text import dims
from kdcli.models.operations.shapes import Shape, axis_of, check_size, only


class LocalResponseNormWithin(nn.Module):
    """x · (1 + α · mean of x² over a size×size window)^−β, the window of zeros beyond the map's edge."""

    def __init__(self, size: int, alpha: float, beta: float) -> None:
        super().__init__()
        self.size, self.alpha, self.beta = size, alpha, beta

    def forward(self, values: Tensor) -> Tensor:
        """(B, C, H, W) → the same shape."""
        reach = self.size // 2
        squares = F.pad(values.square(), (reach, reach, reach, reach))
        return values * (1 + self.alpha * F.avg_pool2d(squares, self.size, 1)).pow(-self.beta)

    def extra_repr(self) -> str:
        return f"{self.size}, alpha={self.alpha:g}, beta={self.beta:g}"


def lrn(
    inputs: list[Shape],
    *,
    size: int = 5,
    alpha: float = 1.0,
    beta: float = 0.75,
    k: float = 1.0,
    within: bool = False,
) -> tuple[nn.Module, Shape]:
    """Local response normalisation, across channels, or within each (where Caffe takes k to be 1)."""
    shape = only(inputs, maps=True)
    if size < 1 or size % 2 == 0:
        raise KdError(f"local size {size} must be odd")
    if within:
        check_size((shape[0], shape[1] + size, shape[2] + size), "padded input")
        return LocalResponseNormWithin(size, alpha, beta), shape
    check_size((shape[0] + size, *shape[1:]), "padded input")
    return nn.LocalResponseNorm(size, alpha, beta, k), shape


def batch_norm(inputs: list[Shape], *, eps: float = 1e-5) -> tuple[nn.Module, Shape]:
    """(x − running mean) / sqrt(running variance + eps); no factor, no summand."""
    shape = only(inputs)
    if len(shape) == 3:
        return nn.BatchNorm2d(shape[0], eps=eps, affine=False), shape
    if len(shape) in (1, 2):
        return nn.BatchNorm1d(shape[0], eps=eps, affine=False), shape
    raise KdError(f"it takes C or C×H×W, its input is {dims(shape)}")


class MeanVarianceNorm(nn.Module):
    """Each map, or with `across` each image, less its mean, and by its standard deviation + eps."""

    def __init__(self, variance: bool, across: bool, eps: float) -> None:
        super().__init__()
        self.variance, self.across, self.eps = variance, across, eps

    def forward(self, values: Tensor) -> Tensor:
        """(B, C, …) → the same shape."""
        axes = tuple(range(1 if self.across else 2, values.ndim))
        if not axes:  # one value is its own mean
            return values - values
        centred = values - values.mean(axes, keepdim=True)
        if not self.variance:
            return centred
        variance = centred.square().mean(axes, keepdim=True)
        # the bound changes no result; at exactly zero the root has no slope
        return centred / (variance.clamp_min(1e-30).sqrt() + self.eps)

    def extra_repr(self) -> str:
        return f"variance={self.variance}, across_channels={self.across}, eps={self.eps:g}"


def mvn(
    inputs: list[Shape], *, variance: bool = True, across: bool = False, eps: float = 1e-9
) -> tuple[nn.Module, Shape]:
    """Mean-variance normalisation; eps is added to the root, not under it."""
    return MeanVarianceNorm(variance, across, eps), only(inputs)


class Scale(nn.Module):
    """One factor, and perhaps one summand, for each place along some axes."""

    def __init__(self, shape: Shape, view: Sequence[int], bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None
        self._view = tuple(view)

    def forward(self, values: Tensor) -> Tensor:
        """(B, C, …) → the same shape."""
        scaled = values * self.weight.view(self._view)
        return scaled if self.bias is None else scaled + self.bias.view(self._view)

    def extra_repr(self) -> str:
        return f"{dims(self.weight.shape)}, bias={self.bias is not None}"


class Bias(nn.Module):
    """One summand for each place along some axes."""

    def __init__(self, shape: Shape, view: Sequence[int]) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(shape))
        self._view = tuple(view)

    def forward(self, values: Tensor) -> Tensor:
        """(B, C, …) → the same shape."""
        return values + self.bias.view(self._view)

    def extra_repr(self) -> str:
        return dims(self.bias.shape)


class Broadcast(nn.Module):
    """The first input times, or plus, the second, which lacks the last axes of the first."""

    def __init__(self, operation: str, missing: int) -> None:
        super().__init__()
        self.operation, self.missing = operation, missing

    def forward(self, values: Tensor, other: Tensor) -> Tensor:
        """(B, …, …) and (B, …) → the shape of the first."""
        other = other.reshape(*other.shape, *[1] * self.missing)
        return values * other if self.operation == "times" else values + other

    def extra_repr(self) -> str:
        return self.operation


def scale(
    inputs: list[Shape], *, bias: bool = False, axis: int = 1, num_axes: int = 1
) -> tuple[nn.Module, Shape]:
    """Learned factors along `num_axes` axes from `axis` on, −1: all that follow; or the second input's values."""
    if len(inputs) == 2:
        if bias:
            raise KdError("with a second input for the factors, learned summands are not supported")
        return _broadcast("times", inputs, axis)
    shape = only(inputs)
    learned, view = _learned(shape, axis, num_axes)
    return Scale(learned, view, bias), shape


def bias(inputs: list[Shape], *, axis: int = 1, num_axes: int = 1) -> tuple[nn.Module, Shape]:
    """Learned summands along `num_axes` axes from `axis` on, −1: all that follow; or the second input's values."""
    if len(inputs) == 2:
        return _broadcast("plus", inputs, axis)
    shape = only(inputs)
    return Bias(*_learned(shape, axis, num_axes)), shape


def _learned(shape: Shape, axis: int, num_axes: int) -> tuple[Shape, Shape]:
    """The shape of the learned values, and the view in which they meet (B, *shape)."""
    if num_axes == 0:
        return (), (1,)
    axis = axis_of(axis, shape)
    end = len(shape) + 1 if num_axes == -1 else axis + num_axes
    if num_axes < -1 or end > len(shape) + 1:
        raise KdError(f"{num_axes} axes from {axis} on are more than its input {dims(shape)} has")
    learned = shape[axis - 1 : end - 1]
    return learned, (*learned, *[1] * (len(shape) + 1 - end))


def _broadcast(operation: str, inputs: list[Shape], axis: int) -> tuple[nn.Module, Shape]:
    first, second = inputs
    if axis not in (0, -len(first) - 1):
        raise KdError(f"with two inputs only axis 0 is supported, not {axis}: both begin with the batch")
    if second != first[: len(second)]:
        raise KdError(f"its second input {dims(second)} does not begin its first {dims(first)}")
    return Broadcast(operation, len(first) - len(second)), first
