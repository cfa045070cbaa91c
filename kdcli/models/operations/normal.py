"""Normalisation, and the learned scales and biases that follow it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcli.base.errors import KdError
from kdcli.base.text import dims
from kdcli.models.operations.shapes import Function, Shape, axis_of, check_size, only


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

        def compute(values: Tensor) -> Tensor:
            """x · (1 + α · mean of x² over a size×size window)^−β, zeros beyond the map's edge."""
            squares = F.pad(values.square(), (size // 2,) * 4)
            return values * (1 + alpha * F.avg_pool2d(squares, size, 1)).pow(-beta)

        return Function(f"LocalResponseNormWithin({size}, alpha={alpha:g}, beta={beta:g})", compute), shape
    check_size((shape[0] + size, *shape[1:]), "padded input")
    return nn.LocalResponseNorm(size, alpha, beta, k), shape


def batch_norm(inputs: list[Shape], *, eps: float = 1e-5) -> tuple[nn.Module, Shape]:
    """(x − running mean) / sqrt(running variance + eps), without learned scale and bias."""
    shape = only(inputs)
    if len(shape) == 3:
        return nn.BatchNorm2d(shape[0], eps=eps, affine=False), shape
    if len(shape) in (1, 2):
        return nn.BatchNorm1d(shape[0], eps=eps, affine=False), shape
    raise KdError(f"it takes C or C×H×W, its input is {dims(shape)}")


def mvn(
    inputs: list[Shape], *, variance: bool = True, across: bool = False, eps: float = 1e-9
) -> tuple[nn.Module, Shape]:
    """Mean-variance normalisation of each map, or with `across` of each image; eps is added to the root."""

    def compute(values: Tensor) -> Tensor:
        axes = tuple(range(1 if across else 2, values.ndim))
        if not axes:  # one value is its own mean
            return values - values
        centred = values - values.mean(axes, keepdim=True)
        if not variance:
            return centred
        # The bound changes no result; at exactly zero the root has no finite slope
        squares = centred.square().mean(axes, keepdim=True).clamp_min(1e-30)
        return centred / (squares.sqrt() + eps)

    description = f"MeanVarianceNorm(variance={variance}, across_channels={across}, eps={eps:g})"
    return Function(description, compute), only(inputs)


class Scale(nn.Module):
    """Learned scale, and optionally bias, for each index of some axes."""

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
    """Learned bias for each index of some axes."""

    def __init__(self, shape: Shape, view: Sequence[int]) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(shape))
        self._view = tuple(view)

    def forward(self, values: Tensor) -> Tensor:
        """(B, C, …) → the same shape."""
        return values + self.bias.view(self._view)

    def extra_repr(self) -> str:
        return dims(self.bias.shape)


def scale(
    inputs: list[Shape], *, bias: bool = False, axis: int = 1, num_axes: int = 1
) -> tuple[nn.Module, Shape]:
    """Learned scales along `num_axes` axes from `axis` on (−1: all that follow), or scales from the second input."""
    if len(inputs) == 2:
        if bias:
            raise KdError("with a second input for the factors, learned summands are not supported")
        return _broadcast("times", inputs, axis)
    shape = only(inputs)
    learned, view = _learned(shape, axis, num_axes)
    return Scale(learned, view, bias), shape


def bias(inputs: list[Shape], *, axis: int = 1, num_axes: int = 1) -> tuple[nn.Module, Shape]:
    """Learned biases along `num_axes` axes from `axis` on (−1: all that follow), or biases from the second input."""
    if len(inputs) == 2:
        return _broadcast("plus", inputs, axis)
    shape = only(inputs)
    return Bias(*_learned(shape, axis, num_axes)), shape


def _learned(shape: Shape, axis: int, num_axes: int) -> tuple[Shape, Shape]:
    """Shape of the learned values, and the view that broadcasts them against (B, *shape)."""
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
    combine = torch.mul if operation == "times" else torch.add
    missing = len(first) - len(second)  # axes at the end
    module = Function(
        f"Broadcast({operation})",
        lambda values, other: combine(values, other.reshape(*other.shape, *[1] * missing)),
    )
    return module, first
