"""Operations that keep the shape: normalisation, learned scales and biases, functions of each value."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kdcli.base.errors import KdError
from kdcli.base.text import dims
from kdcli.models.operations.shapes import Function, Shape, axis_of, check_maps, check_size


def lrn(
    shape: Shape,
    *,
    size: int = 5,
    alpha: float = 1.0,
    beta: float = 0.75,
    k: float = 1.0,
    within: bool = False,
) -> nn.Module:
    """Local response normalisation, across channels, or within each (where Caffe takes k to be 1)."""
    check_maps(shape)
    if size < 1 or size % 2 == 0:
        raise KdError(f"local size {size} must be odd")
    if within:
        check_size((shape[0], shape[1] + size, shape[2] + size), "padded input")

        def compute(values: Tensor) -> Tensor:
            """x · (1 + α · mean of x² over a size×size window)^−β, zeros beyond the map's edge."""
            squares = F.pad(values.square(), (size // 2,) * 4)
            return values * (1 + alpha * F.avg_pool2d(squares, size, 1)).pow(-beta)

        return Function(compute)
    check_size((shape[0] + size, *shape[1:]), "padded input")
    return nn.LocalResponseNorm(size, alpha, beta, k)


def batch_norm(shape: Shape, *, eps: float = 1e-5) -> nn.Module:
    """(x − running mean) / sqrt(running variance + eps), without learned scale and bias."""
    build = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d}[len(shape)]
    return build(shape[0], eps=eps, affine=False)


def mvn(shape: Shape, *, variance: bool = True, across: bool = False, eps: float = 1e-9) -> nn.Module:
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

    return Function(compute)


class Affine(nn.Module):
    """Learned scale, bias or both for each index of some axes."""

    def __init__(self, shape: Shape, view: Sequence[int], *, scale: bool, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape)) if scale else None
        self.bias = nn.Parameter(torch.zeros(shape)) if bias else None
        self._view = tuple(view)

    def forward(self, values: Tensor) -> Tensor:
        """(B, C, …) → the same shape."""
        if self.weight is not None:
            values = values * self.weight.view(self._view)
        return values if self.bias is None else values + self.bias.view(self._view)


def affine(
    shape: Shape,
    other: Shape | None = None,
    *,
    scale: bool = True,
    bias: bool = False,
    axis: int = 1,
    num_axes: int = 1,
) -> nn.Module:
    """Scales, biases or both, learned along `num_axes` axes from `axis` on (−1: all that follow).

    With a second input, its values are the scales or the biases.
    """
    if other is None:
        return Affine(*_learned(shape, axis, num_axes), scale=scale, bias=bias)
    if scale and bias:
        raise KdError("with a second input for the factors, learned summands are not supported")
    if axis not in (0, -len(shape) - 1):
        raise KdError(f"with two inputs only axis 0 is supported, not {axis}: both begin with the batch")
    if other != shape[: len(other)]:
        raise KdError(f"its second input {dims(other)} does not begin its first {dims(shape)}")
    ones = [1] * (len(shape) - len(other))  # axes at the end
    combine = torch.mul if scale else torch.add
    return Function(lambda values, others: combine(values, others.reshape(*others.shape, *ones)))


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


def prelu(shape: Shape, *, shared: bool = False) -> nn.Module:
    """max(x, 0) + slope · min(x, 0) with a learned slope per channel, or one for all."""
    return nn.PReLU(1 if shared else shape[0])


def unchanged_shape(build: Callable[..., nn.Module], shape: Shape, **args: Any) -> nn.Module:
    return build(**args)


def relu(shape: Shape, *, negative_slope: float = 0.0) -> nn.Module:
    """max(x, 0) + slope · min(x, 0)."""
    return nn.LeakyReLU(negative_slope) if negative_slope else nn.ReLU()


def absolute(shape: Shape) -> nn.Module:
    return Function(torch.abs)


def power(shape: Shape, *, power: float = 1.0, scale: float = 1.0, shift: float = 0.0) -> nn.Module:
    """(shift + scale · x)^power."""

    def compute(values: Tensor) -> Tensor:
        if scale != 1:
            values = values * scale
        if shift:
            values = values + shift
        return values if power == 1 else values.pow(power)

    return Function(compute)


def exp(shape: Shape, *, base: float | None = None, scale: float = 1.0, shift: float = 0.0) -> nn.Module:
    """base^(shift + scale · x), with base e by default."""
    inner = scale * (1.0 if base is None else math.log(base))
    outer = math.exp(shift) if base is None else base**shift
    return Function(lambda values: (values * inner).exp() * outer)


def log(shape: Shape, *, base: float | None = None, scale: float = 1.0, shift: float = 0.0) -> nn.Module:
    """log(shift + scale · x) to a base, e by default."""
    factor = 1.0 if base is None else 1 / math.log(base)
    return Function(lambda values: (values * scale + shift).log() * factor)


def dropout(shape: Shape, *, ratio: float = 0.5, scale_train: bool = True) -> nn.Module:
    """Dropout. Without `scale_train`, values are not scaled up in training, but scaled down at inference."""
    module = nn.Dropout(ratio)
    return module if scale_train else nn.Sequential(module, power(shape, scale=1 - ratio))
