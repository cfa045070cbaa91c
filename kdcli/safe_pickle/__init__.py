"""Read the pickles of old datasets and weights without executing them.

A pickle is a program for a small stack machine. `machine` is another machine for the same programs that has
no way to call anything: a global is only a name, the few names in its `BUILDERS` stand for methods that make
numpy arrays, dtypes, bytes and dicts after checking every argument, and any other name is refused.
Python 2 and protocols 0 to 5 are read; what comes out are plain containers, numbers, text and numeric arrays.
"""

from __future__ import annotations

import ast
import re
import struct
from pathlib import Path

from kdcli.errors import KdError
from kdcli.safe_pickle.arrays import HINT, array_of, dtype_of
from kdcli.safe_pickle.machine import Machine

__all__ = ["load_npy", "read"]

MAX_FILE_BYTES = 2 << 30
MAX_HEADER_BYTES = 10_000


def read(data: bytes) -> object:
    """The value of a pickle.

    Byte keys of dicts come out as text (Latin-1, as Python 2 wrote them); an OrderedDict as a dict; an object
    array of shape () as the one object it holds.

    Returns:
        None, numbers, str, bytes, list, tuple, set, dict, and numeric arrays and scalars of numpy.

    Raises:
        KdError: it names a function or class that is not allowed, is damaged, or is beyond a limit.
    """
    try:
        return Machine(data).run()
    except KdError:
        raise
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        OverflowError,
        AttributeError,
        struct.error,
        RecursionError,
    ) as error:
        raise KdError(f"damaged pickle: {error}", "Fetch or write the file again.") from error


def load_npy(path: Path) -> object:
    """The content of a .npy file: a numeric array, or the dict that `numpy.save(path, dict)` wrote.

    Raises:
        KdError: unreadable, damaged, or what `read` refuses.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise KdError(f"{path} is larger than {MAX_FILE_BYTES:,} bytes", "That is no file of weights.")
        data = path.read_bytes()
    except OSError as error:
        raise KdError(f"cannot read {path}: {error.strerror or error}", "Check the path.") from error
    try:
        if not data.startswith(b"\x93NUMPY"):
            if data[:1] == b"\x80":  # numpy.load, too, takes a bare pickle under this name
                return read(data)
            raise KdError("not a .npy file", "Write it with numpy.save.")
        return _npy(data)
    except KdError as error:
        raise KdError(f"{path}: {error.message}", error.hint) from error


def _npy(data: bytes) -> object:
    try:
        wide = data[6] >= 2
        start = 12 if wide else 10
        (length,) = struct.unpack_from("<I" if wide else "<H", data, 8)
        if length > MAX_HEADER_BYTES or start + length > len(data):
            raise ValueError("header too long")
        text = data[start : start + length].decode("utf-8" if data[6] >= 3 else "latin-1")
        header = ast.literal_eval(re.sub(r"(?<=\d)L\b", "", text).strip())  # Python 2 wrote (3L, 4L)
        if not isinstance(header, dict) or set(header) != {"descr", "fortran_order", "shape"}:
            raise ValueError("no descr, fortran_order and shape")
        descr, shape, fortran = header["descr"], header["shape"], header["fortran_order"]
        if not isinstance(descr, str):
            raise ValueError("structured arrays are not read")
    except (
        ValueError,
        IndexError,
        SyntaxError,
        TypeError,
        struct.error,
        RecursionError,
        MemoryError,
    ) as error:
        raise KdError(f"damaged .npy header: {error}", "Fetch or write the file again.") from error
    body = data[start + length :]
    if descr.lstrip("|<>=").startswith("O"):
        if shape != ():
            raise KdError(f"refuses an object array of shape {shape}", HINT)
        return read(body)
    return array_of(dtype_of(descr.lstrip("|<>="), descr[:1]), shape, body, "F" if fortran else "C")
