"""Caffe's weight blobs as float32 arrays, and the digest that identifies them."""

import hashlib
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcli.base.errors import KdError

Array = npt.NDArray[np.float32]
Weights = dict[str, tuple[Array, ...]]  # layer name → its blobs

_MAX_AXES = 32


def weights_sha256(weights: Weights) -> str:
    """SHA-256 over names, shapes without leading ones, and float32 values: equal for every encoding."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        for blob in weights[name]:
            digest.update(repr((name, squeezed(blob.shape))).encode())
            digest.update(np.ascontiguousarray(blob, dtype="<f4").tobytes())
    return digest.hexdigest()


def squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    """A shape without leading ones: V1 wrote (1, 1, 1, N) where V2 writes (N,)."""
    sides = tuple(shape)
    while len(sides) > 1 and sides[0] == 1:
        sides = sides[1:]
    return sides


def blob_array(blob: Any, context: str) -> Array:
    """BlobProto → float32 array.

    Args:
        context: prefix of error messages: file and layer.

    Raises:
        KdError: no values, a shape whose product is not their number, or values that are not finite.
    """
    if blob.HasField("shape"):
        shape = tuple(int(side) for side in blob.shape.dim)
    else:
        shape = (blob.num, blob.channels, blob.height, blob.width)
    if len(shape) > _MAX_AXES:
        raise KdError(f"{context}: a shape of {len(shape)} numbers")
    if any(side < 1 for side in shape):
        raise KdError(f"{context}: shape {shape} is not positive")
    dtype, raw = ("<f8", blob.double_data) if blob.double_data else ("<f4", blob.data)
    data, width = b"".join(raw), np.dtype(dtype).itemsize
    if math.prod(shape) * width != len(data):
        raise KdError(
            f"{context}: shape {shape} wants {math.prod(shape):,} values, it has {len(data) / width:,g}"
        )
    values = np.frombuffer(data, dtype).reshape(shape).astype(np.float32)
    if not np.isfinite(values).all():
        raise KdError(f"{context}: some values are not finite")
    return values
