"""Concatenation, slices, reshaping, element-wise combination and reduction."""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor, nn

from kdcli.base import text
from kdcli.base.errors import KdError
from kdcli.models.operations.shapes import Function, Shape, axis_of

_ELTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": torch.add,
    "prod": torch.mul,
    "max": torch.maximum,
}
_REDUCTIONS: dict[str, Callable[[Tensor, tuple[int, ...]], Tensor]] = {
    "sum": lambda values, axes: values.sum(axes),
    "asum": lambda values, axes: values.abs().sum(axes),
    "sumsq": lambda values, axes: values.square().sum(axes),
    "mean": lambda values, axes: values.mean(axes),
}


def concat(*inputs: Shape, axis: int = 1) -> nn.Module:
    """Concatenation of inputs that have equal shapes except along one axis."""
    axis = axis_of(axis, inputs[0])
    return Function(lambda *values: torch.cat(values, dim=axis))


def _box(box: Sequence[tuple[int, int, int]]) -> nn.Module:
    """The part of the first input that lies in a box of (axis, first, count)."""

    def compute(values: Tensor, *_: Tensor) -> Tensor:
        for axis, first, count in box:
            values = values.narrow(axis, first, count)
        return values

    return Function(compute)


def slice_(shape: Shape, *, part: int, of: int, axis: int = 1, points: Sequence[int] = ()) -> nn.Module:
    """Part number `part` of `of` along an axis, split at `points`, or into equal parts."""
    axis = axis_of(axis, shape)
    length = shape[axis - 1]
    cuts = [0, *(points or range(length // of, length, length // of)), length]
    if len(cuts) != of + 1 or any(first >= second for first, second in pairwise(cuts)):
        where = f" at {list(points)}" if points else ""
        raise KdError(f"{length} values along axis {axis} cannot be cut into {of} parts{where}")
    return _box([(axis, cuts[part], cuts[part + 1] - cuts[part])])


def crop(first: Shape, like: Shape, *, axis: int = 2, offset: Sequence[int] = ()) -> nn.Module:
    """The first input, cropped from `axis` on to the size of the second."""
    axis = axis_of(axis, first)
    axes = range(axis, len(first) + 1)
    offsets = [*offset] if len(offset) > 1 else [*offset, 0][:1] * len(axes)
    box = [(number, start, like[number - 1]) for number, start in zip(axes, offsets, strict=True)]
    inside = all(start >= 0 and start + count <= first[number - 1] for number, start, count in box)
    if len(first) != len(like) or not inside:
        raise KdError(
            f"a box of {text.dims(like)} at {text.dims(offsets)} does not lie in {text.dims(first)}"
        )
    return _box(box)


def _view(shape: Shape) -> nn.Module:
    """The values of each image in another shape."""
    return Function(lambda values: values.reshape(values.shape[0], *shape))


def flatten(shape: Shape, *, axis: int = 1, end_axis: int = -1) -> nn.Module:
    """Merge the axes from `axis` to `end_axis`, both included."""
    if not shape:
        return _view((1,))
    first, last = axis_of(axis, shape), axis_of(end_axis, shape)
    return nn.Flatten(first, last)


def reshape(shape: Shape, *, dims: Sequence[int], axis: int = 0, num_axes: int = -1) -> nn.Module:
    """Caffe's Reshape: `dims` replace `num_axes` axes from `axis` on; 0 copies a size, −1 is inferred.

    The batch must stay the first axis: its entry is 0 or −1, or a number that keeps each image's values together.
    """
    rank, values = len(shape) + 1, math.prod(shape)
    start = axis if axis >= 0 else rank + axis + 1
    end = rank if num_axes == -1 else start + num_axes
    if num_axes < -1 or not 0 <= start <= end <= rank:
        raise KdError(f"axis {axis}, num_axes {num_axes} do not lie in its input's {rank} axes")
    before = [0, *shape]  # 0: the batch
    replaced = [before[start + at] if side == 0 else int(side) for at, side in enumerate(dims)]
    batch, *sides = [*before[:start], *replaced, *before[end:]] or [1]
    if batch == 0 and sides.count(-1) == 1:
        known = -math.prod(sides)
        sides[sides.index(-1)] = values // known if known else 0
    if any(side < 1 for side in sides) or math.prod(sides) != values:
        raise KdError(f"dims {list(dims)} cannot reshape each image's {text.dims(shape)} by itself")
    return _view(tuple(sides))


def eltwise(*inputs: Shape, operation: str = "sum", coefficients: Sequence[float] = ()) -> nn.Module:
    """Sum (with coefficients), product or maximum of inputs of equal shape."""
    combine = _ELTWISE[operation]
    if len(set(inputs)) != 1:
        raise KdError(f"its inputs differ: {' and '.join(map(text.dims, inputs))}")
    if coefficients and (operation != "sum" or len(coefficients) != len(inputs)):
        raise KdError(f"{len(coefficients)} coefficients do not go with {operation} of {len(inputs)} inputs")
    factors = tuple(float(factor) for factor in coefficients)

    def compute(*values: Tensor) -> Tensor:
        if factors:
            values = tuple(value * factor for value, factor in zip(values, factors, strict=True))
        return reduce(combine, values)

    return Function(compute)


def reduction(shape: Shape, *, operation: str = "sum", axis: int = 1, factor: float = 1.0) -> nn.Module:
    """Sum, sum of magnitudes, sum of squares or mean over all axes from `axis` on, times a factor."""
    reduce_axes = _REDUCTIONS[operation]
    axes = tuple(range(axis_of(axis, shape), len(shape) + 1))
    return Function(lambda values: reduce_axes(values, axes) * factor)


def softmax(shape: Shape, *, axis: int = 1) -> nn.Module:
    """Softmax along one axis."""
    return nn.Softmax(dim=axis_of(axis, shape))
