"""Malicious pickles and .npy files."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np

PRIME = 2**61 - 1  # integers that differ by it have the same hash
DTYPE = b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR"
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def text(value: str) -> bytes:
    """BINUNICODE."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def shaped(shape: bytes, dtype: bytes = DTYPE, raw: bytes = b"S'abcd'\n", order: bytes = b"I00\n") -> bytes:
    """An array of protocol 0 with a state of one's choice."""
    return ARRAY + b"(I1\n(" + shape + b"t" + dtype + order + raw + b"tb."


def bombs(canary: Path) -> dict[str, bytes]:
    """Each must end in a KdError."""
    command = f"touch {canary}"
    touch = f"open({str(canary)!r}, 'w').close()"
    found: dict[str, bytes] = {}
    for protocol in range(6):
        for name, function, argument in (
            ("os.system", os.system, command), ("eval", eval, touch), ("exec", exec, touch),
            ("popen", os.popen, command), ("import", __import__, "antigravity"),
        ):  # fmt: skip
            found[f"{name}, protocol {protocol}"] = pickle.dumps([Calls(function, argument)], protocol)
        found[f"getattr, protocol {protocol}"] = pickle.dumps(Calls(getattr, "text", "upper"), protocol)
    arguments = text(command) + b"\x85R."
    found |= {
        "INST": b"(S'" + command.encode() + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + command.encode() + b"'\no.",
        "GLOBAL": b"cposix\nsystem\n" + arguments,
        "STACK_GLOBAL": b"\x80\x04" + text("posix") + text("system") + b"\x93" + arguments,
        "STACK_GLOBAL of numbers": b"\x80\x04K\x01K\x02\x93.",
        "a dotted name": b"\x80\x04" + text("numpy") + text("ndarray.tofile") + b"\x93" + arguments,
        "NEWOBJ": b"\x80\x02cpathlib\nPath\n" + text(str(canary)) + b"\x85\x81.",
        "NEWOBJ_EX": b"\x80\x04cbuiltins\nopen\n" + text(str(canary)) + b"\x85}" + text("mode") + text("w") + b"s\x92.",
        "EXT1": b"\x80\x02\x82\x01.",
        "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
        "PERSID": b"Pos.system\n.",
        "BINPERSID": b"K\x01Q.",
        "BUILD on a dict": b"}}" + text("__setstate__") + b"cos\nsystem\nsb.",
        "BUILD of a slot state": DTYPE + b"N}\x86b.",
        "a buffer outside": b"\x80\x05\x97.",
        "numpy.memmap": b"cnumpy\nmemmap\n(" + text(str(canary)) + b"S'u1'\nS'w+'\nI0\nI9\ntR.",
        "numpy.fromfile": b"cnumpy\nfromfile\n(" + text("/etc/passwd") + b"tR.",
        "a call of ndarray": b"cnumpy\nndarray\n(I9999999999\ntR.",
        "another codec": b"c_codecs\nencode\n" + text("a" * 1000) + text("idna") + b"\x86R.",
        "16 GiB by shape": shaped(b"I4294967296\nI4\n"),
        "negative shape": shaped(b"I-1\nI-4\n"),
        "a shape beyond 64 bits": shaped(b"I0\nL99999999999999999999999L\n", raw=b"S''\n"),
        "a shape of a thousand sides": shaped(b"I1\n" * 1000, raw=b"S'a'\n"),
        "a shape of a list": b"(lp0\n0" + shaped(b"g0\n"),
        "array of objects": pickle.dumps(np.array([{}, 1], dtype=object)),
        "overlapping fields": pickle.dumps(
            np.zeros(2, np.dtype({"names": ["a", "b"], "formats": ["<u4", "<f8"], "offsets": [0, 2], "itemsize": 16}))
        ),
        "a structured state": DTYPE.replace(b"u1", b"u4") + b"(I3\nS'<'\nN(S'a'\nt}NI8\nI1\nI0\ntb.",
        "a void type": shaped(b"I1\n", dtype=DTYPE.replace(b"u1", b"V9999999999")),
        "Fortran order that does not fit": shaped(b"I3\nI3\n", order=b"I01\n"),
        "LONG4 of 2 GiB": b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"1.",
        "LONG4, negative": b"\x80\x02\x8b" + struct.pack("<i", -5) + b"12345.",
        "LONG4 of 800,000 bits": b"\x80\x02\x8b" + struct.pack("<i", 100_000) + b"\x7f" * 100_000 + b".",
        "LONG of a million digits": b"L" + b"9" * 1_000_000 + b"L\n.",
        "INT of a million digits": b"I" + b"9" * 1_000_000 + b"\n.",
        "FLOAT of a million letters": b"F" + b"x" * 1_000_000 + b"\n.",
        "BINUNICODE8 of 2**60 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"abc.",
        "BINBYTES8 of 2**63 bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"abc.",
        "BYTEARRAY8 of 2**40 bytes": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.",
        "BINSTRING, negative": b"T\xff\xff\xff\xffabc.",
        "a frame of 2**60 bytes": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",
        "PUT at 2**31": b"Np2147483648\n.",
        "PUT at -1": b"Np-1\n.",
        "LONG_BINPUT at 2**32 - 1": b"Nr\xff\xff\xff\xff.",
        "GET of nothing": b"g7\n.",
        "DUP bomb": b"N" + b"2" * 1_200_000 + b".",
        "mark bomb": b"(" * 300_000 + b".",
        "lists in lists, 20,000 deep": b"]" * 20_000 + b"a" * 19_999 + b".",
        "tuples in tuples, 100,000 deep": b")" + b"\x85" * 100_000 + b".",
        "a list in itself": b"]q\x00h\x00a.",
        "a dict in itself": b"}q\x00K\x01h\x00s.",
        "keys of one hash": b"\x80\x02}("
        + b"".join(b"\x8a\x10" + (PRIME * (i + 1)).to_bytes(16, "little") + b"N" for i in range(50_000))
        + b"u.",
        "a set of one hash": b"\x80\x04\x8f("
        + b"".join(b"\x8a\x10" + (PRIME * (i + 1)).to_bytes(16, "little") for i in range(50_000))
        + b"\x90.",
        "a key that shares parts": b"}" + b")" + b"2\x86" * 60 + b"Ns.",
        "axes that are never sorted": b"\x80\x04cnumpy.core.numeric\n_frombuffer\n(C\x01a" + DTYPE + b"K\x01\x85S'K'\n("
        + (b")" + b"2\x86" * 60) * 2 + b"ttR.",
        "a name of a megabyte": b"c" + b"a" * 1_000_000 + b"\nb\n.",
        "arrays larger than the file": b"(" + b"B" + struct.pack("<I", 1 << 20) + bytes(1 << 20) + b"q\x00" + DTYPE
        + b"q\x010" + (ARRAY + b"(I1\n(I1048576\nth\x01I00\nh\x00tb") * 4000 + b"l.",
        "nothing": b"", "no STOP": b"N", "only STOP": b".", "no such instruction": b"\xff.",
    }  # fmt: skip
    return found


def npy(header: bytes, body: bytes = b"", version: int = 1) -> bytes:
    """A .npy file with a header of one's choice."""
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + struct.pack("<H" if version == 1 else "<I", len(header))
        + header
        + body
    )


def npy_bombs(canary: Path) -> dict[str, bytes]:
    """Each must end in a KdError."""
    about = "{{'descr': {}, 'fortran_order': {}, 'shape': {}, }}"

    def header(descr: str = "'<f4'", order: str = "False", shape: str = "(1,)") -> bytes:
        return about.format(descr, order, shape).encode()

    call = f"__import__('os').system('touch {canary}')".encode()
    evil = pickle.dumps(Calls(os.system, f"touch {canary}"), 4)
    return {
        "a header that calls": npy(call),
        "a shape that calls": npy(header(shape=call.decode())),
        "a header of brackets": npy(b"(" * 9_000),
        "a header of minus signs": npy(b"-" * 9_000 + b"1"),
        "a header of 4 GiB": b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + header(),
        "a header of 20 MB": npy(header() + b" " * 20_000_000, bytes(4), 2),
        "16 GiB by shape": npy(header(shape="(4294967296,)"), bytes(4)),
        "negative shape": npy(header(shape="(-1, -1)"), bytes(4)),
        "a shape beyond 64 bits": npy(header(shape="(0, 1180591620717411303424)")),
        "a shape of sides whose product is 0": npy(
            header(shape="(0, 4611686018427387904, 4611686018427387904)")
        ),
        "a shape of digits": npy(header(shape="(" + "9" * 9_000 + ",)")),
        "a shape that is no tuple": npy(header(shape="[1]"), bytes(4)),
        "structured": npy(header(descr="[('a', '<f4'), ('a', 'O')]"), bytes(12)),
        "overlapping fields": npy(
            header(descr="{'names': ['a'], 'formats': ['O'], 'offsets': [0]}"), bytes(8)
        ),
        "objects": npy(header(descr="'|O'", shape="(2,)"), pickle.dumps([1, 2])),
        "one object that calls": npy(header(descr="'|O'", shape="()"), evil),
        "a bare pickle that calls": evil,
        "text": npy(header(descr="'<U4'"), bytes(16)),
        "dates": npy(header(descr="'<M8[ns]'"), bytes(8)),
        "a key twice and one missing": npy(b"{'descr': '<f4', 'descr': '<f4', 'shape': (1,), }", bytes(4)),
        "more keys": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (1,), 'x': 1}", bytes(4)),
        "Fortran order that does not fit": npy(header(order="True", shape="(3, 3)"), bytes(4)),
        "no version": b"\x93NUMPY",
        "version 3, not UTF-8": npy(b"{'descr': '\xff'}", version=3),
        "an .npz archive": b"PK\x03\x04" + bytes(100),
        "nothing": b"",
    }
