"""Reading ONNX files, and a session to run them."""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import onnx
import onnxruntime as ort
from google.protobuf.message import Message

from kdcli.base.errors import KdError
from kdcli.base.runtime import available_cores
from kdcli.base.text import first_line

MAX_BYTES = 2**31 - 1  # one protobuf message cannot be larger
MAX_NODES = 1_000_000  # with every function written out wherever it is called
MAX_CALL_DEPTH = 50
LOOPS = ("Loop", "Scan")

_M = TypeVar("_M", bound=Message)


def read(path: Path, *, external: bool = False) -> tuple[onnx.ModelProto, int]:
    """Parse an ONNX file.

    Args:
        external: also take weights from files that lie beside it. Without, such a model is refused.

    Returns:
        The model with all of its weights, and the bytes of the file or files.

    Raises:
        KdError: missing, not ONNX, over 2 GiB, or with weights where they may not be.
    """
    if not path.is_file():
        raise KdError(f"no such file: {path}" if not path.exists() else f"{path} is not a file")
    if path.stat().st_size > MAX_BYTES:
        raise KdError(f"{path} is larger than 2 GiB", "kd reads ONNX models that fit one protobuf message.")
    try:
        model = onnx.ModelProto.FromString(path.read_bytes())  # load_model would go by the file's suffix
    except OSError as error:
        raise KdError(f"cannot read {path}: {error.strerror or error}") from error
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
    return model, path.stat().st_size + _take_in(path, outside)


def _take_in(path: Path, tensors: list[onnx.TensorProto]) -> int:
    """Read tensors from the files beside a model that hold them; returns the bytes of these files.

    Raises:
        KdError: a location that is not a regular file in the model's own folder, or does not hold the tensor.
    """
    sizes: dict[Path, int] = {}
    total = 0
    for tensor in tensors:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        source = path.parent / location
        try:
            if "/" in location or "\\" in location or not stat.S_ISREG(source.lstat().st_mode):
                raise ValueError("it is not a plain file in the same folder")
            sizes[source] = source.stat().st_size
            offset = int(entries.get("offset", 0))
            length = int(entries.get("length", sizes[source] - offset))
            item = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            if offset < 0 or offset + length > sizes[source] or length != math.prod(tensor.dims) * item:
                raise ValueError(f"it does not hold the {list(tensor.dims)} values of {tensor.name[:60]!r}")
            total += length
            if total > MAX_BYTES:
                raise ValueError("all weights together have more than 2 GiB")
            with source.open("rb") as handle:
                handle.seek(offset)
                tensor.raw_data = handle.read(length)
        except (OSError, ValueError, KeyError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise KdError(
                f"{path} keeps weights in {location[:60]!r}, which cannot be read: {reason}"
            ) from error
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.DEFAULT
    return sum(sizes.values())


def serialized(path: Path, model: onnx.ModelProto) -> bytes:
    """A model as bytes.

    Raises:
        KdError: it does not fit one message, or memory.
    """
    try:
        return model.SerializeToString()
    except Exception as error:  # protobuf raises whatever the content provokes
        raise KdError(f"{path} cannot be laid out: {first_line(error)}") from error


LEVELS = {  # of onnxruntime's optimisation; each does what those before it do, and more
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def session(
    model: bytes, threads: int = 0, name: str = "model", *, level: str = "all"
) -> ort.InferenceSession:
    """An onnxruntime session on the CPU.

    Args:
        model: a serialised ModelProto: from bytes nothing beside the file can be reached.
        threads: 0: all available cores.
        name: what an error calls it.
        level: of optimisation, a name in `LEVELS`.

    Raises:
        KdError: onnxruntime refuses the model.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = LEVELS[level]
    options.log_severity_level = 4  # its errors are raised; a log line beside that would be a second message
    # idle threads would otherwise spin on after a run and slow down whatever is timed next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return ort.InferenceSession(
            model,
            options,
            providers=["CPUExecutionProvider"],
            enable_fallback=0,  # it would print, and try the same again
        )
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise KdError(f"onnxruntime cannot run {name}: {first_line(error)}") from error


def _check_work(path: Path, model: onnx.ModelProto) -> None:
    """Raise KdError for what makes a small file endless: loops, and functions that call each other over and over.

    Values that a file claims and does not hold are refused too, before anybody lays them out.
    """
    for node in _messages(model, onnx.NodeProto):
        if node.op_type in LOOPS:
            raise KdError(f"{path} holds a {node.op_type}", "kd reads classifiers, which need no loops.")
    for sparse in _messages(model, onnx.SparseTensorProto):
        if math.prod(sparse.dims) * 8 > MAX_BYTES:
            raise KdError(f"{path} claims weights of more than 2 GiB")
    functions = {(one.domain, one.name, one.overload): one for one in model.functions}
    sizes: dict[tuple[str, str, str], int] = {}

    def nodes_of(message: Message, within: tuple[tuple[str, str, str], ...]) -> int:
        total = 0
        for node in _messages(message, onnx.NodeProto):
            key = (node.domain, node.op_type, node.overload)
            if key in within or len(within) > MAX_CALL_DEPTH:
                raise KdError(f"{path} holds functions that call each other without end")
            if key in functions and key not in sizes:
                sizes[key] = nodes_of(functions[key], (*within, key))
            total += sizes.get(key, 1)
        return total

    if max(nodes_of(part, ()) for part in (model.graph, *model.functions)) > MAX_NODES:
        raise KdError(f"{path} holds more than {MAX_NODES:,} operations")


def _messages(message: Message, kind: type[_M]) -> Iterator[_M]:
    """All messages of a kind, at any depth (protobuf reads at most 100) and in any field; inner ones too."""
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for part in (value,) if isinstance(value, Message) else value:
            if isinstance(part, kind):
                yield part
            if not isinstance(part, onnx.TensorProto):
                yield from _messages(part, kind)
