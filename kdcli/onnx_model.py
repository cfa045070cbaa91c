"""Classifiers in ONNX files: what kd wrote into them, what can be told of anybody's, and running them.

A file that `kd export` wrote says in its metadata what it takes and gives, and how its pixels are prepared.
Of any other file only its input and output are known.
"""

from __future__ import annotations

import base64
import json
import math
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from torch import Tensor

from kdcli.errors import KdError
from kdcli.preprocess import Preprocess, from_spec
from kdcli.runtime import available_cores

FORMAT = "kd-onnx-1"
MAX_BYTES = 2**31 - 1  # one protobuf message cannot be larger
PREPROCESSING = "preprocess/"  # kd export names the nodes that prepare pixels so
_CHANNELS = (1, 2, 3, 4)
_Floats = npt.NDArray[np.float32]


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
        model = onnx.load_model(path, load_external_data=False)
    except OSError as error:
        raise KdError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # protobuf raises whatever the bytes provoke
        raise KdError(f"{path} is not an ONNX model: {_first_line(error)}") from error
    if not model.graph.node or not model.graph.output:
        raise KdError(f"{path} is not an ONNX model: it holds no network")
    outside = [tensor for tensor in _all_tensors(model) if tensor.data_location == onnx.TensorProto.EXTERNAL]
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


def session(model: bytes, threads: int = 0, name: str = "model") -> ort.InferenceSession:
    """An onnxruntime session on the CPU.

    Args:
        model: a serialised ModelProto: from bytes nothing beside the file can be reached.
        threads: 0: all available cores.
        name: what an error calls it.

    Raises:
        KdError: onnxruntime refuses the model.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # its errors are raised; a log line beside that would be a second message
    # idle threads would otherwise spin on after a run and slow down whatever is timed next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise KdError(f"onnxruntime cannot run {name}: {_first_line(error)}") from error


@dataclass(frozen=True)
class OnnxClassifier:
    """An ONNX file with the face of `kdcli.models.Classifier`.

    Attributes:
        path: the file.
        classes: class names in the order of the logits; numbers if the file does not say.
        input_size: (H, W, C) of the raw images.
        provenance: what kd export wrote of its origin, else empty.
        metadata: all the file's own remarks.
        layout: `NCHW` float32 prepared input, or `NHWC` uint8 raw images.
        preprocess: raw pixels → its input; None where it is not known (or not needed: `NHWC`).
        gives: `logits` or `probabilities`.
        one_by_one: its batch is fixed at 1, so that images are run singly.
        session: runs it.
        model: the parsed file.
        file_bytes: of the file, and of those beside it that hold its weights.
    """

    path: Path
    classes: tuple[str, ...]
    input_size: tuple[int, int, int]
    provenance: dict[str, Any]
    metadata: dict[str, str]
    layout: str
    preprocess: Preprocess | None
    gives: str
    one_by_one: bool
    session: ort.InferenceSession = field(repr=False)
    model: onnx.ModelProto = field(repr=False)
    file_bytes: int

    @classmethod
    def load(
        cls,
        path: Path,
        threads: int = 0,
        input_size: tuple[int, int, int] | None = None,
        *,
        external: bool = False,
    ) -> OnnxClassifier:
        """Read and prepare a classifier for inference.

        Args:
            path: any ONNX file with one image input, float32 (N, C, H, W) or uint8 (N, H, W, C), whose first
                output is (N, classes).
            threads: CPU threads; 0: all available cores.
            input_size: (H, W, C) to assume where the file leaves height and width open.
            external: also take weights from files that lie beside it.

        Raises:
            KdError: unreadable, over 2 GiB, with weights in other files, or not an image classifier.
        """
        model, file_bytes = read(path, external=external)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        layout, size = _input_of(path, model, input_size)
        one_by_one = _batch_is_one(path, model)
        runner = session(model.SerializeToString(), threads, str(path))
        count = _class_count(path, runner, layout, size)
        classes, provenance, preprocess = _remarks(path, metadata, count)
        return cls(
            path=path,
            classes=classes,
            input_size=size,
            provenance=provenance,
            metadata=metadata,
            layout=layout,
            preprocess=preprocess,
            gives="probabilities" if _ends_in_softmax(model) else "logits",
            one_by_one=one_by_one,
            session=runner,
            model=model,
            file_bytes=file_bytes,
        )

    @property
    def why_not_runnable(self) -> str | None:
        """Why raw images cannot be given to it; None if they can."""
        if self.layout == "NHWC" or self.preprocess is not None:
            return None
        if self.metadata.get("kd.format"):
            return "its preprocessing is too large to be in the file"
        return "it does not say how pixels are prepared"

    def __call__(self, images: Tensor) -> Tensor:
        """Raw images uint8 (B, H, W, C) → logits float32 (B, classes).

        Of a file that gives probabilities these are the logarithms: the logits up to a constant per image.

        Raises:
            KdError: how to prepare the pixels is not known.
        """
        outputs = torch.from_numpy(self.run(self.prepare(images)))
        if self.gives == "logits":
            return outputs
        return outputs.clamp_min(torch.finfo(torch.float32).tiny).log()

    def prepare(self, images: Tensor) -> npt.NDArray[Any]:
        """Raw images uint8 (B, H, W, C) → the array the network takes."""
        if self.layout == "NHWC":
            return np.ascontiguousarray(images.numpy())
        if self.preprocess is None:
            raise KdError(
                f"{self.path} cannot be given images: {self.why_not_runnable}",
                "Export it with kd export --with-preprocessing, or use the .pt file.",
            )
        with torch.inference_mode():
            prepared = self.preprocess(images.permute(0, 3, 1, 2).float())
            return np.ascontiguousarray(prepared.numpy())

    def run(self, inputs: npt.NDArray[Any]) -> _Floats:
        """The network's own input → its first output (B, classes)."""
        if self.one_by_one and len(inputs) > 1:
            return np.concatenate([self.run(inputs[index : index + 1]) for index in range(len(inputs))])
        try:
            outputs = self.session.run(None, {self.session.get_inputs()[0].name: inputs})[0]
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            raise KdError(
                f"onnxruntime cannot run {self.path} on {len(inputs)} images: {_first_line(error)}"
            ) from error
        return np.asarray(outputs, dtype=np.float32).reshape(len(inputs), -1)


def encode_preprocess(preprocess: Preprocess, most_values: int = 16_384) -> str:
    """JSON of `Preprocess.spec()`; `state`: shapes and base64 of little-endian float32, null if too large."""
    spec = preprocess.spec()
    state: dict[str, Any] | None = None
    if sum(value.numel() for value in spec["state"].values()) <= most_values:
        state = {
            name: {
                "shape": list(value.shape),
                "float32": base64.b64encode(value.detach().numpy().astype("<f4").tobytes()).decode("ascii"),
            }
            for name, value in spec["state"].items()
        }
    return json.dumps({"name": spec["name"], "args": spec["args"], "state": state}, sort_keys=True)


def decode_preprocess(text: str) -> Preprocess | None:
    """The inverse of `encode_preprocess`; None if the values were left out.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RuntimeError, KdError: the text is not what
            `encode_preprocess` writes.
    """
    spec = json.loads(text)
    if spec["state"] is None:
        return None
    state = {}
    for name, value in spec["state"].items():
        numbers = np.frombuffer(base64.b64decode(value["float32"]), "<f4").astype(np.float32)
        state[name] = torch.from_numpy(numbers).reshape([int(side) for side in value["shape"]])
    return from_spec({"name": spec["name"], "args": dict(spec["args"]), "state": state})


@dataclass(frozen=True)
class Facts:
    """What can be counted in an ONNX file.

    Attributes:
        parameters: values in weight tensors; quantisation scales and shapes are not counted.
        network_bytes: all constants of the network.
        preprocessing_bytes: constants of the preprocessing inside the file.
        macs: multiply-accumulates of one image in the network's Conv, Gemm and MatMul; None if not known.
        operators: kinds of nodes.
    """

    parameters: int
    network_bytes: int
    preprocessing_bytes: int
    macs: int | None
    operators: tuple[str, ...]


def facts(model: onnx.ModelProto, input_size: tuple[int, int, int] | None = None) -> Facts:
    """Count a model's values, bytes and work. `input_size` (H, W, C) fills open sides of its input."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    constants[node.output[0]] = attribute.t
    of_network: set[str] = set()
    helpers: set[str] = set()  # scales and zero points
    for node in model.graph.node:
        if not node.name.startswith(PREPROCESSING):
            of_network.update(node.input)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            helpers.update(node.input[1:])
    parameters = network_bytes = preprocessing_bytes = 0
    for name, tensor in constants.items():
        count = math.prod(tensor.dims)
        size = count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        if name not in of_network:
            preprocessing_bytes += size
            continue
        network_bytes += size
        if name not in helpers and tensor.data_type != onnx.TensorProto.INT64:
            parameters += count
    return Facts(
        parameters=parameters,
        network_bytes=network_bytes,
        preprocessing_bytes=preprocessing_bytes,
        macs=_macs(model, input_size),
        operators=tuple(sorted({node.op_type for node in model.graph.node})),
    )


def _macs(model: onnx.ModelProto, input_size: tuple[int, int, int] | None) -> int | None:
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    _fix_input(fixed, input_size)
    try:
        inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    except Exception:  # a shape it cannot infer leaves the work unknown, which is what None says
        return None
    shapes = {tensor.name: tuple(tensor.dims) for tensor in inferred.graph.initializer}
    for info in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        sides = info.type.tensor_type.shape.dim
        if all(side.HasField("dim_value") for side in sides):
            shapes[info.name] = tuple(side.dim_value for side in sides)
    total = 0
    for node in inferred.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.name.startswith(PREPROCESSING):
            continue
        if any(name not in shapes for name in (*node.input[:2], node.output[0])):
            return None
        outputs = math.prod(shapes[node.output[0]])
        if node.op_type == "Conv":
            total += outputs * math.prod(shapes[node.input[1]][1:])  # weight (M, C/groups, kernel …)
        else:
            transposed = any(a.name == "transA" and a.i for a in node.attribute)
            total += outputs * shapes[node.input[0]][-2 if transposed else -1]
    return total


def _fix_input(model: onnx.ModelProto, input_size: tuple[int, int, int] | None) -> None:
    info = _image_input(model)
    if info is None or len(info.type.tensor_type.shape.dim) != 4:
        return
    sides = info.type.tensor_type.shape.dim
    sides[0].dim_value = 1
    if input_size is not None:
        height, width, channels = input_size
        raw = info.type.tensor_type.elem_type == onnx.TensorProto.UINT8
        values = (height, width, channels) if raw else (channels, height, width)
        for side, value in zip(sides[1:], values, strict=True):
            side.dim_value = value
    for output in model.graph.output:  # a named batch side would contradict the 1
        output.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]


def _image_input(model: onnx.ModelProto) -> onnx.ValueInfoProto | None:
    constants = {tensor.name for tensor in model.graph.initializer}  # old files list weights as inputs
    inputs = [info for info in model.graph.input if info.name not in constants]
    return inputs[0] if len(inputs) == 1 else None


def _input_of(
    path: Path, model: onnx.ModelProto, assumed: tuple[int, int, int] | None
) -> tuple[str, tuple[int, int, int]]:
    """Layout and (H, W, C) of the one image input."""
    info = _image_input(model)
    hint = "kd runs files with one input: float32 (N, C, H, W) or uint8 (N, H, W, C)."
    if info is None:
        raise KdError(f"{path} does not have exactly one input", hint)
    kind = info.type.tensor_type.elem_type
    sides = [side.dim_value for side in info.type.tensor_type.shape.dim]  # 0: open
    if len(sides) != 4 or kind not in (onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8):
        raise KdError(f"{path} does not take images", hint)
    layout = "NHWC" if kind == onnx.TensorProto.UINT8 else "NCHW"
    height, width, channels = sides[1:] if layout == "NHWC" else (sides[2], sides[3], sides[1])
    if assumed is not None:
        height, width, channels = (
            own or other for own, other in zip((height, width, channels), assumed, strict=True)
        )
    if min(height, width, channels) < 1:
        raise KdError(
            f"{path} does not fix the size of its images", "Export it with a fixed height and width."
        )
    if channels not in _CHANNELS:
        raise KdError(f"{path} takes {channels} channels in {layout} order, which is no image", hint)
    return layout, (height, width, channels)


def _batch_is_one(path: Path, model: onnx.ModelProto) -> bool:
    info = _image_input(model)
    batch = info.type.tensor_type.shape.dim[0].dim_value if info is not None else 0  # 0: open
    if batch > 1:
        raise KdError(
            f"{path} takes {batch} images at a time, no more and no fewer", "Export it with an open batch."
        )
    return batch == 1


def _class_count(path: Path, runner: ort.InferenceSession, layout: str, size: tuple[int, int, int]) -> int:
    """Found by running one black image: declared output shapes are often open."""
    height, width, channels = size
    shape = (1, height, width, channels) if layout == "NHWC" else (1, channels, height, width)
    black = np.zeros(shape, np.uint8 if layout == "NHWC" else np.float32)
    try:
        outputs = runner.run(None, {runner.get_inputs()[0].name: black})
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        raise KdError(f"onnxruntime cannot run {path}: {_first_line(error)}") from error
    first = np.asarray(outputs[0])
    if first.shape[:1] != (1,) or first.size < 2 or not np.issubdtype(first.dtype, np.floating):
        raise KdError(
            f"{path} gives {first.dtype} {first.shape} for one image",
            "A classifier gives float (1, classes).",
        )
    return int(first.size)


def _remarks(
    path: Path, metadata: dict[str, str], count: int
) -> tuple[tuple[str, ...], dict[str, Any], Preprocess | None]:
    """Class names, provenance and preprocessing as kd export wrote them, or what stands in for them."""
    numbers = tuple(str(index) for index in range(count))
    if "kd.format" not in metadata:
        return numbers, {}, None
    if metadata["kd.format"] != FORMAT:
        raise KdError(
            f"{path} was written by a newer kd ({metadata['kd.format'][:40]})", "pip install --upgrade kdcli"
        )
    try:
        classes = tuple(str(name) for name in json.loads(metadata["kd.classes"]))
        provenance = dict(json.loads(metadata["kd.provenance"]))
        preprocess = decode_preprocess(metadata["kd.preprocess"])
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, KdError) as error:
        raise KdError(f"{path}: its metadata is damaged: {_first_line(error)}", "Export it again.") from error
    if len(classes) != count:
        raise KdError(f"{path} names {len(classes)} classes and gives {count} values", "Export it again.")
    return classes, provenance, preprocess


# What may follow a softmax without making something else of it.
_KEEPS_VALUES = (
    *("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Cast"),
    *("QuantizeLinear", "DequantizeLinear"),
)


def _ends_in_softmax(model: onnx.ModelProto) -> bool:
    makers = {name: node for node in model.graph.node for name in node.output}
    node = makers.get(model.graph.output[0].name)
    for _ in range(len(makers)):  # a hostile graph may go in circles
        if node is None or node.op_type not in _KEEPS_VALUES or not node.input:
            break
        node = makers.get(node.input[0])
    return node is not None and node.op_type == "Softmax"


def _all_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from _node_tensors(function.node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield sparse.values
        yield sparse.indices
    yield from _node_tensors(graph.node)


def _node_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
            for sub in (attribute.g, *attribute.graphs):
                yield from _graph_tensors(sub)


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
