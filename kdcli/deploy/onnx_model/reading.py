"""Reading of untrusted ONNX files within limits."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import onnx
from google.protobuf.message import Message
from onnx.external_data_helper import load_external_data_for_tensor

from kdcli.base.errors import KdError
from kdcli.base.files import check_pointer
from kdcli.base.text import first_line
from kdcli.models.foreign import explain

MAX_BYTES = 2**31 - 1  # one protobuf message cannot be larger
MAX_NODES = 1_000_000  # with functions expanded wherever they are called
MAX_CALL_DEPTH = 50
LOOPS = ("Loop", "Scan")
_FunctionKey = tuple[str, str, str]  # domain, name, overload
_M = TypeVar("_M", bound=Message)


def read_model(path: Path, *, external: bool) -> tuple[onnx.ModelProto, int, str]:
    """The model with all of its weights, bytes of the file or files, SHA-256 of the file; a KdError if unfit."""
    if not path.is_file():
        raise KdError(f"no such file: {path}")
    if path.stat().st_size > MAX_BYTES:
        raise KdError(f"{path} is larger than 2 GiB", "kd reads ONNX models that fit one protobuf message.")
    content = path.read_bytes()
    check_pointer(content, str(path))
    try:
        model = onnx.ModelProto.FromString(content)  # load_model would go by the file's suffix
    except Exception as error:  # protobuf raises whatever the bytes provoke
        raise explain(path) or KdError(f"{path} is not an ONNX model: {first_line(error)}") from error
    if not model.graph.node or not model.graph.output:
        raise explain(path) or KdError(f"{path} is not an ONNX model: it holds no network")
    _check_work(path, model)
    outside = [
        tensor
        for tensor in _messages(model, onnx.TensorProto)
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data
    ]
    if outside and not external:
        raise KdError(
            f"{path} keeps weights in other files",
            "This command reads self-contained ONNX files, as made by "
            f"onnx.save_model(onnx.load({path.as_posix()!r}), 'model.onnx').",
        )
    for info in (*model.graph.input, *model.graph.output):
        for side in info.type.tensor_type.shape.dim:
            if side.HasField("dim_value") and side.dim_value < 1:  # open, as some exporters write it
                side.ClearField("dim_value")
    return model, len(content) + _load_external(path, outside), hashlib.sha256(content).hexdigest()


def _load_external(path: Path, tensors: list[onnx.TensorProto]) -> int:
    """Load tensors from regular files in the model's own folder; returns the total size of these files."""
    locations = set()
    total = path.stat().st_size
    for tensor in tensors:
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        locations.add(location)
        try:
            load_external_data_for_tensor(tensor, str(path.parent))
            item = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            if len(tensor.raw_data) != math.prod(tensor.dims) * item:
                raise ValueError(f"it does not hold the {list(tensor.dims)} values of {tensor.name[:60]!r}")
            total += len(tensor.raw_data)
            if total > MAX_BYTES:
                raise ValueError("model and weights together have more than 2 GiB")
        except Exception as error:  # onnx raises its own and Python's
            problem = f"{path} keeps weights in {location[:60]!r}, which cannot be read: {first_line(error)}"
            raise KdError(problem) from error
    return sum((path.parent / location).stat().st_size for location in locations)


def _check_work(path: Path, model: onnx.ModelProto) -> None:
    """Reject small files that expand without bound: loops, nested function calls, sparse weights."""
    for node in _messages(model, onnx.NodeProto):
        names = (node.op_type, node.domain, node.name, *node.input, *node.output)
        if not all(isinstance(name, str) for name in names):  # protobuf gives bytes that are not UTF-8
            raise KdError(f"{path} is damaged: the names of an operator are not text")
        if node.op_type in LOOPS:
            raise KdError(f"{path} holds a {node.op_type}", "kd reads classifiers, which need no loops.")
    for sparse in _messages(model, onnx.SparseTensorProto):
        if math.prod(sparse.dims) * 8 > MAX_BYTES:
            raise KdError(f"{path} claims weights of more than 2 GiB")
    functions = {(item.domain, item.name, item.overload): item for item in model.functions}
    sizes: dict[_FunctionKey, int] = {}

    def count_nodes(message: Message, callers: tuple[_FunctionKey, ...]) -> int:
        total = 0
        for node in _messages(message, onnx.NodeProto):
            key = (node.domain, node.op_type, node.overload)
            if key in callers or len(callers) > MAX_CALL_DEPTH:
                raise KdError(f"{path} holds functions that call each other without end")
            if key in functions and key not in sizes:
                sizes[key] = count_nodes(functions[key], (*callers, key))
            total += sizes.get(key, 1)
        return total

    if max(count_nodes(part, ()) for part in (model.graph, *model.functions)) > MAX_NODES:
        raise KdError(f"{path} holds more than {MAX_NODES:,} operations")


def _messages(message: Message, kind: type[_M]) -> Iterator[_M]:
    """All messages of a kind in any field at any depth (protobuf parses at most 100 levels)."""
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        for part in (value,) if isinstance(value, Message) else value:
            if isinstance(part, kind):
                yield part
            if not isinstance(part, onnx.TensorProto):
                yield from _messages(part, kind)
