"""Parts shared by the operations: shapes of one image's values, their checks, modules without parameters."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from kdcli.base.errors import KdError
from kdcli.base.text import dims

Shape = tuple[int, ...]  # (C, H, W) for maps, (C,) for vectors
_MOST_VALUES = 2**29  # per layer, parameters or activations of one image; a damaged file may ask for anything


class Function(nn.Module):
    """A module without parameters: a function of its inputs."""

    description = "function()"  # in summaries; a node's operation and arguments

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(*values)

    def __repr__(self) -> str:
        return self.description


def is_vector(shape: Sequence[int], length: int) -> bool:
    """Whether a shape is (length,) or (length, 1, 1)."""
    return tuple(shape[:1]) == (length,) and math.prod(shape) == length


def check_size(shape: Shape, what: str) -> None:
    """Raise KdError for a shape that is empty or too large, before memory is allocated."""
    if any(side < 1 for side in shape):
        raise KdError(f"its {what} would be empty: {dims(shape)}")
    if math.prod(shape) > _MOST_VALUES:
        raise KdError(f"its {what} of {dims(shape)} values exceeds the limit of {_MOST_VALUES:,}")


def check_maps(shape: Shape) -> None:
    """Raise KdError for a shape that is not C×H×W."""
    if len(shape) != 3:
        raise KdError(f"it takes maps C×H×W, its input is {dims(shape)}")


def pair(value: Sequence[int], least: int) -> tuple[int, int]:
    """Check a pair [y, x]: neither is below `least`."""
    first, second = (int(side) for side in value)
    if min(first, second) < least:
        raise ValueError(f"{first}×{second} is below {least}")
    return first, second


def axis_of(axis: int, shape: Shape) -> int:
    """Convert Caffe's number of an axis (0 is the batch, negative from the end) to a number from 1 on.

    KdError for the batch: a layer that mixes images cannot be part of a classifier.
    """
    rank = len(shape) + 1
    found = axis + rank if axis < 0 else axis
    if not 0 <= found < rank:
        raise KdError(f"axis {axis} is not one of its input's {rank} (with the batch)")
    if found == 0:
        raise KdError(f"axis {axis} is the batch: each image must be computed by itself")
    return found
