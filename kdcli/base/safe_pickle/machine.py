"""The stack machine that reads a pickle: values, containers and arrays in, no calls out."""

from __future__ import annotations

import codecs
import io
import pickletools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdcli.base.errors import KdError
from kdcli.base.safe_pickle.arrays import HINT, NUMERIC, OBJECT, array_of, dtype_of, named, raw_bytes
from kdcli.base.safe_pickle.survey import survey

MAX_STACK = 1_000_000
MAX_INTEGER_BITS = 128
MAX_KEY_BITS = 60  # larger integers can be chosen to have all one hash, which makes a dict take for ever
MAX_NESTING = 64

_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_SCALARS = (str, bytes, int, float, bool, type(None))
_KEYS = (str, bytes, int, type(None))


@dataclass(frozen=True)
class _Global:
    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass
class _DType:
    code: str
    order: str = "="

    def numpy(self) -> np.dtype[Any]:
        return dtype_of(self.code, self.order)


@dataclass(eq=False)
class _Pending:
    """An array that a BUILD instruction is still to fill; memo entries may point at it already."""

    filled: bool = False
    value: object = None


class _Mark:
    pass


_MARK = _Mark()


class Machine:
    """Runs one pickle."""

    builders: Mapping[tuple[str, str], Callable[[Any, tuple[Any, ...]], object]]
    handlers: Mapping[str, Callable[[Any, Any], Any]]

    def __init__(self, data: bytes) -> None:
        self.builders, self.handlers = BUILDERS, _HANDLERS
        self.data = data
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        # Memoised bytes may be used many times: without this a small file could ask for any amount of memory.
        self.array_budget = self.text_budget = len(data)

    def run(self) -> object:
        return _Finisher().finish(self.outcome(), 0)

    def outcome(self) -> object:
        """What the program leaves on the stack, with stand-ins still in it."""
        known = {"STOP", *_PUSH_ARGUMENT, *_CONSTANTS, *self.handlers}
        for name, argument in self.opcodes(survey(self.data, known)):
            if name == "STOP":
                break
            self.step(name, argument)
            if len(self.stack) > MAX_STACK:
                raise KdError("refuses a pickle with too deep a stack", HINT)
        return self.stack.pop()

    def opcodes(self, count: int) -> Iterator[tuple[str, Any]]:
        """As `pickletools.genops`, except that text strings of protocol 0 may hold any byte."""
        stream = io.BytesIO(self.data)
        for _ in range(count):
            opcode = _OPCODES[stream.read(1).decode("latin-1")]
            if opcode.name == "STRING":
                yield "STRING", _quoted(stream.readline())
            else:
                yield opcode.name, None if opcode.arg is None else opcode.arg.reader(stream)

    def step(self, name: str, argument: Any) -> None:
        if name in _PUSH_ARGUMENT:
            if isinstance(argument, int) and argument.bit_length() > MAX_INTEGER_BITS:
                raise KdError("refuses a huge integer", HINT)
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        else:
            self.handlers[name](self, argument)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise ValueError("a value is missing")
        return value

    def to_mark(self) -> list[Any]:
        """Everything above the last mark, which goes too."""
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _MARK:
                items = self.stack[at + 1 :]
                del self.stack[at:]
                return items
        raise ValueError("a mark is missing")

    def top(self, kind: type[Any]) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"no {kind.__name__} to add to")
        return self.stack[-1]

    def tuple_of(self, count: int) -> None:
        items = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(items)))

    def extend(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def update(self, items: list[Any]) -> None:
        target = self.top(dict)
        for key, value in _pairs(items):
            target[key] = value

    def add(self, items: list[Any]) -> None:
        self.top(set).update(_key(item) for item in items)

    def put(self, index: int) -> None:
        if self.stack[-1] is _MARK:
            raise ValueError("a value is missing")
        self.memo[index] = self.stack[-1]

    def push_global(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("the name of a global is no text")
        found = _Global(module[:80], name[:80])
        if (found.module, found.name) not in self.builders:
            raise KdError(f"refuses {found}: reading this pickle would run or import it", HINT)
        self.stack.append(found)

    def stack_global(self) -> None:
        name, module = self.pop(), self.pop()
        self.push_global(module, name)

    def reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise KdError("refuses a call of something that is not a known name", HINT)
        self.stack.append(self.builders[function.module, function.name](self, arguments))

    def build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if isinstance(target, _Pending) and not target.filled:
            if not isinstance(state, tuple) or len(state) != 5:
                raise ValueError("array state is no 5-tuple")
            _, shape, dtype, fortran, raw = state
            target.value, target.filled = self.filled(dtype, shape, raw, "F" if fortran else "C"), True
        elif isinstance(target, _DType):
            if not isinstance(state, tuple) or len(state) < 5 or any(part is not None for part in state[2:5]):
                raise KdError("refuses an array of a structured type", HINT)
            if state[1] not in ("<", ">", "|", "="):
                raise ValueError("unknown byte order")
            target.order = state[1]
        else:
            raise KdError("refuses to set the state of an object", HINT)

    def filled(self, dtype: object, shape: object, raw: object, order: str) -> object:
        if not isinstance(dtype, _DType):
            raise ValueError("array type is no dtype")
        if OBJECT.fullmatch(dtype.code):
            if shape != () or not isinstance(raw, list) or len(raw) != 1:
                raise KdError("refuses an array of objects", HINT)
            return raw[0]
        content = raw_bytes(raw)
        self.array_budget -= len(content)
        if self.array_budget < 0:
            raise KdError("refuses arrays that are larger than the file", HINT)
        return array_of(dtype.numpy(), shape, content, order)

    # Builders: each checks that its arguments are what numpy or Python write, and no more.

    def reconstruct(self, arguments: tuple[Any, ...]) -> object:
        if len(arguments) != 3 or arguments[0] != _Global("numpy", "ndarray"):
            raise KdError("refuses to make anything but a plain array", HINT)
        return _Pending()

    def make_dtype(self, arguments: tuple[Any, ...]) -> object:
        code = arguments[0] if arguments else None
        if isinstance(code, bytes):
            code = code.decode("latin-1")
        if not isinstance(code, str) or not (NUMERIC.fullmatch(code) or OBJECT.fullmatch(code)):
            raise KdError(f"refuses an array of type {named(code)}: only plain numbers are read", HINT)
        return _DType(code)

    def make_scalar(self, arguments: tuple[Any, ...]) -> object:
        dtype, raw = arguments
        if not isinstance(dtype, _DType):
            raise ValueError("scalar type is no dtype")
        return array_of(dtype.numpy(), (), raw_bytes(raw), "C")[()]

    def from_buffer(self, arguments: tuple[Any, ...]) -> object:
        buffer, dtype, shape, order, *axes = arguments
        array = self.filled(dtype, shape, buffer, order)
        if axes and axes[0] is not None and order == "K" and isinstance(array, np.ndarray):
            order_of_axes = axes[0]
            if (
                not isinstance(order_of_axes, tuple)
                or len(order_of_axes) != array.ndim
                or not all(type(axis) is int for axis in order_of_axes)  # sorting others may take for ever
                or sorted(order_of_axes) != list(range(array.ndim))
            ):
                raise ValueError("axes do not go with the shape")
            return array.transpose(order_of_axes)
        if order not in ("C", "F"):
            raise ValueError("unknown memory order")
        return array

    def encode(self, arguments: tuple[Any, ...]) -> object:
        text, encoding = arguments
        if encoding not in ("latin1", "latin-1") or not isinstance(text, str):
            raise KdError(f"refuses to encode as {named(encoding)}", HINT)
        self.text_budget -= len(text)
        if self.text_budget < 0:
            raise KdError("refuses text that is larger than the file", HINT)
        return text.encode("latin-1")

    def ordered_dict(self, arguments: tuple[Any, ...]) -> object:
        if not arguments:
            return {}
        (items,) = arguments
        if not isinstance(items, list) or not all(isinstance(pair, list | tuple) for pair in items):
            raise ValueError("OrderedDict without pairs")
        return {_key(key): value for key, value in items}

    def empty_bytes(self, arguments: tuple[Any, ...]) -> object:
        if arguments:
            raise KdError("refuses a call of bytes", HINT)
        return b""

    def never_called(self, arguments: tuple[Any, ...]) -> object:
        raise KdError("refuses to call the name of a type", HINT)


class _Finisher:
    """Turns what the machine left into plain values: fills in arrays, checks nesting, refuses stand-ins."""

    def __init__(self) -> None:
        self.done: dict[int, tuple[object, int]] = {}  # id -> result and height
        self.open: set[int] = set()
        self.deepest = 0

    def finish(self, value: Any, depth: int) -> object:
        if isinstance(value, (*_SCALARS, np.ndarray, np.generic)):
            return value
        if id(value) in self.open:
            raise KdError("refuses a container that holds itself", HINT)
        if id(value) in self.done:  # shared parts are finished once: nested sharing stays cheap
            result, height = self.done[id(value)]
            self.reach(depth + height)
            return result
        before, self.deepest = self.deepest, 0
        self.reach(depth)
        self.open.add(id(value))
        result = self.convert(value, depth + 1)
        self.open.discard(id(value))
        self.done[id(value)] = (result, self.deepest - depth)
        self.deepest = max(before, self.deepest)
        return result

    def reach(self, depth: int) -> None:
        self.deepest = max(self.deepest, depth)
        if depth > MAX_NESTING:
            raise KdError(f"refuses containers nested deeper than {MAX_NESTING}", HINT)

    def convert(self, value: Any, depth: int) -> object:
        if isinstance(value, _Pending) and value.filled:
            return self.finish(value.value, depth)
        if isinstance(value, bytearray):
            return bytes(value)
        if isinstance(value, list):
            return [self.finish(item, depth) for item in value]
        if isinstance(value, tuple):
            return tuple(self.finish(item, depth) for item in value)
        if isinstance(value, set | frozenset):
            return value
        if isinstance(value, dict):
            named = {
                key.decode("latin-1") if isinstance(key, bytes) else key: self.finish(item, depth)
                for key, item in value.items()
            }
            if len(named) != len(value):
                raise ValueError("two keys of a dictionary read alike")
            return named
        raise KdError(f"refuses a value of kind {type(value).__name__.strip('_').lower()}", HINT)


def _quoted(line: bytes) -> str:
    """A Python 2 string literal of protocol 0."""
    text = line.strip()
    if len(text) < 2 or text[0] != text[-1] or text[:1] not in (b"'", b'"'):
        raise ValueError("a string without quotes")
    return codecs.escape_decode(text[1:-1])[0].decode("latin-1")


def _key(value: Any) -> Any:
    if not isinstance(value, _KEYS):  # hashing nested tuples that share parts can take for ever
        raise KdError(f"refuses a key of kind {type(value).__name__.strip('_').lower()}", HINT)
    if isinstance(value, int) and value.bit_length() > MAX_KEY_BITS:
        raise KdError("refuses a huge integer as a key", HINT)
    return value


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    if len(items) % 2:
        raise ValueError("a key without a value")
    return ((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))


_PUSH_ARGUMENT = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}
_HANDLERS: dict[str, Callable[[Machine, Any], Any]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.to_mark(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "APPEND": lambda machine, _: machine.extend([machine.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.to_mark()),
    "LIST": lambda machine, _: machine.stack.append(machine.to_mark()),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.to_mark())),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "DICT": lambda machine, _: machine.stack.append(dict(_pairs(machine.to_mark()))),
    "SETITEM": lambda machine, _: machine.update([machine.pop(), machine.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.update(machine.to_mark()),
    "ADDITEMS": lambda machine, _: machine.add(machine.to_mark()),
    "FROZENSET": lambda machine, _: machine.stack.append(frozenset(map(_key, machine.to_mark()))),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda machine, index: machine.put(index)),
    **dict.fromkeys(
        ("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine.stack.append(machine.memo[index])
    ),
    "GLOBAL": lambda machine, names: machine.push_global(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.stack_global(),
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
}
BUILDERS: dict[tuple[str, str], Callable[[Machine, tuple[Any, ...]], object]] = {
    ("numpy", "ndarray"): Machine.never_called,
    ("numpy", "dtype"): Machine.make_dtype,
    ("numpy.core.multiarray", "_reconstruct"): Machine.reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): Machine.reconstruct,
    ("numpy.core.multiarray", "scalar"): Machine.make_scalar,
    ("numpy._core.multiarray", "scalar"): Machine.make_scalar,
    ("numpy.core.numeric", "_frombuffer"): Machine.from_buffer,
    ("numpy._core.numeric", "_frombuffer"): Machine.from_buffer,
    ("_codecs", "encode"): Machine.encode,
    ("collections", "OrderedDict"): Machine.ordered_dict,
    ("__builtin__", "bytes"): Machine.empty_bytes,
}


def handlers_with(more: Mapping[str, Callable[[Any, Any], Any]]) -> Mapping[str, Callable[[Any, Any], Any]]:
    """The handlers of all instructions of a plain pickle, and some more."""
    return {**_HANDLERS, **more}
