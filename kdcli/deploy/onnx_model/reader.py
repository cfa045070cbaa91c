"""Reading ONNX files of unknown origin."""

import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import onnx
from google.protobuf.message import Message

from kdcli.base.errors import KdError
from kdcli.base.text import first_line

MAX_BYTES = 2**31 - 1  # one protobuf message cannot be larger
MAX_NODES = 1_000_000  # with functions expanded wherever they are called
MAX_CALL_DEPTH = 50
LOOPS = ("Loop", "Scan")

_FunctionKey = tuple[str, str, str]  # domain, name, overload
_M = TypeVar("_M", bound=Message)


def read(path: Path, *, external: bool = False) -> tuple[onnx.ModelProto, int]:
    """Parse an ONNX file.

    Args:
        external: accept weights in other files of the same folder.

    Returns:
        The model with all of its weights, and the bytes of the file or files.

    Raises:
        KdError: missing, not ONNX, over 2 GiB, with loops or unbounded functions, or with weights in other files
            that are not accepted or cannot be read.
    """
    if not path.is_file():
        raise KdError(f"no such file: {path}")
    if path.stat().st_size > MAX_BYTES:
        raise KdError(f"{path} is larger than 2 GiB", "kd reads ONNX models that fit one protobuf message.")
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())  # load_model would go by the file's suffix
    except Exception as error:  # protobuf raises whatever the bytes provoke
        raise KdError(f"{path} is not an ONNX model: {first_line(error)}") from error
    if not model.graph.node or not model.graph.output:
        raise KdError(f"{path} is not an ONNX model: it holds no network")
    _check_work(path, model)
    outside = [
        tensor
        for tensor in _messages(model, onnx.TensorProto)
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data
    ]
    if outside and not external:
        raise KdError(
            f"{path} keeps weights in other files",
            "This command reads self-contained ONNX files; "
            "onnx.save_model(onnx.load(path), new_path) makes one.",
        )
    return model, path.stat().st_size + _load_external(path, outside)


def _load_external(path: Path, tensors: list[onnx.TensorProto]) -> int:
    """Load tensors from regular files in the model's own folder; returns the total size of these files."""
    sizes: dict[str, int] = {}
    total = path.stat().st_size
    for tensor in tensors:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        source = path.parent / location
        try:
            if "/" in location or "\\" in location or not stat.S_ISREG(source.lstat().st_mode):
                raise ValueError("it is not a plain file in the same folder")
            sizes[location] = source.stat().st_size
            offset = int(entries.get("offset", 0))
            length = int(entries.get("length", sizes[location] - offset))
            item = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            if offset < 0 or offset + length > sizes[location] or length != math.prod(tensor.dims) * item:
                raise ValueError(f"it does not hold the {list(tensor.dims)} values of {tensor.name[:60]!r}")
            total += length
            if total > MAX_BYTES:
                raise ValueError("model and weights together have more than 2 GiB")
            with source.open("rb") as handle:
                handle.seek(offset)
                tensor.raw_data = handle.read(length)
        except (OSError, ValueError, KeyError) as error:
            problem = f"{path} keeps weights in {location[:60]!r}, which cannot be read: {first_line(error)}"
            raise KdError(problem) from error
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.DEFAULT
    return sum(sizes.values())


def _check_work(path: Path, model: onnx.ModelProto) -> None:
    """Reject small files that expand without bound: loops, nested function calls, sparse weights."""
    for node in _messages(model, onnx.NodeProto):
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
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in (value,) if isinstance(value, Message) else value:
            if isinstance(part, kind):
                yield part
            if not isinstance(part, onnx.TensorProto):
                yield from _messages(part, kind)
