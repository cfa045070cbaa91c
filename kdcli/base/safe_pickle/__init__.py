"""Read the pickles of old datasets and weights without executing them.

A pickle is a program for a small stack machine. `machine` is another machine for the same programs that has
no way to call anything: a global is only a name, the few names in its `BUILDERS` stand for methods that make
numpy arrays, dtypes, bytes and dicts after checking every argument, and any other name is refused.
Python 2 and protocols 0 to 5 are read; what comes out are plain containers, numbers, text and numeric arrays.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

from kdcli.base.errors import KdError
from kdcli.base.safe_pickle.arrays import HINT, array_of, dtype_of, named
from kdcli.base.safe_pickle.machine import Machine

__all__ = ["load_npy", "read", "read_npy"]

MAX_FILE_BYTES = 1 << 30
MAX_HEADER_BYTES = 10_000

# numpy writes the keys in this order; they are read in any. Python 2 wrote (3L, 4L).
_HEADER_FIELD = re.compile(
    r"""\s*(['"])(?P<key>descr|fortran_order|shape)\1\s*:\s*
    (?: (?P<descr>'[^'"\\]{0,100}'|"[^'"\\]{0,100}")
      | (?P<fortran>True|False)
      | \((?P<shape>(?:\s*\d{1,19}L?\s*,)*(?:\s*\d{1,19}L?)?)\s*\)
    )\s*(?:,|(?=\}))""",
    re.VERBOSE | re.ASCII,
)


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
    except MemoryError as error:
        raise KdError("needs more memory than there is", HINT) from error
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
        reason = " ".join(str(error).split())[:200]
        raise KdError(f"damaged pickle: {reason}", "Fetch or write the file again.") from error


def load_npy(path: Path) -> object:
    """The content of a .npy file: a numeric array, or the dict that `numpy.save(path, dict)` wrote.

    Raises:
        KdError: unreadable, damaged, or what `read` refuses.
    """
    try:
        if not path.is_file():
            reason = "it is not a file" if path.exists() else "it is not there"
            raise KdError(f"cannot read {path}: {reason}", "Check the path.")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise KdError(f"{path} is larger than {MAX_FILE_BYTES:,} bytes", "That is no file of weights.")
        data = path.read_bytes()
    except OSError as error:
        raise KdError(f"cannot read {path}: {error.strerror or error}", "Check the path.") from error
    except MemoryError as error:
        raise KdError(f"{path} needs more memory than there is", HINT) from error
    try:
        return read_npy(data)
    except KdError as error:
        raise KdError(f"{path}: {error.message}", error.hint) from error


def read_npy(data: bytes) -> object:
    """The content of the bytes of a .npy file.

    Raises:
        KdError: as `load_npy`.
    """
    if not data.startswith(b"\x93NUMPY"):
        if data[:1] == b"\x80":  # numpy.load, too, takes a bare pickle under this name
            return read(data)
        raise KdError("not a .npy file", "Write it with numpy.save.")
    try:
        start, descr, shape, fortran = _header(data)
    except (ValueError, IndexError, struct.error) as error:
        raise KdError(f"damaged .npy header: {error}", "Fetch or write the file again.") from error
    kind = descr.lstrip("|<>=")
    try:
        if kind.startswith("O"):
            if shape != ():
                raise KdError(f"refuses an object array of shape {named(shape)}", HINT)
            return read(data[start:])
        return array_of(dtype_of(kind, descr[:1]), shape, memoryview(data)[start:], "F" if fortran else "C")
    except MemoryError as error:
        raise KdError("needs more memory than there is", HINT) from error


def _header(data: bytes) -> tuple[int, str, tuple[int, ...], bool]:
    """Where the values begin, descr, shape, fortran_order. Read by a pattern: nothing is compiled or evaluated."""
    wide = data[6] >= 2
    start = 12 if wide else 10
    (length,) = struct.unpack_from("<I" if wide else "<H", data, 8)
    if length > MAX_HEADER_BYTES or start + length > len(data):
        raise ValueError("header too long")
    text = data[start : start + length].decode("utf-8" if data[6] >= 3 else "latin-1").strip()
    found: dict[str, str | None] = {}
    at = 1
    while text.startswith("{") and (field := _HEADER_FIELD.match(text, at)) is not None:
        found[field["key"]] = field[{"fortran_order": "fortran"}.get(field["key"], field["key"])]
        at = field.end()
    if (
        text[at:].strip() != "}"
        or set(found) != {"descr", "fortran_order", "shape"}
        or None in found.values()
    ):
        raise ValueError("no plain descr, fortran_order and shape; structured arrays are not read")
    sides = tuple(int(side.strip().rstrip("L")) for side in str(found["shape"]).split(",") if side.strip())
    return start + length, str(found["descr"])[1:-1], sides, found["fortran_order"] == "True"
