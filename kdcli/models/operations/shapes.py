"""Shapes of one image's values, (C, H, W) for maps and (C,) for vectors, and what every operation checks of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kdcli.base.errors import KdError
from kdcli.base.text import dims

Shape = tuple[int, ...]
_MOST_VALUES = 2**29  # per layer, parameters or activations of one image; a damaged file may ask for anything


def is_vector(shape: Sequence[int], length: int) -> bool:
    """Whether a shape is (length,) or (length, 1, 1)."""
    return tuple(shape[:1]) == (length,) and math.prod(shape) == length


def check_size(shape: Shape, what: str) -> None:
    """Refuse what is empty or beyond all measure, before anything is allocated."""
    if any(side < 1 for side in shape):
        raise KdError(f"its {what} would be empty: {dims(shape)}")
    if math.prod(shape) > _MOST_VALUES:
        raise KdError(f"its {what} of {dims(shape)} values is beyond what kd takes ({_MOST_VALUES:,})")


def only(inputs: list[Shape], *, maps: bool = False) -> Shape:
    """The one input; `maps`: it must be C×H×W."""
    if len(inputs) != 1:
        raise KdError(f"it takes one input, not {len(inputs)}")
    if maps and len(inputs[0]) != 3:
        raise KdError(f"it takes maps C×H×W, its input is {dims(inputs[0])}")
    return inputs[0]


def pair(value: Sequence[int], least: int) -> tuple[int, int]:
    """[y, x], neither below `least`."""
    first, second = (int(side) for side in value)
    if min(first, second) < least:
        raise ValueError(f"{first}×{second} is below {least}")
    return first, second


def axis_of(axis: int, shape: Shape, *, end: bool = False) -> int:
    """Caffe's number of an axis, the batch being 0, negative from the end, as a number from 1 on.

    Args:
        end: one beyond the last is allowed.

    Raises:
        KdError: there is no such axis, or it is the batch: a layer that mixes images is no classifier's.
    """
    rank = len(shape) + 1
    found = axis + rank if axis < 0 else axis
    if not 0 <= found < rank + end:
        raise KdError(f"axis {axis} is not one of its input's {rank} (with the batch)")
    if found == 0:
        raise KdError(f"axis {axis} is the batch: each image must be computed by itself")
    return found
