"""A first pass over a pickle's instructions: nothing is run or made before the whole file is within limits."""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Collection

from kdcli.base.errors import KdError
from kdcli.base.safe_pickle.arrays import HINT

MAX_OPCODES = 2_000_000
MAX_MEMO_INDEX = 2_000_000
MAX_STRINGS = 1_000_000
MAX_STRING_BYTES = 1 << 30
MAX_LINE_BYTES = 1_000  # of a number or a name that is written as text
MAX_INTEGER_BYTES = 17  # 128 bits and a sign

_TEXT_STRINGS = ("STRING", "UNICODE")
_LENGTHS = {  # how long an argument's own length field is, by pickletools' code for it
    pickletools.TAKEN_FROM_ARGUMENT1: "<B",
    pickletools.TAKEN_FROM_ARGUMENT4: "<i",
    pickletools.TAKEN_FROM_ARGUMENT4U: "<I",
    pickletools.TAKEN_FROM_ARGUMENT8U: "<Q",
}
_MEMO_FIELDS = {"BINPUT": "<B", "LONG_BINPUT": "<I", "BINGET": "<B", "LONG_BINGET": "<I"}


class _Shape:
    """What one instruction's argument looks like, worked out once."""

    def __init__(self, opcode: pickletools.OpcodeInfo) -> None:
        self.name = opcode.name
        self.size = 0 if opcode.arg is None else opcode.arg.n
        self.lines = 0 if self.size != pickletools.UP_TO_NEWLINE else 1 + (opcode.name in ("GLOBAL", "INST"))
        self.length = _LENGTHS.get(self.size)
        self.memo = _MEMO_FIELDS.get(opcode.name)


_SHAPES = {ord(opcode.code): _Shape(opcode) for opcode in pickletools.opcodes}


def survey(data: bytes, known: Collection[str]) -> int:
    """Check every instruction up to STOP; returns how many there are.

    Args:
        known: names of the instructions that the machine has.

    Raises:
        KdError: an instruction that is not known, a memo index, a string, an integer or a number of them
            beyond its limit.
        ValueError, IndexError, struct.error: the file ends too early, or has no such instruction.
    """
    at, strings = 0, 0
    for count in range(1, MAX_OPCODES + 1):
        if at >= len(data):
            raise ValueError("ends before its STOP")
        shape = _SHAPES.get(data[at])
        if shape is None:
            raise ValueError(f"unknown instruction {data[at : at + 1]!r}")
        if shape.name not in known:
            raise KdError(f"refuses the pickle instruction {shape.name}", HINT)
        at += 1
        if shape.name == "STOP":
            return count
        start = at
        if shape.lines:
            at = _end_of_lines(data, at, shape)
        elif shape.length is not None:
            at = _end_of_counted(data, at, shape)
        else:
            at += shape.size
        if at > len(data):
            raise ValueError("ends before its STOP")
        if shape.memo is not None:
            _check_memo(struct.unpack_from(shape.memo, data, start)[0])
        elif shape.name in ("PUT", "GET"):
            _check_memo(int(data[start:at]))
        elif shape.name == "FRAME" and struct.unpack_from("<Q", data, start)[0] > len(data) - at:
            raise ValueError("a frame is longer than the file")
        if shape.length is not None or shape.name in _TEXT_STRINGS:
            strings += 1
            if strings > MAX_STRINGS:
                raise KdError(f"refuses a pickle of more than {MAX_STRINGS:,} strings", HINT)
    raise KdError(f"refuses a pickle of more than {MAX_OPCODES:,} instructions", HINT)


def _end_of_lines(data: bytes, at: int, shape: _Shape) -> int:
    most = MAX_STRING_BYTES if shape.name in _TEXT_STRINGS else MAX_LINE_BYTES
    for _ in range(shape.lines):
        end = data.find(b"\n", at, at + most + 1)
        if end < 0 and at + most < len(data):
            raise KdError(f"refuses a line of more than {most:,} bytes in {shape.name}", HINT)
        if end < 0:
            raise ValueError("ends within a line")
        at = end + 1
    return at


def _end_of_counted(data: bytes, at: int, shape: _Shape) -> int:
    assert shape.length is not None
    (length,) = struct.unpack_from(shape.length, data, at)
    if length < 0:
        raise ValueError("a negative length")
    if shape.name in ("LONG1", "LONG4") and length > MAX_INTEGER_BYTES:
        raise KdError("refuses a huge integer", HINT)
    at += struct.calcsize(shape.length)
    if length > len(data) - at:
        raise ValueError(f"{shape.name} claims {length:,} bytes, {len(data) - at:,} are left")
    if length > MAX_STRING_BYTES:
        raise KdError(f"refuses a string of more than {MAX_STRING_BYTES:,} bytes", HINT)
    return int(at + length)


def _check_memo(index: int) -> None:
    if not 0 <= index <= MAX_MEMO_INDEX:
        raise KdError("refuses a memo index out of range", HINT)
