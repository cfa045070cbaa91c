"""Pickles: right values from every protocol, and no way to run anything."""

from __future__ import annotations

import collections
import io
import os
import pickle
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdcli.base import pickles
from kdcli.base.errors import KdError
from kdcli.base.pickles import load_npy, load_pickle

VALUE = {
    "big-endian": np.arange(12, dtype=">f4").reshape(3, 4),
    b"bytes key": [1, -2.5, None, True, "é", b"\x00\xff\n'", 2**70],
    "fortran": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    "nested": (1, (2,), {"a": ()}),
    "ordered": collections.OrderedDict(x=1, y=2),
    "scalar": np.float32(2.5),
    "bool": np.array([True, False]),
    "transposed": np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
}


@pytest.mark.parametrize("protocol", range(5))  # Python 3 writes arrays by another function from 5 on
def test_every_protocol_gives_the_value(protocol: int) -> None:
    found = load_pickle(pickle.dumps(VALUE, protocol=protocol))
    assert list(found) == ["big-endian", "bytes key", *list(VALUE)[2:]]
    for name in ("big-endian", "fortran", "bool", "transposed"):
        expected: Any = VALUE[name]
        assert found[name].dtype.kind == expected.dtype.kind and np.array_equal(found[name], expected)
    assert found["bytes key"] == VALUE[b"bytes key"]
    assert found["nested"] == VALUE["nested"]
    assert found["ordered"] == {"x": 1, "y": 2} and type(found["ordered"]) is dict
    assert found["scalar"] == 2.5


def test_python_2_pickles() -> None:
    """Written by hand as Python 2 writes them: str data, protocol 0 and 2."""
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I2\nI2\ntcnumpy\ndtype\n"
        b"(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'\\x01\\xff\\x7f\\x80'\ntb"
    )
    found = load_pickle(b"(dS'data'\n" + array + b"sS'labels'\n(lI6\naI9\nas.")
    assert found["data"].tolist() == [[1, 255], [127, 128]] and found["data"].dtype == np.uint8
    assert found["labels"] == [6, 9]
    assert load_pickle(b"\x80\x02}U\x04name" + b"U\x02\xe9\xffs.") == {"name": "é\xff"}
    assert load_pickle(b"(S'a'\nI1\nS'b'\nI2\nd.") == {"a": 1, "b": 2}


def _dangerous(canary: Path) -> dict[str, bytes]:
    command = f"touch {canary}".encode()
    text = str(canary).encode()

    class Reduce:
        def __reduce__(self) -> Any:
            return os.system, (command.decode(),)

    class State:
        def __reduce__(self) -> Any:
            return eval, (f"open({str(canary)!r}, 'w')",)

    return {
        **{f"system {protocol}": pickle.dumps([Reduce()], protocol=protocol) for protocol in range(6)},
        **{f"eval {protocol}": pickle.dumps({"k": State()}, protocol=protocol) for protocol in range(6)},
        "inst": b"(S'" + command + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'" + command + b"'\no.",
        "newobj": b"\x80\x02cpathlib\nPath\nX" + struct.pack("<I", len(text)) + text + b"\x85\x81.",
        "dotted": b"\x80\x04\x8c\x05numpy\x94\x8c\x11ndarray.__class__\x94\x93.",
        "getattr": b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'tofile'\ntR.",
        "memmap": b"cnumpy\nmemmap\n(S'" + text + b"'\nS'u1'\nS'w+'\ntR.",
        "reconstruct": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nmemmap\n(I0\ntS'b'\ntR.",
        "reconstruct text": b"cnumpy.core.multiarray\n_reconstruct\n(S'ndarray'\n(I0\ntS'b'\ntR.",
        "reconstruct and fill": (
            b"cnumpy.core.multiarray\n_reconstruct\n(S'memmap'\n(I0\ntS'b'\ntR"
            b"(I1\n(I1\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntRI00\nS'a'\ntb."
        ),
        "call array": b"cnumpy\nndarray\n(I9\ntR.",
        "call text": b"S'os.system'\n(S'" + command + b"'\ntR.",
        "build on dict": b"}(S'__class__'\nI1\ndb.",
        "persistent": b"Pfile\n.",
        "extension": b"\x82\x01.",
        "an attribute of an allowed function": b"cnumpy\ndtype\nN}X\x08\0\0\0__code__Ns\x86b.",
        "a set": b"\x80\x04\x8f.",
        "another array class by name": b"cnumpy.core.multiarray\n_reconstruct\n(S'numpy.ndarray'\n(I0\ntS'b'\ntR.",
        "encode": b"c_codecs\nencode\n(S'a'\nS'zlib'\ntR.",
        "object array": pickle.dumps(np.array([{}, 1], dtype=object)),
        "structured": pickle.dumps(np.zeros(2, dtype=[("a", "f4")])),
        "text array": pickle.dumps(np.array(["a"])),
        "bare global": b"cnumpy\nndarray\n.",
        "global in list": b"(lcnumpy\ndtype\na.",
    }


def test_dangerous_pickles_are_refused_and_execute_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for name, data in _dangerous(canary).items():
        with pytest.raises(KdError):
            pytest.fail(f"{name}: {load_pickle(data)!r}")
        with pytest.raises(KdError):  # as a value of a dictionary, too
            pytest.fail(f"{name}: {load_pickle(entry(data[:-1]))!r}")
        assert not canary.exists(), name


def test_pythons_own_unpickler_executes_the_dangerous_pickles(tmp_path: Path) -> None:
    """Control: the standard unpickler executes the payloads above."""
    canary = tmp_path / "canary"
    payloads = _dangerous(canary)
    for name in ("system 0", "eval 4", "inst", "obj", "memmap"):
        with suppress(Exception):
            pickle.loads(payloads[name])
        assert canary.exists() or name == "memmap", name
        canary.unlink(missing_ok=True)


def entry(value: bytes) -> bytes:
    """A pickle of {"k": value}."""
    return b"}X\x01\0\0\0k" + value + b"s."


def call(name: bytes, arguments: bytes) -> bytes:
    return b"c" + name + b"\n(" + arguments + b"tR"


RECONSTRUCT = call(b"numpy.core.multiarray\n_reconstruct", b"cnumpy\nndarray\n(I0\ntS'b'\n")
U1 = call(b"numpy\ndtype", b"S'u1'\nI0\nI1\n")
OBJECT = call(b"numpy\ndtype", b"S'O'\n")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (entry(b"]" * 40 + b"a" * 39), None),
        (entry(b"]" * 80 + b"a" * 79), "nested"),
        (entry(b")" + b"\x85" * 100_000), "nested"),
        (b"}q\x00X\x01\0\0\0kh\x00s.", "nested"),  # it holds itself
        (b"\x80\x02\x8b" + struct.pack("<i", 100) + b"\x7f" * 100 + b".", "instruction"),
        (b"}(K\x01\x85K\x02u.", "key of type tuple"),
        (b"}(K\x01u.", "damaged"),
        (b"(K\x01d.", "damaged"),
        (b"\x80\x02}\x8a\x08" + struct.pack("<q", 2**60) + b"Ns.", "key beyond 60 bits"),
        (b"]X\x01\0\0\0kK\x01s.", "damaged"),
        (b"N.", "no dictionary"),
        (b"", "damaged"),
        (b"N", "damaged"),
        (b"\xff.", "refuses the pickle instruction"),
        (b".", "damaged"),
        (b"a.", "damaged"),
        (b"h\x05.", "damaged"),
        (b"(.", "damaged"),
        (b"S'abc\n.", "damaged"),
        (b"\x8e" + struct.pack("<Q", 2**62) + b"abc.", "damaged"),
        (b"I" + b"9" * 5000 + b"\n.", "damaged"),
        (entry(RECONSTRUCT + b"K\x01\x85b"), "damaged"),
        (entry(U1 + b"(I3\nS'<'\nS'x'\nNNtb"), "structured"),
        (entry(U1 + b"(I3\nS'?'\nNNNtb"), "byte order"),
        (entry(U1 + b"K\x01b"), "structured"),
        (entry(U1), "value of type"),
        (entry(call(b"numpy.core.multiarray\nscalar", U1 + b"K\x01")), "not bytes"),
        (entry(call(b"numpy.core.multiarray\nscalar", b"S'u1'\nS'a'\n")), "damaged array"),
        (entry(call(b"numpy\ndtype", b"C\x02u9")), "plain numbers"),
        (entry(OBJECT), "value of type"),
        (entry(call(b"numpy.core.multiarray\nscalar", OBJECT + b"S'abcdefgh'\n")), "damaged"),
        (entry(call(b"numpy.core.numeric\n_frombuffer", b"S'ab'\n" + U1 + b"K\x02\x85S'C'\n")), "_frombuffer"),
        (entry(b"\x96" + struct.pack("<Q", 2**40) + b"abc"), "instruction"),
    ],
)  # fmt: skip
def test_limits_and_damage(data: bytes, message: str | None) -> None:
    if message is None:
        assert load_pickle(data)
        return
    with pytest.raises(KdError, match=message):
        load_pickle(data)


def test_the_number_of_instructions_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles._Dispatch, "left", 1000)
    assert load_pickle(b"N0" * 499 + b"}.") == {}
    with pytest.raises(KdError, match="instructions"):
        load_pickle(b"N0" * 500 + b"}.")


def test_shared_parts_do_not_hide_depth_or_cost() -> None:
    """[a, [a], [[a]] …]: each level is new, its content finished before; and t = (t, t) forty times."""
    chain = b"".join(b"]q" + bytes([n]) + b"h" + bytes([n - 1]) + b"a" for n in range(1, 100))
    with pytest.raises(KdError, match="nested"):
        load_pickle(entry(b"(]q\x00" + chain + b"l"))
    pairs = b")q\x00" + b"".join(
        b"0h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(40)
    )
    assert load_pickle(entry(pairs))
    with pytest.raises(KdError, match="key of type tuple"):
        load_pickle(b"}" + pairs + b"Ns.")


def test_memoised_bytes_cannot_be_multiplied() -> None:
    raw = b"B" + struct.pack("<I", 1000) + bytes(1000) + b"q\x00"
    each = RECONSTRUCT + b"(I1\n(I1000\nth\x01I00\nh\x00tb"
    start = raw + U1 + b"q\x0100("
    assert load_pickle(entry(start + each + b"l"))
    with pytest.raises(KdError, match="larger than the file"):
        load_pickle(entry(start + each * 20 + b"l"))
    once = b"X\x64\0\0\0" + b"a" * 100 + b"q\x00X\x06\0\0\0latin1q\x01c_codecs\nencode\nq\x02000("
    encoded = b"h\x02h\x00h\x01\x86R"
    assert load_pickle(entry(once + encoded + b"l")) == {"k": [b"a" * 100]}
    with pytest.raises(KdError, match="larger than the file"):
        load_pickle(entry(once + encoded * 50 + b"l"))


@pytest.mark.parametrize("shape", ["I2\nI3\n", "I-2\nI-2\n", "I5\n", "I4294967296\nI4294967296\n", "I01\n"])
def test_shapes_must_fit_the_bytes(shape: str) -> None:
    array = RECONSTRUCT + b"(I1\n(" + shape.encode() + b"t" + U1 + b"I00\nS'abcd'\ntb"
    with pytest.raises(KdError, match="damaged array"):
        load_pickle(entry(array))


def test_dtypes_are_copies_of_numpys() -> None:
    """Setting the byte order of NumPy's shared dtype would change every later array."""
    before = np.dtype("u4").byteorder
    load_pickle(b"}" + call(b"numpy\ndtype", b"S'u4'\n") + b"(I3\nS'>'\nNNNtb0.")
    assert np.dtype("u4").byteorder == before and np.array([1], "u4").tobytes() == b"\1\0\0\0"


def test_truncated_and_flipped_pickles_raise_only_kd_errors() -> None:
    data = pickle.dumps(VALUE, protocol=4)
    for end in range(0, len(data), 3):
        with pytest.raises(KdError):
            load_pickle(data[:end])
    random = np.random.default_rng(0)
    for _ in range(400):
        changed = bytearray(data)
        changed[random.integers(len(data))] = random.integers(256)
        with suppress(KdError):
            load_pickle(bytes(changed))


def test_npy_files(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    weights = {"conv1": {"weights": np.ones((2, 2), np.float32), "biases": np.zeros(2, np.float32)}}
    np.save(path, weights, allow_pickle=True)  # type: ignore[arg-type]
    found = load_npy(path)
    assert np.array_equal(found["conv1"]["weights"], np.ones((2, 2)))
    assert set(found["conv1"]) == {"weights", "biases"}
    path.write_bytes(pickle.dumps(weights, protocol=2))
    assert load_npy(path)
    np.save(path, np.zeros(3))
    with pytest.raises(KdError, match="but an array"):
        load_npy(path)


def test_npy_hostile(tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "a.npy"
    stream = io.BytesIO()
    np.save(stream, np.array(None, dtype=object), allow_pickle=True)
    head = stream.getvalue()[:128]
    path.write_bytes(head + _dangerous(canary)["system 4"])
    with pytest.raises(KdError, match=r"a\.npy: refuses .*system"):
        load_npy(path)
    np.save(path, np.array([1, {}], dtype=object), allow_pickle=True)
    with pytest.raises(KdError, match="but an array"):
        load_npy(path)
    header = b"__import__('os').system('touch " + str(canary).encode() + b"')"
    head = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    for content in (head, b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff", b"hello"):
        path.write_bytes(content)
        with pytest.raises(KdError, match="dictionary of weights"):
            load_npy(path)
    assert not canary.exists()


def test_npy_special_and_large_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo.npy")
    for path in (tmp_path / "fifo.npy", tmp_path, tmp_path / "absent.npy"):
        with pytest.raises(KdError, match="cannot read"):
            load_npy(path)
    np.save(tmp_path / "a.npy", np.zeros(9))
    monkeypatch.setattr(pickles, "MAX_FILE_BYTES", 100)
    with pytest.raises(KdError, match="more than the 100 that are read"):
        load_npy(tmp_path / "a.npy")


def test_a_lack_of_memory_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    path = tmp_path / "a.npy"
    path.write_bytes(pickle.dumps({}))
    monkeypatch.setattr(pickles.SafeUnpickler, "load", full)
    with pytest.raises(KdError, match="more memory than is available"):
        load_npy(path)


BOUNDED = settings(max_examples=100, deadline=None, derandomize=True)
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**100), 2**100)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(min_size=1),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(-1000, 1000), inner, max_size=4)
    ),
    max_leaves=20,
)


@BOUNDED
@given(PLAIN, st.integers(0, 5))
def test_any_plain_value_comes_back(value: object, protocol: int) -> None:
    """Compared with Python's own pickle."""
    data = pickle.dumps({"value": value}, protocol)
    assert load_pickle(data) == pickle.loads(data)


@BOUNDED
@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda data: b"\x80\x04" + data + b"."))
def test_any_bytes_end_in_a_value_or_an_error(data: bytes) -> None:
    with suppress(KdError):
        load_pickle(data)


@BOUNDED
@given(
    st.integers(0, 5), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=6)
)
def test_any_changes_of_a_good_pickle_end_in_a_value_or_an_error(
    protocol: int, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(pickle.dumps(VALUE, protocol))
    for at, value in changes:
        data[at % len(data)] = value
    with suppress(KdError):
        load_pickle(bytes(data))
