"""Reading pickles: right values from every protocol, and no way to run anything."""

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

from kdcli.base import safe_pickle
from kdcli.base.errors import KdError
from kdcli.base.safe_pickle import machine, survey

VALUE = {
    "big-endian": np.arange(12, dtype=">f4").reshape(3, 4),
    b"bytes key": [1, -2.5, None, True, "é", b"\x00\xff\n'", b"", 2**70],
    "fortran": np.asfortranarray(np.arange(6, dtype=np.int16).reshape(2, 3)),
    "nested": (1, (2,), {"a": ()}),
    "ordered": collections.OrderedDict(x=1, y=2),
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 3)),
    "bool": np.array([True, False]),
}


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_gives_the_value(protocol: int) -> None:
    found: Any = safe_pickle.read(pickle.dumps(VALUE, protocol=protocol))
    assert list(found) == ["big-endian", "bytes key", *list(VALUE)[2:]]
    for name in ("big-endian", "fortran", "empty", "bool"):
        assert found[name].dtype == VALUE[name].dtype and found[name].shape == VALUE[name].shape
        assert np.array_equal(found[name], VALUE[name])
        assert found[name].flags.owndata and found[name].flags.writeable
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
    found: Any = safe_pickle.read(b"(dS'data'\n" + array + b"sS'labels'\n(lI6\naI9\nas.")
    assert found["data"].tolist() == [[1, 255], [127, 128]] and found["data"].dtype == np.uint8
    assert found["labels"] == [6, 9]
    assert safe_pickle.read(b"\x80\x02}U\x04name" + b"U\x02\xe9\xffs.") == {"name": "é\xff"}


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
        "encode": b"c_codecs\nencode\n(S'a'\nS'zlib'\ntR.",
        "object array": pickle.dumps(np.array([{}, 1], dtype=object)),
        "structured": pickle.dumps(np.zeros(2, dtype=[("a", "f4")])),
        "text array": pickle.dumps(np.array(["a"])),
        "bare global": b"cnumpy\nndarray\n.",
        "global in list": b"(lcnumpy\ndtype\na.",
        "unfilled array": b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR.",
    }


def test_nothing_runs_and_everything_strange_is_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for name, data in _dangerous(canary).items():
        with pytest.raises(KdError, match="refuses"):
            pytest.fail(f"{name}: {safe_pickle.read(data)!r}")
        assert not canary.exists(), name


def test_the_canary_would_die_of_a_real_unpickler(tmp_path: Path) -> None:
    """Proves that the payloads above bite."""
    canary = tmp_path / "canary"
    payloads = _dangerous(canary)
    for name in ("system 0", "eval 4", "inst", "obj", "memmap"):
        with suppress(Exception):
            pickle.loads(payloads[name])
        assert canary.exists() or name == "memmap", name
        canary.unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"]" * 40 + b"a" * 39 + b".", None),
        (b"]" * 80 + b"a" * 79 + b".", "nested"),
        (b")" + b"\x85" * 100_000 + b".", "nested"),
        (b"]q\x00h\x00a.", "holds itself"),
        (b"\x80\x02\x8b" + struct.pack("<i", 100) + b"\x7f" * 100 + b".", "huge integer"),
        (b"Np99999999\n.", "memo index"),
        (b"N" * 1_000_002 + b".", "stack"),
        (b"}(K\x01\x85K\x02u.", "key"),
        (b"", "damaged"),
        (b"N", "damaged"),
        (b"\xff.", "damaged"),
        (b".", "damaged"),
        (b"a.", "damaged"),
        (b"h\x05.", "damaged"),
        (b"(.", "refuses"),
        (b"S'abc\n.", "damaged"),
        (b"\x8e" + struct.pack("<Q", 2**62) + b"abc.", "damaged"),
        (b"I" + b"9" * 500 + b"\n.", "huge integer"),
    ],
)
def test_limits_and_damage(data: bytes, message: str | None) -> None:
    if message is None:
        assert safe_pickle.read(data)
        return
    with pytest.raises(KdError, match=message):
        safe_pickle.read(data)


def test_the_number_of_instructions_is_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "MAX_OPCODES", 1000)
    assert safe_pickle.read(b"N0" * 499 + b"N.") is None
    with pytest.raises(KdError, match="more than 1,000 instructions"):
        safe_pickle.read(b"N0" * 500 + b"N.")


def test_shared_parts_do_not_hide_depth_or_cost() -> None:
    """[a, [a], [[a]] …]: each level is new, its content finished before; and t = (t, t) sixty times."""
    chain = (
        b"(]q\x00"
        + b"".join(b"]q" + bytes([n]) + b"h" + bytes([n - 1]) + b"a" for n in range(1, 100))
        + b"l."
    )
    with pytest.raises(KdError, match="nested"):
        safe_pickle.read(chain)
    assert safe_pickle.read(b")" + b"2\x86" * 60 + b".")


def test_memoised_bytes_cannot_be_multiplied() -> None:
    raw = b"B" + struct.pack("<I", 1000) + bytes(1000) + b"q\x00"
    dtype = b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntRq\x01"
    each = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    each += b"(I1\n(I1000\nth\x01I00\nh\x00tb"
    assert safe_pickle.read(b"(" + raw + dtype + b"00(" + each + b"l.")
    with pytest.raises(KdError, match="larger than the file"):
        safe_pickle.read(b"(" + raw + dtype + b"00(" + each * 20 + b"l.")


@pytest.mark.parametrize("shape", ["I2\nI3\n", "I-2\nI-2\n", "I5\n", "I4294967296\nI4294967296\n", "I01\n"])
def test_shapes_must_make_the_bytes(shape: str) -> None:
    data = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n("
        + shape.encode()
        + b"tcnumpy\ndtype\n(S'u1'\nI0\nI1\ntRI00\nS'abcd'\ntb."
    )
    with pytest.raises(KdError, match="damaged array"):
        safe_pickle.read(data)


def test_truncation_and_flips_never_escape_as_other_errors() -> None:
    data = pickle.dumps(VALUE, protocol=4)
    for end in range(len(data)):
        with pytest.raises(KdError):
            safe_pickle.read(data[:end])
    random = np.random.default_rng(0)
    for _ in range(2000):
        changed = bytearray(data)
        changed[random.integers(len(data))] = random.integers(256)
        with suppress(KdError):
            safe_pickle.read(bytes(changed))


def test_no_builder_is_a_function_from_outside() -> None:
    """What a pickle can reach are methods of the machine, nothing importable."""
    assert all(getattr(machine.Machine, f.__name__) is f for f in machine.BUILDERS.values())
    source = "".join(p.read_text() for p in Path(safe_pickle.__file__).parent.glob("*.py"))
    for word in ("import pickle\n", "pickle.load", "eval(", "exec(", "__import__", "importlib"):
        assert word not in source.replace("literal_eval(", "")


def test_npy_files(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for array in (
        np.arange(6, dtype="<i4").reshape(2, 3),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.array(7),
    ):
        np.save(path, array)
        found: Any = safe_pickle.load_npy(path)
        assert found.dtype == array.dtype and np.array_equal(found, array)
    weights = {"conv1": {"weights": np.ones((2, 2), np.float32), "biases": np.zeros(2, np.float32)}}
    np.save(path, weights, allow_pickle=True)  # type: ignore[arg-type]
    found = safe_pickle.load_npy(path)
    assert np.array_equal(found["conv1"]["weights"], np.ones((2, 2))) and set(found["conv1"]) == {
        "weights",
        "biases",
    }
    path.write_bytes(pickle.dumps(weights, protocol=2))
    assert safe_pickle.load_npy(path)


def test_npy_of_python_2(tmp_path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2L, 1L), }"
    path = tmp_path / "a.npy"
    path.write_bytes(
        b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + struct.pack("<2f", 1.5, -2)
    )
    found: Any = safe_pickle.load_npy(path)
    assert found.tolist() == [[1.5], [-2.0]]


def test_npy_hostile(tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "a.npy"
    stream = io.BytesIO()
    np.save(stream, np.array(None, dtype=object), allow_pickle=True)
    head = stream.getvalue()[:128]
    path.write_bytes(head + _dangerous(canary)["system 4"])
    with pytest.raises(KdError, match=r"a\.npy: refuses .*system"):
        safe_pickle.load_npy(path)
    np.save(path, np.array([1, {}], dtype=object), allow_pickle=True)
    with pytest.raises(KdError, match="refuses an object array"):
        safe_pickle.load_npy(path)
    for header in (
        b"__import__('os').system('touch " + str(canary).encode() + b"')",
        b"(" * 5000,
        b"{'descr': [('a','<f4')], 'fortran_order': False, 'shape': ()}",
        b"{'descr': '', 'fortran_order': False, 'shape': ()}",
        b"{'descr': '<U3', 'fortran_order': False, 'shape': ()}",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (9,)}",
    ):
        path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\0\0\0\0")
        with pytest.raises(KdError):
            safe_pickle.load_npy(path)
    for content in (b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff", b"hello"):
        path.write_bytes(content)
        with pytest.raises(KdError):
            safe_pickle.load_npy(path)
    with pytest.raises(KdError, match="cannot read"):
        safe_pickle.load_npy(tmp_path / "absent.npy")
    assert not canary.exists()


@pytest.mark.parametrize("tail", [b"2\x93.", b"2\x86R."])
def test_values_that_share_parts_cost_no_time_in_a_message(tail: bytes) -> None:
    """Each round makes a pair of what is there, twice: written out, its text would double 40 times."""
    with pytest.raises(KdError):
        safe_pickle.read(b"\x80\x04)" + b"2\x86" * 40 + tail)


def test_a_bytearray_that_is_used_often_is_kept_once() -> None:
    content = safe_pickle.read(pickle.dumps([bytearray(b"x" * 1000)] * 50, 5))
    assert isinstance(content, list)
    assert {id(item) for item in content} == {id(content[0])} and content[0] == b"x" * 1000


def global_call(name: bytes, arguments: bytes) -> bytes:
    return b"\x80\x04c" + name + b"\n(" + arguments + b"tR."


K_ORDER = b"numpy.core.numeric\n_frombuffer"
RECONSTRUCT = b"numpy.core.multiarray\n_reconstruct"
U1 = b"cnumpy\ndtype\n(S'u1'\ntR"


def test_axes_of_a_buffer() -> None:
    array = np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2)
    assert np.array_equal(safe_pickle.read(pickle.dumps(array, 5)), array)  # type: ignore[arg-type]
    whole = b"C\x02ab" + U1 + b"K\x02K\x01\x86"
    for axes in (b"K\x00K\x00\x86", b"K\x00\x85", b"]", b"K\x00\x88\x86", b"X\x02\0\0\0ab"):
        with pytest.raises(KdError, match="axes"):
            safe_pickle.read(global_call(K_ORDER, whole + b"S'K'\n" + axes))
    with pytest.raises(KdError, match="memory order"):
        safe_pickle.read(global_call(K_ORDER, whole + b"S'Q'\n"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x80\x02}\x8a\x08" + struct.pack("<q", 2**60) + b"Ns.", "huge integer as a key"),
        (b"\x80\x04\x8f(G" + bytes(8) + b"\x90.", "key of kind float"),
        (b"(K\x01d.", "key without a value"),
        (b"\x80\x04K\x01K\x02\x93.", "no text"),
        (b"0.", "damaged"),
        (b"e.", "mark is missing"),
        (b"K\x01a.", "damaged"),
        (b"(q\x00.", "value is missing"),
        (b"K\x01)R.", "not a known name"),
        (global_call(RECONSTRUCT, b"cnumpy\nndarray\nI0\nS'b'\n")[:-1] + b"K\x01\x85b.", "5-tuple"),
        (U1 + b"(I3\nS'<'\nS'x'\nNNtb.", "structured"),
        (U1 + b"(I3\nS'?'\nNNNtb.", "byte order"),
        (U1 + b"K\x01b.", "structured"),
        (global_call(K_ORDER, b"C\x01aK\x01K\x01\x85S'C'\n"), "no dtype"),
        (global_call(K_ORDER, b"K\x01" + U1 + b"K\x01\x85S'C'\n"), "not bytes"),
        (global_call(b"numpy.core.multiarray\nscalar", b"K\x01C\x01a"), "no dtype"),
        (global_call(b"numpy\ndtype", b"C\x02u9"), "plain numbers"),
        (global_call(b"numpy\ndtype", b"S'b8'\n")[:-1] + b"C\x08aaaaaaaa" + b"0.", "refuses"),
        (global_call(b"collections\nOrderedDict", b"K\x01"), "without pairs"),
        (global_call(b"__builtin__\nbytes", b"K\x09"), "a call of bytes"),
        (global_call(b"__builtin__\nbytes", b""), None),
        (b"\x80\x05\x96" + struct.pack("<Q", 3) + b"abc.", None),
        (b"\x80\x04\x95" + struct.pack("<Q", 99) + b"N.", "frame"),
        (b"I12", "within a line"),
        (b"J\x00", "before its STOP"),
        (b"T\xff\xff\xff\xffa.", "negative length"),
        (b"F" + b"1" * 2000 + b"\n.", "line of more than"),
        (b"\x80\x02\x8b" + struct.pack("<i", 18) + bytes(18) + b".", "huge integer"),
    ],
)  # fmt: skip
def test_more_limits_and_damage(data: bytes, message: str | None) -> None:
    if message is None:
        safe_pickle.read(data)
        return
    with pytest.raises(KdError, match=message):
        safe_pickle.read(data)


def test_caps_of_the_first_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"\x80\x02(U\x05helloU\x05helloV\nt."
    assert safe_pickle.read(text) == ("hello", "hello", "")
    for name, value, message in (
        ("MAX_STRINGS", 2, "more than 2 strings"),
        ("MAX_STRING_BYTES", 4, "more than 4 bytes"),
    ):
        with monkeypatch.context() as patched, pytest.raises(KdError, match=message):
            patched.setattr(survey, name, value)
            safe_pickle.read(text)


def test_text_is_encoded_no_more_often_than_the_file_is_long() -> None:
    once = b"\x80\x02X\x64\0\0\0" + b"a" * 100 + b"q\x00X\x06\0\0\0latin1q\x01c_codecs\nencode\nq\x02("
    assert safe_pickle.read(once + b"h\x02h\x00h\x01\x86R" + b"t.") == (b"a" * 100,)
    with pytest.raises(KdError, match="text that is larger than the file"):
        safe_pickle.read(once + b"h\x02h\x00h\x01\x86R" * 50 + b"t.")


def test_keys_with_one_hash_cost_no_time() -> None:
    """Integers that differ by 2**61 - 1 have the same hash: a dictionary of them takes quadratic time."""
    assert hash(5 + 2 * (2**61 - 1)) == 5
    with pytest.raises(KdError, match="as a key"):
        safe_pickle.read(pickle.dumps(dict.fromkeys((5 + n * (2**61 - 1) for n in range(9)), 0)))
    assert safe_pickle.read(pickle.dumps({2**59: 1, -(2**59): 2}, 2)) == {2**59: 1, -(2**59): 2}


def test_memory_that_ends_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    path = tmp_path / "a.npy"
    np.save(path, np.zeros(3))
    for owner, name in ((np, "array"), (Path, "read_bytes"), (machine.Machine, "run")):
        data = path.read_bytes()
        with monkeypatch.context() as patched, pytest.raises(KdError, match="more memory than there is"):
            patched.setattr(owner, name, full)
            safe_pickle.read(data) if name == "run" else safe_pickle.load_npy(path)


def test_npy_headers_in_other_words(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for header in (
        b"{'shape': (2,), 'descr': '<i2', 'fortran_order': False}",
        b'{"descr": "<i2","fortran_order":True,"shape":(2L ,) ,}  \n',
        b"{ 'fortran_order' : False , 'shape' : ( 1 , 2 ) , 'descr' : '<i2' , }",
    ):
        path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\1\0\2\0")
        found: Any = safe_pickle.load_npy(path)
        assert found.ravel().tolist() == [1, 2] and found.dtype == np.int16
    for changed in (b"(2,) + ()", b"[2]", b"(2,), 'x': 1", b"(-2,)", b"(2.0,)"):
        header = b"{'descr': '<i2', 'fortran_order': False, 'shape': " + changed + b"}"
        path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\1\0\2\0")
        with pytest.raises(KdError, match="header"):
            safe_pickle.load_npy(path)
    for array in (np.zeros((0, 3), np.int8), np.zeros((2, 0), ">f8", order="F")):
        np.save(path, array)
        found = safe_pickle.load_npy(path)
        assert found.shape == array.shape and found.dtype == array.dtype
    monkey = b"{'descr': '<i2', 'fortran_order': False, 'shape': (0, 9223372036854775807)}"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(monkey)) + monkey)
    with suppress(KdError):
        safe_pickle.load_npy(path)


def test_what_is_not_a_file_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo.npy")
    for path in (tmp_path / "fifo.npy", tmp_path):
        with pytest.raises(KdError, match="not a file"):
            safe_pickle.load_npy(path)
    np.save(tmp_path / "a.npy", np.zeros(9))
    monkeypatch.setattr(safe_pickle, "MAX_FILE_BYTES", 100)
    with pytest.raises(KdError, match="larger than 100 bytes"):
        safe_pickle.load_npy(tmp_path / "a.npy")
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    with pytest.raises(KdError, match="cannot read"):
        safe_pickle.load_npy(tmp_path / "absent.npy")


BOUNDED = settings(max_examples=150, deadline=None, derandomize=True)
PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**100), 2**100)
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(),
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
    """With Python's own pickle as the judge."""
    data = pickle.dumps(value, protocol)
    assert safe_pickle.read(data) == pickle.loads(data)


@BOUNDED
@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda data: b"\x80\x04" + data + b"."))
def test_any_bytes_end_in_a_value_or_an_error(data: bytes) -> None:
    for read in (safe_pickle.read, safe_pickle.read_npy):
        with suppress(KdError):
            read(data)


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
        safe_pickle.read(bytes(data))
