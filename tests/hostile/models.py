"""Malicious checkpoints, ONNX files and caffemodels."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from kdcli.caffe import schema
from tests.hostile.pickles import Calls

ABOUT = {
    "format_version": 1, "arch": "lenet", "arch_args": {}, "preprocess": {"name": "none", "args": {}, "state": {}},
    "classes": ["a", "b"], "input_size": [32, 32, 3], "provenance": {},
}  # fmt: skip


def checkpoint(**more: Any) -> bytes:
    """What torch.save makes of a whole document."""
    stream = io.BytesIO()
    torch.save({**ABOUT, "state_dict": {"w": torch.arange(6.0)}, **more}, stream)
    return stream.getvalue()


def repacked(
    change: Callable[[str, bytes], bytes | None], method: int = zipfile.ZIP_STORED, **more: bytes
) -> bytes:
    """The whole checkpoint with its records changed (None: left out)."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(checkpoint())) as old, zipfile.ZipFile(stream, "w", method) as new:
        for name in old.namelist():
            if (content := change(name, old.read(name))) is not None:
                new.writestr(name, content)
        for name, content in more.items():
            new.writestr("archive/" + name, content)
    return stream.getvalue()


def with_pickle(content: bytes) -> bytes:
    """The whole checkpoint around another pickle."""
    return repacked(lambda name, old: content if name.endswith("data.pkl") else old)


def pickle_of(**more: Any) -> bytes:
    """The pickle inside a checkpoint."""
    with zipfile.ZipFile(io.BytesIO(checkpoint(**more))) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def checkpoints(canary: Path) -> dict[str, bytes]:
    """Each must end in a KdError."""
    evil = Calls(os.system, f"touch {canary}")
    plain = pickle_of()
    whole = checkpoint()
    script = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), script)
    legacy, old_tar = io.BytesIO(), io.BytesIO()
    torch.save({"w": torch.zeros(3)}, legacy, _use_new_zipfile_serialization=False)
    with tarfile.open(fileobj=old_tar, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(evil)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    eocd = whole.rindex(b"PK\x05\x06")
    start = struct.unpack_from("<I", whole, eocd + 16)[0]
    sizes = {b"K\x06t": b"J\x00\x00\x00\x10t"}
    lie = plain
    for old, new in sizes.items():
        lie = lie.replace(old, new, 1)
    assert lie != plain
    laughs: list[Any] = ["ha"]
    for _ in range(60):
        laughs = [laughs, laughs]
    text = "x" * 1_000_000
    called = {
        f"a call of {name}": with_pickle(b"\x80\x02c" + target.encode() + b"\n" + arguments + b"R.")
        for name, target, arguments in (
            ("bytearray", "builtins\nbytearray", b"\x8a\x08" + struct.pack("<q", 2**40) + b"\x85"),
            ("Tensor", "torch\nTensor", b"\x8a\x08" + struct.pack("<q", 2**40) + b"\x85"),
            ("Size", "torch\nSize", b"K\x01\x85\x85"),
            ("a sparse tensor", "torch._utils\n_rebuild_sparse_tensor", b"NN\x86"),
            ("a codec", "_codecs\nencode", b"X\x01\0\0\0aX\x04\0\0\0idna\x86"),
            ("a hub", "torch.hub\nload", b"X\x01\0\0\0aX\x01\0\0\0b\x86"),
            ("load", "torch\nload", b"X\x01\0\0\0a\x85"),
        )
    }
    return called | {
        "calls": checkpoint(state_dict=evil),
        "calls in provenance": checkpoint(provenance={"x": evil}),
        "a plain pickle that calls": pickle.dumps(evil),
        "a legacy file": legacy.getvalue(),
        "a legacy file that calls": pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps(evil, 2),
        "a tar file of the old kind": old_tar.getvalue(),
        "TorchScript": script.getvalue(),
        "TorchScript beside weights": repacked(lambda _, old: old, **{"constants.pkl": b"\x80\x02).", "code/x.py": b"1"}),
        "a storage of 1 GiB in 24 bytes": with_pickle(lie),
        "a storage of no record": with_pickle(plain.replace(b"X\x01\0\0\x000", b"X\x01\0\0\x009")),
        "a storage of -1": with_pickle(plain.replace(b"K\x06t", b"J\xff\xff\xff\xfft", 1)),
        "a view of terabytes": checkpoint(state_dict={"w": torch.zeros(1).expand(1 << 40)}),
        "a view of terabytes with a hash": checkpoint(state_dict={"w": torch.zeros(1).expand(1 << 40)}, sha256="0" * 64),
        "a sparse tensor of terabytes": checkpoint(
            state_dict={"w": torch.sparse_coo_tensor(torch.tensor([[0]]), torch.tensor([1.0]), (1 << 40,))}
        ),
        "a quantised tensor": checkpoint(state_dict={"w": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.quint8)}),
        "lists of lists of lists": checkpoint(provenance={"x": laughs}, sha256="0" * 64),
        "one text a million times": checkpoint(provenance={"x": [text] * 200_000}, sha256="0" * 64),
        "compressed": repacked(lambda _, old: old, zipfile.ZIP_DEFLATED),
        "a compressed bomb": repacked(
            lambda name, old: bytes(1 << 25) if name.endswith("data/0") else old, zipfile.ZIP_DEFLATED
        ),
        "two pickles": repacked(lambda _, old: old, **{"data.pkl": plain}),
        "no pickle": repacked(lambda name, old: None if name.endswith("data.pkl") else old),
        "records on top of each other": whole[:start] + _again(whole, start, eocd, 50),
        "two ends": whole + whole[eocd:],
        "something behind": whole + b"x" * 100,
        "another directory": whole[:eocd - 76] + _moved(whole[eocd - 76 : eocd - 20], 64) + whole[eocd - 20 :],
        "cut": whole[:-200], "half": whole[: len(whole) // 2], "nothing": b"", "only an end": b"PK\x05\x06" + bytes(18),
        "of no classes": checkpoint(classes=None), "of a text state": checkpoint(state_dict="abc"),
        "version 10**30": checkpoint(format_version=10**30),
    }  # fmt: skip


def _again(whole: bytes, start: int, eocd: int, times: int) -> bytes:
    """The directory of a checkpoint with its entries many times, under names of their own."""
    directory = whole[start : eocd - 76]
    count = struct.unpack_from("<H", whole, eocd + 10)[0]
    more = b"".join(directory.replace(b"archive/", b"arch%03d/" % number) for number in range(times))
    many = directory + more
    return many + b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, *[count * (times + 1)] * 2, len(many), start, 0)


def _moved(record: bytes, by: int) -> bytes:
    """A zip64 record whose directory begins elsewhere."""
    return record[:48] + struct.pack("<Q", struct.unpack("<Q", record[48:])[0] + by)


def network(
    nodes: list[onnx.NodeProto] | None = None,
    weights: list[TensorProto] | None = None,
    size: tuple[int, ...] = (1, 3, 4, 4),
    **more: Any,
) -> onnx.ModelProto:
    """A classifier of two classes: flatten and multiply, unless told otherwise."""
    nodes = nodes or [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["y"]),
    ]
    values = np.ones((48, 2), np.float32)
    weights = [onnx.numpy_helper.from_array(values, "w")] if weights is None else weights
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, size)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], weights,
    )  # fmt: skip
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8, **more)


def outside(location: str, dims: tuple[int, ...] = (48, 2), **entries: str) -> TensorProto:
    """A tensor whose values are said to be in another file."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def weight(dims: list[int], raw: bytes = b"", kind: int = TensorProto.FLOAT) -> TensorProto:
    """A tensor whose shape and values need not go together."""
    return TensorProto(name="w", data_type=kind, dims=dims, raw_data=raw)


def _function(name: str, calls: list[str]) -> onnx.FunctionProto:
    nodes, at = [], "a"
    for number, called in enumerate(calls):
        nodes.append(
            helper.make_node(called, [at], [f"t{number}"], domain="f" if called.startswith("F") else "")
        )
        at = f"t{number}"
    nodes[-1].output[0] = "b"
    return helper.make_function(
        "f", name, ["a"], ["b"], nodes, [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    )


def _branch(inner: list[onnx.NodeProto], weights: list[TensorProto] | None = None) -> onnx.GraphProto:
    output = [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)]
    return helper.make_graph(inner, "branch", [], output, weights or [])


def _if(branch: onnx.GraphProto) -> list[onnx.NodeProto]:
    yes = onnx.numpy_helper.from_array(np.array(True), "yes")
    return [
        helper.make_node("Constant", [], ["c"], value=yes),
        helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
    ]


def onnx_files() -> dict[str, bytes]:
    """Each must end in a KdError."""
    flatten = helper.make_node("Flatten", ["x"], ["f"])
    calls = [helper.make_node("F0", ["x"], ["y"], domain="f")]
    chain = [_function(f"F{n}", [f"F{n + 1}"] * 2) for n in range(40)] + [_function("F40", ["Relu"])]
    trip = onnx.numpy_helper.from_array(np.array(2**62), "n")
    yes = onnx.numpy_helper.from_array(np.array(True), "yes")
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Relu", ["v"], ["next"])], "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("on", TensorProto.BOOL, []),
         helper.make_tensor_value_info("v", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("still", TensorProto.BOOL, []), helper.make_tensor_value_info("next", TensorProto.FLOAT, None)],
    )  # fmt: skip
    loop = [
        helper.make_node("Constant", [], ["n"], value=trip), helper.make_node("Constant", [], ["yes"], value=yes),
        helper.make_node("Loop", ["n", "yes", "x"], ["b"], body=body),
    ]  # fmt: skip
    ending = [helper.make_node("Flatten", ["b"], ["f"]), helper.make_node("MatMul", ["f", "w"], ["y"])]
    many = onnx.numpy_helper.from_array(np.array([1 << 40], np.int64), "many")
    sparse = onnx.SparseTensorProto(
        values=onnx.numpy_helper.from_array(np.ones(1, np.float32), "w"),
        indices=onnx.numpy_helper.from_array(np.zeros(1, np.int64), "i"),
        dims=[1 << 20, 1 << 20],
    )
    found: dict[str, onnx.ModelProto] = {
        f"weights in {place}": network(weights=[outside(place)])
        for place in ("/etc/passwd", "../../../../etc/passwd", "/dev/zero", "weights.bin", "", ".", "*/_ORT_MEM_ADDR_/*")
    }  # fmt: skip
    found |= {
        "weights in another file, 8 EiB": network(weights=[outside("w.bin", offset="0", length=str(2**63 - 1))]),
        "a node's value in another file": network(
            [helper.make_node("Constant", [], ["w"], value=outside("/etc/passwd")), flatten,
             helper.make_node("MatMul", ["f", "w"], ["y"])], []
        ),
        "a branch's weights in another file": network(_if(_branch([helper.make_node("Identity", ["w"], ["b"])], [outside("/etc/passwd")]))),
        "dims of 2**40": network(weights=[weight([1 << 40])]),
        "dims of 2**62 by 2**62": network(weights=[weight([1 << 62, 1 << 62])]),
        "negative dims": network(weights=[weight([-48, -2], bytes(384))]),
        "values missing": network(weights=[weight([48, 2], bytes(4))]),
        "a type that is none": network(weights=[weight([48, 2], bytes(384), 99)]),
        "texts for weights": network(weights=[weight([48, 2], bytes(384), TensorProto.STRING)]),
        "terabytes by Expand": network(
            [helper.make_node("Constant", [], ["m"], value=many), helper.make_node("Flatten", ["x"], ["f"]),
             helper.make_node("ConstantOfShape", ["m"], ["z"]), helper.make_node("Add", ["f", "z"], ["y"])]
        ),
        "a loop without end": network([*loop, *ending]),
        "a loop in a branch": network(_if(_branch(loop))),
        "a function that calls itself": network(calls, [], functions=[_function("F0", ["F0"])]),
        "functions in a circle": network(calls, [], functions=[_function("F0", ["F1"]), _function("F1", ["F0"])]),
        "2**40 operations in 40 functions": network(calls, [], functions=chain),
        "an operation of a stranger": network([helper.make_node("Run", ["x"], ["y"], domain="evil.so")]),
        "an unknown operation": network([helper.make_node("Execute", ["x"], ["y"])]),
        "a circle of nodes": network([helper.make_node("Add", ["x", "y"], ["z"]), helper.make_node("Relu", ["z"], ["y"])]),
        "an input of 2**40 pixels a side": network(size=(1, 3, 1 << 40, 1 << 40)),
        "an input of 100,000 pixels a side": network(size=(1, 3, 100_000, 100_000)),
        "an input of negative size": network(size=(1, 3, -4, -4)),
        "an input of nothing": network(size=(1, 3, 0, 0)),
        "an input of a million channels": network(size=(1, 1_000_000, 4, 4)),
        "no nodes": network(), "no outputs": network(), "two inputs": network(), "opset 9999": network(),
        "metadata of brackets": network(), "metadata beyond numbers": network(), "a sparse weight of terabytes": network(),
    }  # fmt: skip
    del found["no nodes"].graph.node[:]
    del found["no outputs"].graph.output[:]
    found["two inputs"].graph.input.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1]))
    found["opset 9999"].opset_import[0].version = 9999
    found["a sparse weight of terabytes"].graph.sparse_initializer.append(sparse)
    del found["a sparse weight of terabytes"].graph.initializer[:]
    for name, text in (("metadata of brackets", "[" * 100_000), ("metadata beyond numbers", "")):
        infinite = '{"name": "none", "args": {}, "state": {"a": {"shape": [Infinity], "float32": ""}}}'
        values = {
            "kd.format": "kd-onnx-1",
            "kd.classes": text or '["a", "b"]',
            "kd.provenance": "{}",
            "kd.preprocess": infinite,
        }
        helper.set_model_props(found[name], values)
    whole = network().SerializeToString()
    depth = b""
    for _ in range(5_000):  # graph in attribute in node in graph …
        attribute = b"\x32" + _varint(len(depth)) + depth
        node = b"\x2a" + _varint(len(attribute)) + attribute
        depth = b"\x0a" + _varint(len(node)) + node
    content = {name: model.SerializeToString() for name, model in found.items()}
    return content | {
        "graphs in graphs, 5,000 deep": b"\x3a" + _varint(len(depth)) + depth,
        "a field of 2 GiB": whole + b"\x3a\xff\xff\xff\xff\x07", "a group without end": b"\x0b" * 10_000,
        "cut": whole[:-100], "half": whole[: len(whole) // 2], "nothing": b"", "zeros": bytes(1000), "text": b"hello " * 99,
    }  # fmt: skip


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def caffemodel(shape: Callable[[Any], None] | None = None, count: int = 16_384) -> bytes:
    """One inner product, V2, with a blob whose shape is said in any way."""
    net = schema.NetParameter()
    net.name = "n"
    layer = net.layer.add(name="ip", type="InnerProduct")
    layer.bottom.append("data")
    layer.top.append("ip")
    blob = layer.blobs.add()
    blob.data.append(np.ones(count, "<f4").tobytes())
    (shape or (lambda b: b.shape.dim.extend([count // 2, 2])))(blob)
    return bytes(net.SerializeToString())


def caffemodels() -> dict[str, bytes]:
    """Each must end in a KdError."""

    def old(num: int, channels: int, height: int, width: int) -> Callable[[Any], None]:
        def shape(blob: Any) -> None:
            blob.num, blob.channels, blob.height, blob.width = num, channels, height, width

        return shape

    def new(*dims: int) -> Callable[[Any], None]:
        return lambda blob: blob.shape.dim.extend(dims)

    group = b"\x0b" * 50_000
    message = b""
    for _ in range(5_000):
        message = b"\xa2\x06" + _varint(len(message)) + message
    whole = caffemodel()
    return {
        "negative, new style": caffemodel(new(-8, -2048)), "negative, old style": caffemodel(old(-1, -1, 128, 128)),
        "zero": caffemodel(new(0, 5)), "no shape": caffemodel(lambda blob: None), "empty shape": caffemodel(lambda b: b.shape.SetInParent()),
        "2**63 - 1": caffemodel(new(2**63 - 1)), "2**62 squared": caffemodel(new(2**62, 2**62)),
        "a product that wraps around to the right one": caffemodel(new(2**32, 2**32, 2**14)),
        "2**31 - 1, old style": caffemodel(old(*[2**31 - 1] * 4)), "16 GiB": caffemodel(new(2**32)),
        "one more": caffemodel(new(16_385)), "one fewer": caffemodel(new(16_383)),
        "40 sides of 1": caffemodel(new(*[1] * 40, 16_384)), "100,000 sides": caffemodel(new(*[3] * 100_000)),
        "groups in groups": group, "groups in groups, inside": whole + group, "messages in messages": message,
        "a group that never ends": whole + b"\x0b\x08\x01", "a length of 2**63": whole + b"\xa2\x06" + b"\xff" * 9 + b"\x01",
        "a length of 2 GiB": whole + b"\xa2\x06\xff\xff\xff\xff\x07", "a tag of 0": whole + b"\x00\x00",
        "no layers": b"\x0a\x01n", "nothing": b"", "zeros": bytes(5000), "a pickle": pickle.dumps({}, 2), "text": b"name: 'n'",
    }  # fmt: skip


def truncated(content: bytes, step: int = 1024) -> dict[str, bytes]:
    """Cut at each step."""
    return {f"{end:09d}": content[:end] for end in range(step, len(content), step)}


def flipped(content: bytes, count: int, seed: int = 0) -> dict[str, bytes]:
    """Bits turned over, mostly near the ends, where there is more than numbers."""
    random = np.random.default_rng(seed)
    found = {}
    for number in range(count):
        near = random.integers(0, min(200, len(content)))
        at = (near, len(content) - 1 - near, random.integers(len(content)))[number % 3]
        changed = bytearray(content)
        changed[at] ^= 1 << int(random.integers(8))
        found[f"{number:05d}"] = bytes(changed)
    return found


def prototxts() -> dict[str, bytes]:
    """Each must end in a KdError."""
    return {
        "nested": b"layer { " * 20_000, "nested unknown": b"x { " * 20_000 + b"}" * 20_000, "closed": b"}" * 1000,
        "a number of a million digits": b"layer { convolution_param { num_output: " + b"9" * 1_000_000 + b" } }",
        "a text without end": b'name: "' + b"a" * 1_000_000, "binary": bytes(range(256)) * 10, "nothing": b"",
        "a file to include": b'net: "/etc/passwd"', "out of range": b"layer { phase: 7 }",
    }  # fmt: skip
