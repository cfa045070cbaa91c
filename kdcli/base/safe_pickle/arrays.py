"""Numeric numpy arrays from untrusted descriptions of them."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from kdcli.base.errors import KdError

HINT = "Use the file only if you trust where it came from; kd reads numbers, text and arrays, never code."
NUMERIC = re.compile(r"[biuf][1248]")
OBJECT = re.compile(r"O[48]?")


def dtype_of(code: str, order: str) -> np.dtype[Any]:
    """A plain numeric dtype; `order` is one of `<>=|`, or the first letter of a code without one."""
    if not NUMERIC.fullmatch(code):
        raise KdError(f"refuses an array of type {code[:40]!r}: only plain numbers are read", HINT)
    try:
        return np.dtype((order if order in "<>=" else "=") + code)
    except TypeError as error:
        raise KdError(f"refuses an array of type {code[:40]!r}: only plain numbers are read", HINT) from error


def array_of(
    dtype: np.dtype[Any], shape: object, raw: bytes | bytearray | memoryview, order: str
) -> np.ndarray[Any, Any]:
    """An array that owns its memory.

    Raises:
        KdError: the shape is none, or does not go with the number of bytes.
    """
    if (
        not isinstance(shape, tuple)
        or len(shape) > 32
        or not all(type(size) is int and size >= 0 for size in shape)
        or math.prod(shape) * dtype.itemsize != len(raw)
    ):
        raise KdError(
            f"damaged array: shape {named(shape)} of {dtype} does not make {len(raw):,} bytes",
            "Fetch or write the file again.",
        )
    try:
        flat = np.frombuffer(raw, dtype=dtype) if len(raw) else np.zeros(0, dtype)
        return np.array(flat.reshape(shape, order="F" if order == "F" else "C"), order="K")
    except (ValueError, OverflowError) as error:  # a side of no array, beside one of length 0
        raise KdError(
            f"damaged array: no array has shape {named(shape)}", "Fetch or write the file again."
        ) from error


def named(value: object) -> str:
    """A value for a message, in bounded time: values that share parts can have endless text."""
    if isinstance(value, str | bytes):
        return repr(value[:40])
    if isinstance(value, tuple) and len(value) <= 8 and all(type(item) is int for item in value):
        return str(value)[:80]
    return type(value).__name__


def raw_bytes(value: object) -> bytes | bytearray:
    """Bytes, also where Python 2 wrote them as a str."""
    if isinstance(value, str):
        return value.encode("latin-1")
    if isinstance(value, bytes | bytearray):
        return value
    raise ValueError("array data are not bytes")
