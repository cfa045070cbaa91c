"""Pickles of other programs (CIFAR batches, caffe-tensorflow weights), read without executing anything in them.

`SafeUnpickler` is Python's own unpickler in its pure-Python form, which can be restricted further than the C form: it
accepts only the instructions that plain data needs, `find_class` maps a few NumPy names to checked methods, and
dictionary keys are checked before they are hashed.
"""

import io
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from kdcli.base.errors import KdError
from kdcli.base.files import check_pointer, read_bytes
from kdcli.base.text import first_line

MAX_FILE_BYTES = 1 << 30
MAX_INSTRUCTIONS = 2_000_000
MAX_NESTING = 64
MAX_KEY_BITS = 60  # larger integers can be chosen to share one hash, which makes insertion quadratic
HINT = "Use the file only if you trust its source; kd reads numbers, text and arrays, never code."
_DAMAGED = "Download or write the file again."

_INSTRUCTIONS = {  # those that plain data needs and that Python's own handlers do safely
    getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
    for name in (
        "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET",
        "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG",
        "LONG1", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE",
        "BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "EMPTY_TUPLE", "TUPLE",
        "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_DICT", "GLOBAL",
        "STACK_GLOBAL", "REDUCE",
    )
}  # fmt: skip
_NDARRAY = object()  # stands for numpy.ndarray, which pickles only name as an argument of `_reconstruct`
_TYPE = re.compile(r"[biuf][1248]|O[48]?")
_NPY_OBJECT = re.compile(
    rb"\x93NUMPY[\1\2\3]\0..(?:\0\0)?"
    rb"\{'descr': '\|O[48]?', 'fortran_order': (?:False|True), 'shape': \(\), \} *\n?",
    re.DOTALL,
)


def load_pickle(data: bytes) -> dict[Any, Any]:
    """Return the dictionary in a pickle of protocol 0 to 4, as Python 2 or 3 wrote it.

    It holds None, numbers, str, bytes, list, tuple, dict, numeric NumPy arrays and scalars; byte keys become text.
    KdError for a global outside the allow-list, damage, a limit exceeded, or no dictionary.
    """
    return SafeUnpickler(data).dictionary()


def load_npy(path: Path) -> dict[Any, Any]:
    """The dictionary that `numpy.save(path, dictionary)` wrote, or that of a bare pickle; see `load_pickle`."""
    data = read_bytes(path, MAX_FILE_BYTES)
    try:
        check_pointer(data, "it")
        header = _NPY_OBJECT.match(data)
        if header is None and data[:1] != pickle.PROTO:
            kind = "an array" if data.startswith(b"\x93NUMPY") else "something else"
            raise KdError(
                f"not a .npy file with a dictionary of weights, but {kind}",
                "Write it with numpy.save(path, dict).",
            )
        return load_pickle(data[header.end() :] if header else data)
    except KdError as error:
        raise KdError(f"{path}: {error.message}", error.hint) from error
    except MemoryError as error:
        raise KdError(f"{path} needs more memory than is available", HINT) from error


class _Dispatch(dict[int, Callable[[Any], None]]):
    """Instruction → handler, with a limit on the number of instructions."""

    left = MAX_INSTRUCTIONS

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.left -= 1
        if self.left < 0:
            raise KdError(f"refuses a pickle of more than {MAX_INSTRUCTIONS:,} instructions", HINT)
        return super().__getitem__(code)

    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise KdError(f"refuses the pickle instruction {chr(code)!r}", HINT)


class SafeUnpickler(pickle._Unpickler):
    """Unpickler for plain data and numeric arrays.

    Arrays and encoded text are limited to twice the size of the pickle: memoised bytes can be used many times.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="latin1")
        self.dispatch = _Dispatch(type(self).dispatch)  # type: ignore[misc]
        self.budget = 2 * len(data)  # array data may be encoded from text first

    def dictionary(self) -> dict[Any, Any]:
        """Run the pickle and check its result; see `load_pickle`."""
        try:
            value = self.load()
            if isinstance(value, np.ndarray) and value.shape == ():  # how numpy.save keeps an object
                value = value.item()
        except KdError:
            raise
        except MemoryError as error:
            raise KdError("needs more memory than is available", HINT) from error
        except Exception as error:  # any type, depending on the bytes
            raise KdError(f"damaged pickle: {first_line(error)}", _DAMAGED) from error
        if not isinstance(value, dict):
            raise KdError(f"holds no dictionary, but a {type(value).__name__}", _DAMAGED)
        _check_content(value)
        return value

    def find_class(self, module: str, name: str) -> Any:
        allowed: dict[str, object] = {
            "numpy.ndarray": _NDARRAY,
            "numpy.dtype": self.make_dtype,
            "numpy.core.multiarray._reconstruct": self.make_array,
            "numpy.core.multiarray.scalar": self.make_scalar,
            "_codecs.encode": self.encode,
            "collections.OrderedDict": dict,  # not `dict`, which would hash keys unchecked
        }
        full_name = f"{module}.{name}".replace("numpy._core.", "numpy.core.", 1)
        if full_name not in allowed:
            raise KdError(
                f"refuses {module[:80]}.{name[:80]}: reading this pickle would import or run it", HINT
            )
        return allowed[full_name]

    # Functions that a pickle may call, in place of NumPy's and Python's

    def make_dtype(self, code: str | bytes, *_: object) -> np.dtype[Any]:
        text = code.decode("latin-1") if isinstance(code, bytes) else code
        if not _TYPE.fullmatch(text):
            raise KdError("refuses an array of anything but plain numbers", HINT)
        # A copy, since BUILD sets its byte order
        return np.dtype("O" if text[0] == "O" else text, False, True)

    def make_array(self, kind: object, *_: object) -> np.ndarray[Any, Any]:
        if kind is not _NDARRAY:
            raise KdError("refuses any array class but numpy.ndarray", HINT)
        return np.empty(0)

    def make_scalar(self, dtype: np.dtype[Any], raw: str | bytes) -> Any:
        content = _bytes(raw)
        _check_shape((), dtype, len(content))
        return np.frombuffer(content, dtype)[0]

    def encode(self, text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
            raise KdError("refuses any text encoding but Latin-1", HINT)
        self.spend(len(text))
        return text.encode("latin-1")

    # Instructions with checks of their own

    def build(self) -> None:
        """BUILD: set the byte order of a dtype, or the content of an array."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, np.dtype):
            if not isinstance(state, tuple) or state[2:5] != (None, None, None):
                raise KdError("refuses an array of a structured type", HINT)
            if state[1] not in ("<", ">", "|", "="):
                raise ValueError("unknown byte order")
            if target.kind != "O":
                target.__setstate__((3, state[1], None, None, None, -1, -1, 0))  # type: ignore[attr-defined]
        elif type(target) is np.ndarray:
            _, shape, dtype, fortran, content = state
            if dtype.kind == "O":
                if shape != () or not isinstance(content, list) or len(content) != 1:
                    raise KdError("refuses an array of objects", HINT)
            else:
                content = _bytes(content)
                self.spend(len(content))
                _check_shape(shape, dtype, len(content))
            target.__setstate__((1, shape, dtype, bool(fortran), content))  # type: ignore[arg-type]
        else:
            raise KdError("refuses to set the state of an object", HINT)

    def store(self, items: list[Any]) -> None:
        """SETITEM, SETITEMS, DICT: hashing a key of nested tuples could take exponential time, hence the check."""
        target = self.stack[-1]
        if type(target) is not dict:
            raise ValueError("items for something other than a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str | bytes | int | None):
                raise KdError(f"refuses a dictionary key of type {type(key).__name__}", HINT)
            if isinstance(key, int) and key.bit_length() > MAX_KEY_BITS:
                raise KdError("refuses a dictionary key beyond 60 bits", HINT)
            target[key.decode("latin-1") if isinstance(key, bytes) else key] = value

    def store_new(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self.store(items)

    def spend(self, count: int) -> None:
        """Subtract from the bytes that arrays and encoded text may still take."""
        self.budget -= count
        if self.budget < 0:
            raise KdError("refuses arrays that are larger than the file", HINT)

    dispatch: ClassVar[Any] = {  # instruction → handler; each instance counts with its own
        **_INSTRUCTIONS,
        pickle.BUILD[0]: build,
        pickle.SETITEM[0]: lambda self: self.store([self.stack.pop(-2), self.stack.pop()]),
        pickle.SETITEMS[0]: lambda self: self.store(self.pop_mark()),
        pickle.DICT[0]: store_new,
    }


def _bytes(content: object) -> bytes:
    """Array data: bytes, or a str where Python 2 wrote them."""
    if isinstance(content, str):
        return content.encode("latin-1")
    if not isinstance(content, bytes):
        raise ValueError("array data are not bytes")
    return content


def _check_shape(shape: object, dtype: object, size: int) -> None:
    """Raise KdError unless an array of this shape and dtype takes `size` bytes."""
    if (
        not isinstance(dtype, np.dtype)
        or not isinstance(shape, tuple)
        or len(shape) > 32
        or not all(type(side) is int and side >= 0 for side in shape)
        or math.prod(shape) * dtype.itemsize != size
    ):
        raise KdError(f"damaged array: its shape and type do not go with its {size:,} bytes", _DAMAGED)


def _check_content(value: dict[Any, Any]) -> None:
    """Raise KdError for anything but plain values, and for containers that nest too deeply (or hold themselves).

    Level by level, each part once, since shared parts could be reached in exponentially many ways.
    """
    level: list[Any] = [value]
    for _ in range(MAX_NESTING):
        found: dict[int, Any] = {}
        for part in level:
            if isinstance(part, dict | list | tuple):
                items = part.values() if isinstance(part, dict) else part
                found.update((id(item), item) for item in items)
            plain = isinstance(part, str | bytes | int | float | dict | list | tuple | np.generic | None)
            if not plain and not (isinstance(part, np.ndarray) and part.dtype.kind in "biuf"):
                raise KdError(f"refuses a value of type {type(part).__name__}", HINT)
        level = list(found.values())
        if not level:
            return
    raise KdError(f"refuses containers nested deeper than {MAX_NESTING}", HINT)
