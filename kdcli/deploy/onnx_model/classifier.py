"""ONNX files of unknown origin: reading within limits, and running as classifiers."""

import hashlib
import math
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
import torch
from google.protobuf.message import Message
from torch import Tensor

from kdcli.base.config import NO_ASSUMPTIONS, InputSettings
from kdcli.base.errors import KdError
from kdcli.base.files import check_pointer
from kdcli.base.text import first_line
from kdcli.data.preprocess import Preprocess
from kdcli.deploy.onnx_model.counts import CHANNELS, image_input, layout_of
from kdcli.deploy.onnx_model.metadata import assumed_preprocess, parse_metadata, recorded_crop
from kdcli.deploy.onnx_model.runner import OnnxRunner
from kdcli.models.foreign import explain

MAX_BYTES = 2**31 - 1  # one protobuf message cannot be larger
MAX_NODES = 1_000_000  # with functions expanded wherever they are called
MAX_CALL_DEPTH = 50
LOOPS = ("Loop", "Scan")
MAX_SIDE = 4096
MAX_BATCH = 4096
MAX_VALUES = 2**27  # of a fixed batch: 0.5 GB as float32
_FunctionKey = tuple[str, str, str]  # domain, name, overload
_M = TypeVar("_M", bound=Message)
_Size = tuple[int, int, int]
_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.UINT8)
# Operators that may follow a softmax: their outputs are still probabilities.
_SHAPE_ONLY = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
_KEEP_VALUES = ("Cast", "DequantizeLinear", "QuantizeLinear", *_SHAPE_ONLY)


@dataclass(frozen=True)
class OnnxClassifier:
    """An ONNX file with the interface of `kdcli.models.Classifier`."""

    path: Path
    classes: tuple[str, ...]  # names in the order of the logits; numbers if the file names none
    input_size: _Size  # (H, W, C) of the raw images
    provenance: dict[str, Any]  # origin as kd export recorded it, else empty
    metadata: dict[str, str]
    layout: str  # NCHW or NHWC
    dtype: np.dtype[Any]  # of its input; uint8 means raw images, RGB
    preprocess: Preprocess | None  # raw pixels → its input; None if unknown, or inside the file (uint8)
    gives: str  # logits or probabilities
    batch: int | None  # fixed number of images per call; None: any number
    runner: OnnxRunner = field(repr=False)
    model: onnx.ModelProto = field(repr=False)
    file_bytes: int  # of the file and of external files with its weights
    assumed: InputSettings  # by the user; what the file says is not in it
    file_sha256: str  # of the file, as it was read
    order: tuple[int, ...] | None = None  # of its outputs, where `classes` are in another order than these

    @classmethod
    def load(
        cls,
        path: Path,
        threads: int = 0,
        assumed: InputSettings = NO_ASSUMPTIONS,
        input_size: _Size | None = None,
        *,
        external: bool = False,
    ) -> Self:
        """Read a classifier.

        Args:
            path: any ONNX file with one image input, (N, C, H, W) or (N, H, W, C), uint8 or of a float type, whose
                first output is (N, classes).
            threads: CPU threads; 0: all available cores.
            assumed: what a file of another program leaves open; unread for a file of kd export.
            input_size: (H, W, C) of the images at hand, where file and `assumed` leave sides open.
            external: accept weights in other files of the same folder.

        Raises:
            KdError: unreadable, over 2 GiB, with loops, unbounded functions or weights in other files that are not
                accepted, or not an image classifier.
        """
        model, file_bytes, sha256 = _read(path, external=external)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        if "kd.format" in metadata:
            assumed = NO_ASSUMPTIONS
        layout, dtype, size, batch = _parse_input(path, model, assumed, input_size)
        runner = OnnxRunner(model.SerializeToString(), threads, str(path))
        blank = np.zeros(
            (batch or 1, *size), dtype
        )  # declared output shapes are often open: run black images
        output = runner.run(blank if layout == "NHWC" else np.ascontiguousarray(blank.transpose(0, 3, 1, 2)))
        count = output.size // len(blank)
        if count < 2 or not np.issubdtype(output.dtype, np.floating):
            raise KdError(
                f"{path} gives {output.dtype} {output.shape} for {len(blank)} images",
                "A classifier gives float (images, classes).",
            )
        classes, provenance, preprocess = parse_metadata(path, metadata, count)
        if "kd.format" not in metadata and dtype != np.uint8:
            preprocess = assumed_preprocess(assumed, size[2])
        return cls(
            path=path,
            classes=classes,
            input_size=size,
            provenance=provenance,
            metadata=metadata,
            layout=layout,
            dtype=dtype,
            preprocess=preprocess,
            gives="probabilities" if _ends_in_softmax(model) else "logits",
            batch=batch,
            runner=runner,
            model=model,
            file_bytes=file_bytes,
            assumed=assumed,
            file_sha256=sha256,
        )

    @property
    def why_not_runnable(self) -> str | None:
        """Why it cannot take raw images; None if it can."""
        if self.takes_pixels or self.preprocess is not None:
            return None
        if self.metadata.get("kd.format"):
            return "its preprocessing is too large to be in the file"
        return "no preprocessing recorded (mean, std, channel order)"

    @property
    def crop(self) -> float:
        """Share of the shorter side that images of another size are cropped to, see `data.decode.resize`."""
        return recorded_crop(self.path, self.metadata)

    @property
    def is_foreign(self) -> bool:
        """Whether another program made it."""
        return "kd.format" not in self.metadata

    @property
    def takes_pixels(self) -> bool:
        """Whether its input is raw images: its preprocessing is inside."""
        return self.dtype == np.uint8

    def __call__(self, images: Tensor) -> Tensor:
        """Raw images uint8 (B, H, W, C) → logits float32 (B, classes).

        Of a file that gives probabilities these are the logarithms: the logits up to a constant per image.

        Raises:
            KdError: its preprocessing is unknown.
        """
        outputs = torch.from_numpy(self.run(self.prepare(images)))
        tiny = torch.finfo(torch.float32).tiny
        logits = outputs if self.gives == "logits" else outputs.clamp_min(tiny).log()
        return logits if self.order is None else logits[:, list(self.order)]

    def prepare(self, images: Tensor) -> npt.NDArray[Any]:
        """Raw images uint8 (B, H, W, C) → the network's input."""
        if self.takes_pixels:
            return self.to_layout(images.numpy())
        if self.preprocess is None:
            raise KdError(
                f"{self.path} cannot take images: {self.why_not_runnable}",
                self._input_hint,
            )
        with torch.inference_mode():
            prepared = self.preprocess(images.permute(0, 3, 1, 2).float())  # (B, C, H, W)
        return self.to_layout(prepared.permute(0, 2, 3, 1).numpy())

    @property
    def _input_hint(self) -> str:
        if not self.is_foreign:
            return "Export it with kd export --with-preprocessing, or use the .pt file."
        flag = self.assumed.flag
        return (
            f"Set its input, (pixel · scale − mean) / std: as ImageNet's networks {flag('scale')} 1/255 "
            f"{flag('mean')} 0.485,0.456,0.406 {flag('std')} 0.229,0.224,0.225; 0–1 pixels: {flag('scale')} 1/255; "
            f"raw pixels: {flag('scale')} 1."
        )

    def to_layout(self, images: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Images (B, H, W, C) in the layout and type of its input, values unchanged."""
        ordered = images if self.layout == "NHWC" else images.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(ordered, self.dtype)

    def run(self, inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """The network's own input → its first output float32 (B, classes)."""
        outputs = self.runner.run(inputs)
        return outputs.reshape(len(inputs), -1).astype(np.float32)


def _parse_input(
    path: Path, model: onnx.ModelProto, assumed: InputSettings, data_size: _Size | None
) -> tuple[str, np.dtype[Any], _Size, int | None]:
    """Layout, type, (H, W, C) and fixed batch of the one image input."""
    hint = "kd runs files with one input: (N, C, H, W) or (N, H, W, C), uint8 or a float type."
    info = image_input(model)
    if info is None or info.type.tensor_type.elem_type not in _TYPES:
        raise KdError(f"{path} does not take images", hint)
    sides = [side.dim_value for side in info.type.tensor_type.shape.dim]  # 0: open
    layout = (assumed.layout or layout_of(info)).upper()
    batch, *size = sides if layout == "NHWC" else (sides[0], sides[2], sides[3], sides[1])
    side = assumed.image_size or 0
    for known in ((side, side, 0), data_size or (0, 0, 0)):
        size = [own or other for own, other in zip(size, known, strict=True)]
    height, width, channels = size
    if min(size) < 1:
        raise KdError(f"{path} does not fix the size of its images", "Export it with fixed height and width.")
    if max(height, width) > MAX_SIDE or channels not in CHANNELS:
        limits = f"Images have at most {MAX_SIDE:,} pixels a side and {max(CHANNELS)} channels."
        raise KdError(f"{path} takes images of {height}×{width}×{channels} in {layout} order", limits)
    if batch > MAX_BATCH or batch * math.prod(size) > MAX_VALUES:
        raise KdError(f"{path} takes {batch} images at a time", f"The limit is {MAX_BATCH:,} small ones.")
    dtype = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
    return layout, dtype, (height, width, channels), batch or None


def _ends_in_softmax(model: onnx.ModelProto) -> bool:
    producers = {name: node for node in model.graph.node for name in node.output}
    node = producers.get(model.graph.output[0].name)
    for _ in range(len(producers)):  # bounded: a hostile graph may have cycles
        if node is None or node.op_type not in _KEEP_VALUES or not node.input:
            break
        node = producers.get(node.input[0])
    return node is not None and node.op_type == "Softmax"


def _read(path: Path, *, external: bool) -> tuple[onnx.ModelProto, int, str]:
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
            "This command reads self-contained ONNX files; "
            "onnx.save_model(onnx.load(path), new_path) makes one.",
        )
    return model, len(content) + _load_external(path, outside), hashlib.sha256(content).hexdigest()


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
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        for part in (value,) if isinstance(value, Message) else value:
            if isinstance(part, kind):
                yield part
            if not isinstance(part, onnx.TensorProto):
                yield from _messages(part, kind)
