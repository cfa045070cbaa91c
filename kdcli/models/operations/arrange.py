"""Joining, cutting, reshaping and reducing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from kdcli.base import text
from kdcli.base.errors import KdError
from kdcli.models.operations.shapes import Shape, axis_of, check_size, only

_MOST_LARGEST = 100  # of ArgMax


class Concat(nn.Module):
    """Concatenation; axis 1 is the channels."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, *values: Tensor) -> Tensor:
        return torch.cat(values, dim=self.axis)

    def extra_repr(self) -> str:
        return f"axis={self.axis}"


def concat(inputs: list[Shape], *, axis: int = 1) -> tuple[nn.Module, Shape]:
    """Inputs that are equal but along one axis, one after the other."""
    axis = axis_of(axis, inputs[0])
    rest = {(len(s), *s[: axis - 1], *s[axis:]) for s in inputs}
    if len(rest) != 1:
        raise KdError(f"cannot join {' and '.join(map(text.dims, inputs))} along axis {axis}")
    total = sum(shape[axis - 1] for shape in inputs)
    shape = (*inputs[0][: axis - 1], total, *inputs[0][axis:])
    check_size(shape, "output")
    return Concat(axis), shape


class Cut(nn.Module):
    """A box of the input; further inputs only told its size."""

    def __init__(self, box: Sequence[tuple[int, int, int]]) -> None:
        super().__init__()
        self.box = tuple(box)  # (axis, first, count)

    def forward(self, values: Tensor, *_: Tensor) -> Tensor:
        for axis, first, count in self.box:
            values = values.narrow(axis, first, count)
        return values

    def extra_repr(self) -> str:
        return ", ".join(f"axis {axis}: {first}…{first + count - 1}" for axis, first, count in self.box)


def slice_(
    inputs: list[Shape], *, part: int, of: int, axis: int = 1, points: Sequence[int] = ()
) -> tuple[nn.Module, Shape]:
    """Part number `part` of `of` along an axis, cut at `points`, or into equal ones."""
    shape = only(inputs)
    axis = axis_of(axis, shape)
    length = shape[axis - 1]
    if not points and length % of:
        raise KdError(f"{length} values along axis {axis} cannot be cut into {of} equal parts")
    cuts = [0, *(points or range(length // of, length, length // of)), length]
    if len(cuts) != of + 1:
        raise KdError(f"{len(points)} slice points make {len(points) + 1} parts; it has {of} outputs")
    if any(first >= second for first, second in pairwise(cuts)):
        raise KdError(f"slice points {list(points)} do not rise within {length}")
    if not 0 <= part < of:
        raise ValueError(f"part {part} of {of}")
    count = cuts[part + 1] - cuts[part]
    return Cut([(axis, cuts[part], count)]), (*shape[: axis - 1], count, *shape[axis:])


def crop(inputs: list[Shape], *, axis: int = 2, offset: Sequence[int] = ()) -> tuple[nn.Module, Shape]:
    """The first input, from `axis` on cut to the size of the second."""
    if len(inputs) != 2:
        raise KdError(f"it takes two inputs, not {len(inputs)}")
    first, like = inputs
    axis = axis_of(axis, first)
    axes = range(axis, len(first) + 1)
    if len(first) != len(like):
        raise KdError(f"its inputs {text.dims(first)} and {text.dims(like)} have not the same number of axes")
    if len(offset) not in (0, 1, len(axes)):
        raise KdError(f"{len(offset)} offsets for {len(axes)} axes")
    offsets = [*offset] * len(axes) if len(offset) == 1 else [*offset] or [0] * len(axes)
    box = [(number, start, like[number - 1]) for number, start in zip(axes, offsets, strict=True)]
    if any(start < 0 or start + count > first[number - 1] for number, start, count in box):
        raise KdError(
            f"a box of {text.dims(like)} at {text.dims(offsets)} does not lie in {text.dims(first)}"
        )
    return Cut(box), (*first[: axis - 1], *like[axis - 1 :])


class View(nn.Module):
    """The same values of each image in another shape."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, values: Tensor) -> Tensor:
        return values.reshape(values.shape[0], *self.shape)

    def extra_repr(self) -> str:
        return text.dims(self.shape)


def flatten(inputs: list[Shape], *, axis: int = 1, end_axis: int = -1) -> tuple[nn.Module, Shape]:
    """Axes from `axis` to `end_axis`, both included, become one."""
    shape = only(inputs)
    if not shape:
        return View((1,)), (1,)
    first, last = axis_of(axis, shape), axis_of(end_axis, shape)
    if first > last:
        raise KdError(f"axis {axis} comes after end_axis {end_axis}")
    flat = (*shape[: first - 1], math.prod(shape[first - 1 : last]), *shape[last:])
    return nn.Flatten(first, last), flat


def reshape(
    inputs: list[Shape], *, dims: Sequence[int], axis: int = 0, num_axes: int = -1
) -> tuple[nn.Module, Shape]:
    """Caffe's Reshape: `dims` take the place of `num_axes` axes from `axis` on; 0 copies, −1 is inferred.

    The batch must stay what it is: its place says 0 or −1, or a number that leaves the image's values whole.
    """
    shape = only(inputs)
    rank, values = len(shape) + 1, math.prod(shape)
    start = axis if axis >= 0 else rank + axis + 1
    end = rank if num_axes == -1 else start + num_axes
    if num_axes < -1 or not 0 <= start <= end <= rank:
        raise KdError(f"axis {axis}, num_axes {num_axes} do not lie in its input's {rank} axes")
    before: list[int | None] = [None, *shape]  # None: the batch
    places = [
        before[start + at : start + at + 1] if not side else [int(side)] for at, side in enumerate(dims)
    ]
    if any(not place for place in places):
        raise KdError(f"dims {list(dims)} copy an axis that its input does not have")
    after = [*before[:start], *(side for place in places for side in place), *before[end:]]
    batch, sides = (after[0] if after else 1), [side for side in after[1:] if side is not None]
    if len(sides) != len(after) - 1 or any(side < -1 for side in sides) or [batch, *sides].count(-1) > 1:
        raise KdError(f"dims {list(dims)} cannot be: each image must be reshaped by itself, one −1 at most")
    known = math.prod(side for side in sides if side != -1)
    if -1 in sides and known and values % known == 0 and batch is None:
        sides[sides.index(-1)] = values // known
    if -1 in sides or math.prod(sides) != values:
        raise KdError(
            f"dims {list(dims)} do not hold the {values} values of {text.dims(shape)} of each image"
        )
    return View(tuple(sides)), tuple(sides)


class Eltwise(nn.Module):
    """Sum (with coefficients), product or maximum of equal shapes."""

    def __init__(self, operation: str, coefficients: Sequence[float]) -> None:
        super().__init__()
        self.operation = operation
        self.coefficients = tuple(coefficients)

    def forward(self, *values: Tensor) -> Tensor:
        if self.operation == "sum" and self.coefficients:
            values = tuple(value * factor for value, factor in zip(values, self.coefficients, strict=True))
        result = values[0]
        for value in values[1:]:
            if self.operation == "sum":
                result = result + value
            elif self.operation == "prod":
                result = result * value
            else:
                result = torch.maximum(result, value)
        return result

    def extra_repr(self) -> str:
        return self.operation + (f", coefficients={self.coefficients}" if self.coefficients else "")


def eltwise(
    inputs: list[Shape], *, operation: str = "sum", coefficients: Sequence[float] = ()
) -> tuple[nn.Module, Shape]:
    """Element by element over two or more equal shapes."""
    if operation not in ("sum", "prod", "max"):
        raise KdError(f"unknown operation {operation}")
    if len(set(inputs)) != 1:
        raise KdError(f"its inputs differ: {' and '.join(map(text.dims, inputs))}")
    if coefficients and (operation != "sum" or len(coefficients) != len(inputs)):
        raise KdError(f"{len(coefficients)} coefficients do not go with {operation} of {len(inputs)} inputs")
    return Eltwise(operation, [float(factor) for factor in coefficients]), inputs[0]


class Reduction(nn.Module):
    """Sum, sum of magnitudes, sum of squares or mean of all from an axis on, times a factor."""

    def __init__(self, operation: str, axis: int, factor: float) -> None:
        super().__init__()
        self.operation, self.axis, self.factor = operation, axis, factor

    def forward(self, values: Tensor) -> Tensor:
        if self.operation == "asum":
            values = values.abs()
        elif self.operation == "sumsq":
            values = values.square()
        axes = tuple(range(self.axis, values.ndim))
        return (values.mean(axes) if self.operation == "mean" else values.sum(axes)) * self.factor

    def extra_repr(self) -> str:
        return f"{self.operation} from axis {self.axis} on, times {self.factor:g}"


def reduction(
    inputs: list[Shape], *, operation: str = "sum", axis: int = 1, factor: float = 1.0
) -> tuple[nn.Module, Shape]:
    """All that lies from `axis` on becomes one number."""
    if operation not in ("sum", "asum", "sumsq", "mean"):
        raise KdError(f"unknown operation {operation}")
    shape = only(inputs)
    axis = axis_of(axis, shape)
    return Reduction(operation, axis, factor), shape[: axis - 1]


def softmax(inputs: list[Shape], *, axis: int = 1) -> tuple[nn.Module, Shape]:
    """Probabilities along one axis."""
    shape = only(inputs)
    return nn.Softmax(dim=axis_of(axis, shape)), shape


class ArgMax(nn.Module):
    """Places, values or both of the largest along an axis; of equal ones, Caffe takes the last."""

    def __init__(self, axis: int | None, top_k: int, values: bool) -> None:
        super().__init__()
        self.axis, self.top_k, self.values = axis, top_k, values

    def forward(self, values: Tensor) -> Tensor:
        axis = 1 if self.axis is None else self.axis
        if self.axis is None:
            rank = values.ndim
            values = values.flatten(1)
        largest, places = self._largest(values, axis)
        if self.axis is not None:
            return largest if self.values else places
        found = torch.stack((places, largest), 1) if self.values else places.unsqueeze(1)
        return found.reshape(*found.shape, *[1] * (rank - 3))

    def _largest(self, values: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """One after the other: torch and ONNX agree on which of equal ones is found first only for a single one."""
        length = values.shape[axis]
        numbers = torch.arange(length, device=values.device).view(-1, *[1] * (values.ndim - 1 - axis))
        found = []
        for _ in range(self.top_k):
            place = length - 1 - values.flip(axis).argmax(axis, keepdim=True)
            found.append((values.gather(axis, place), place.to(values.dtype)))
            values = values.masked_fill(numbers == place, -math.inf)
        largest, places = zip(*found, strict=True)
        return torch.cat(largest, axis), torch.cat(places, axis)

    def extra_repr(self) -> str:
        return f"axis={self.axis}, top_k={self.top_k}, values={self.values}"


def argmax(
    inputs: list[Shape], *, axis: int | None = None, top_k: int = 1, values: bool = False
) -> tuple[nn.Module, Shape]:
    """With an axis: places (or values) of the `top_k` largest along it. Without: 1×top_k places of all the
    image's values, or 2×top_k places and values."""
    shape = only(inputs)
    if axis is not None:
        axis = axis_of(axis, shape)
    length = math.prod(shape) if axis is None else shape[axis - 1]
    if not 1 <= top_k <= min(length, _MOST_LARGEST):
        raise KdError(f"the {top_k} largest of {length} values; kd takes up to {_MOST_LARGEST}")
    if axis is not None:
        return ArgMax(axis, top_k, values), (*shape[: axis - 1], top_k, *shape[axis:])
    out = (2 if values else 1, top_k, *[1] * (len(shape) - 2))
    return ArgMax(None, top_k, values), out
