"""Caffe's files → `Network`: what its layers are in the test phase, and the weights by layer name.

Nothing is trusted: sizes are checked against the file's length before an array is made, and what does not
parse is a KdError.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf import text_format, unknown_fields
from google.protobuf.message import DecodeError

from kdcli.base.errors import KdError
from kdcli.base.text import first_line
from kdcli.caffe import schema, v0

Array = npt.NDArray[np.float32]
Weights = dict[str, tuple[Array, ...]]  # layer name → its blobs

_MOST_BYTES = 2**31 - 1  # protobuf reads no more
_MOST_TEXT = 2**22  # seconds for the parser; the largest networks take a twentieth of it
_MOST_TEXT_MODEL = 2**26  # with its weights
_MOST_UNPACKED = 2_000_000
_TEST = 1

_V2_NAMES = {  # V1 enum → V2 type, where capitals do not give it
    "BNLL": "BNLL", "ARGMAX": "ArgMax", "ABSVAL": "AbsVal", "CONTRASTIVE_LOSS": "ContrastiveLoss",
    "DUMMY_DATA": "DummyData", "EUCLIDEAN_LOSS": "EuclideanLoss", "HDF5_DATA": "HDF5Data",
    "HDF5_OUTPUT": "HDF5Output", "HINGE_LOSS": "HingeLoss", "IM2COL": "Im2col", "IMAGE_DATA": "ImageData",
    "INFOGAIN_LOSS": "InfogainLoss", "INNER_PRODUCT": "InnerProduct", "LRN": "LRN",
    "MEMORY_DATA": "MemoryData", "MULTINOMIAL_LOGISTIC_LOSS": "MultinomialLogisticLoss", "MVN": "MVN",
    "RELU": "ReLU", "SIGMOID_CROSS_ENTROPY_LOSS": "SigmoidCrossEntropyLoss",
    "SOFTMAX_LOSS": "SoftmaxWithLoss", "TANH": "TanH", "WINDOW_DATA": "WindowData",
}  # fmt: skip
DATA_TYPES = {
    "Data", "ImageData", "HDF5Data", "MemoryData", "DummyData", "WindowData", "AnnotatedData", "Input",
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One layer: `type` is the V2 name, `param` the message, whose `*_param` fields V1 and V2 share."""

    name: str
    type: str
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]
    param: Any

    @property
    def is_data(self) -> bool:
        """Whether it brings images or labels: Caffe's own source layers, and what others wrote in their place."""
        own = self.type == "Python" or self.type.endswith("Data")
        return self.type in DATA_TYPES or (own and not self.bottoms)

    @property
    def is_loss(self) -> bool:
        """Whether it measures what others compute; `loss_weight` makes a layer of any type one."""
        measures = self.type.endswith("Loss") or self.type in ("Accuracy", "Silence", "HDF5Output")
        return measures or any(self.param.loss_weight)


@dataclass(frozen=True)
class Network:
    """A network as its file tells it.

    Attributes:
        layers: those of the test phase, in order.
        sources: data and input layers of any phase, those of the test phase first.
        inputs: blob name → (C, H, W) or None, for what `input` and Input layers declare.
    """

    name: str
    layers: tuple[Layer, ...]
    sources: tuple[Layer, ...]
    inputs: dict[str, tuple[int, ...] | None]


@dataclass(frozen=True)
class CaffeModel:
    """A caffemodel: the network recorded in it and its weights.

    Attributes:
        widely_read: whether it is what other readers take too: binary, V1 or V2, float32.
    """

    path: Path
    sha256: str
    network: Network
    weights: Weights
    widely_read: bool = True


def read_caffemodel(path: Path) -> CaffeModel:
    """Read a caffemodel, V0, V1 or V2, binary or as text.

    Raises:
        KdError: missing, too large, truncated, not a caffemodel, or blobs that are not of their shape.
    """
    content = read_bytes(path, _MOST_BYTES)
    message = schema.net_parameter()
    is_text = _is_text(content)
    try:
        if is_text:
            text = _decoded(content, path, _MOST_TEXT_MODEL)
            _check_length(len(_VALUES.sub("", text)), path, _MOST_TEXT)
            _parse_text(_packed(text), message, path)
        else:
            message.ParseFromString(content)
    except (DecodeError, ValueError, RecursionError) as error:
        raise KdError(
            f"{path} is not a whole caffemodel: {first_line(error)}", _kind_hint(content)
        ) from error
    if not message.layers and not message.layer:
        raise KdError(f"{path} is not a caffemodel: it holds no layers", _kind_hint(content))
    network = _network(message, path, recorded=True)
    blobs: Weights = {}
    for layer in _all_layers(message, path):
        if not layer.param.blobs:
            continue
        if layer.name in blobs:
            raise KdError(f"{path}: two layers named {layer.name} hold weights")
        where = f"{path}: layer {layer.name}"
        blobs[layer.name] = tuple(
            blob_array(b, f"{where}, blob {i}") for i, b in enumerate(layer.param.blobs)
        )
    if not blobs:
        raise KdError(
            f"{path} holds no weights",
            "This looks like a network without its training: name the caffemodel first, and this with --prototxt.",
        )
    usual = not is_text and not any(param.HasField("layer") for param in message.layers)
    usual = usual and not any(
        b.double_data for layer in (*message.layers, *message.layer) for b in layer.blobs
    )
    return CaffeModel(path, hashlib.sha256(content).hexdigest(), network, blobs, usual)


def read_prototxt(path: Path) -> Network:
    """Read a network's text form, V1 or V2; fields that kd does not know are skipped.

    Raises:
        KdError: missing, not text, or malformed; names the line.
    """
    message = schema.net_parameter()
    _parse_text(_decoded(read_bytes(path, _MOST_TEXT), path, _MOST_TEXT), message, path)
    if not message.layers and not message.layer:
        raise KdError(f"{path} holds no layers", "kd takes a deploy or train_val prototxt, not a solver.")
    return _network(message, path)


def _check_length(length: int, path: Path, most: int) -> None:
    if length > most:
        raise KdError(f"{path} is {length:,} bytes; kd reads at most {most:,} of text")


def _decoded(content: bytes, path: Path, most: int) -> str:
    _check_length(len(content), path, most)
    text = content.decode("utf-8-sig", "replace")  # comments may be in any encoding
    if "\0" in text:
        raise KdError(
            f"{path} is not a prototxt: it is not text", "--prototxt takes the network's text form."
        )
    return text


def _parse_text(text: str, message: Any, path: Path) -> None:
    try:
        text_format.Parse(text, message, allow_unknown_field=True)
    except text_format.ParseError as error:
        raise KdError(f"{path} is not a well-formed prototxt: line {first_line(error)}") from error
    except (ValueError, RecursionError, OverflowError) as error:
        raise KdError(f"{path} is not a well-formed prototxt: {first_line(error)}") from error


_NUMBER = r"[-+]?[0-9.][-+0-9.eE]*+f?"
_VALUES = re.compile(  # possessive and without a condition behind: no text makes it look twice at anything
    rf"\b(data|double_data|diff|double_diff)\s*+:\s*+(?:\[([-+0-9.eEf,\s]*+)\]|({_NUMBER}(?:\s++\1\s*+:\s*+{_NUMBER})*+))"
)


def _packed(text: str) -> str:
    """Weights as text, a value a line or a list, as the bytes that `schema` reads them as; differences go.

    Raises:
        ValueError: what stands for a number is none.
    """

    def packed(found: re.Match[str]) -> str:
        name, listed, lines = found.groups()
        if name.endswith("diff"):
            return ""
        words = (lines or listed or "").replace(name, " ").replace(":", " ").replace(",", " ").split()
        values = np.array(
            [float(word.rstrip("f")) for word in words], "<f8" if name == "double_data" else "<f4"
        )
        return f'{name}: "' + "".join(f"\\x{pair}" for pair in values.tobytes().hex(" ").split()) + '"'

    return _VALUES.sub(packed, text)


def read_mean(path: Path) -> Array:
    """`mean.binaryproto` → the mean image (C, H, W), in the network's channel order."""
    message = schema.blob_proto()
    try:
        message.ParseFromString(read_bytes(path, _MOST_TEXT_MODEL))
    except (DecodeError, RecursionError) as error:
        raise KdError(f"{path} is not a mean image: {first_line(error)}") from error
    mean = blob_array(message, str(path))
    if mean.ndim == 4 and mean.shape[0] == 1:
        mean = mean[0]
    if mean.ndim != 3:
        raise KdError(f"{path}: a mean image is C×H×W, this is {mean.shape}")
    return mean


def read_bytes(path: Path, most: int) -> bytes:
    """A file's content, if it is a file of at most `most` bytes."""
    if not path.exists():
        raise KdError(f"no such file: {path}")
    if not path.is_file():
        raise KdError(f"{path} is not a file")
    size = path.stat().st_size
    if size > most:
        raise KdError(f"{path} is {size:,} bytes; kd reads at most {most:,}")
    if not size:
        raise KdError(f"{path} is empty")
    return path.read_bytes()


def weights_sha256(weights: Weights) -> str:
    """SHA-256 over names, shapes without leading ones, float32 values: the same in every encoding."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        for blob in weights[name]:
            digest.update(repr((name, squeezed(blob.shape))).encode())
            digest.update(np.ascontiguousarray(blob, dtype="<f4").tobytes())
    return digest.hexdigest()


def squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    """A shape without leading ones: V1 wrote (1, 1, 1, N) where V2 writes (N,)."""
    sides = tuple(shape)
    while len(sides) > 1 and sides[0] == 1:
        sides = sides[1:]
    return sides


def blob_array(blob: Any, where: str) -> Array:
    """BlobProto → float32 array; the product of the shape must be the number of values.

    Raises:
        KdError: no values, a shape that does not fit them, or values that are not finite.
    """
    if blob.HasField("shape"):
        shape = tuple(int(side) for side in blob.shape.dim)
    else:
        shape = (blob.num, blob.channels, blob.height, blob.width)
    if len(shape) > 32:
        raise KdError(f"{where}: a shape of {len(shape)} numbers")
    if any(side < 1 for side in shape):
        raise KdError(f"{where}: shape {shape} is not positive")
    kind, raw = ("<f8", b"".join(blob.double_data)) if blob.double_data else ("<f4", b"".join(blob.data))
    if not raw:
        kind, raw = _unpacked(blob, where)
    width = np.dtype(kind).itemsize
    if math.prod(shape) * width != len(raw):
        raise KdError(
            f"{where}: shape {shape} wants {math.prod(shape):,} values, it has {len(raw) / width:,g}"
        )
    values = np.frombuffer(raw, dtype=kind).reshape(shape).astype(np.float32)
    if not np.isfinite(values).all():
        raise KdError(f"{where}: some values are not finite")
    return values


def _unpacked(blob: Any, where: str) -> tuple[str, bytes]:
    """Values one by one: legal, if unusual; they come as unknown fields because bytes are declared."""
    found: dict[int, list[int]] = {5: [], 8: []}
    fields: Any = unknown_fields.UnknownFieldSet(blob)
    if len(fields) > _MOST_UNPACKED:  # an object each
        raise KdError(f"{where}: {len(fields):,} values one by one; kd reads up to {_MOST_UNPACKED:,} so")
    for entry in fields:
        if (entry.field_number, entry.wire_type) in ((5, 5), (8, 1)):
            found[entry.field_number].append(entry.data)
    if found[8]:
        return "<f8", np.array(found[8], dtype="<u8").tobytes()
    return "<f4", np.array(found[5], dtype="<u4").tobytes()


def _all_layers(message: Any, path: Path) -> list[Layer]:
    if message.layers and message.layer:
        raise KdError(
            f"{path} holds both `layer` and `layers`", "A network is written in one form or the other."
        )
    layers = []
    params = v0.upgraded(message.layers, path) if message.layers else message.layer
    for number, param in enumerate(params):
        kind = _text(param.type) if message.layer else _v2_type(schema.v1_type_name(param.type))
        name = _text(param.name) or f"layer {number + 1}"
        bottoms, tops = (tuple(map(_text, blobs)) for blobs in (param.bottom, param.top))
        layers.append(Layer(name, kind, bottoms, tops, param))
    return layers


def _text(value: str | bytes) -> str:
    """protobuf gives bytes for a string that is not UTF-8."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _v2_type(v1: str) -> str:
    return _V2_NAMES.get(v1, v1.title().replace("_", ""))


def _network(message: Any, path: Path, *, recorded: bool = False) -> Network:
    every = _all_layers(message, path)
    state = message.state
    tested = [layer for layer in every if _in_test(layer, state)]
    sources = [layer for layer in tested if layer.is_data]
    sources += [layer for layer in every if layer.is_data and not _in_test(layer, state)]
    if recorded:  # a solver saves the layers of training alone: the test phase's twins of some are not there
        names = {layer.name for layer in tested}
        read = {blob for layer in tested for blob in layer.bottoms}
        twins = [layer.name not in names and not read.isdisjoint(layer.tops) for layer in every]
        tested = [
            layer
            for layer, twin in zip(every, twins, strict=True)
            if _in_test(layer, state) or (twin and layer.param.blobs)
        ]
    inputs: dict[str, tuple[int, ...] | None] = {}
    for number, name in enumerate(message.input):
        shape: tuple[int, ...] | None = None
        if len(message.input_shape) > number:
            shape = _without_batch(message.input_shape[number].dim)
        elif len(message.input_dim) >= 4 * (number + 1):
            shape = _without_batch(message.input_dim[4 * number : 4 * number + 4])
        inputs[_text(name)] = shape
    for layer in sources:
        for number, top in enumerate(layer.tops):
            inputs.setdefault(top, _declared_shape(layer, number))
    return Network(_text(message.name), tuple(tested), tuple(sources), inputs)


def _without_batch(dims: Iterable[int]) -> tuple[int, ...] | None:
    sides = tuple(int(side) for side in dims)
    return sides[1:] if len(sides) == 4 else None


def _declared_shape(layer: Layer, number: int) -> tuple[int, ...] | None:
    param = layer.param
    if layer.type == "Input" and param.input_param.shape:
        shapes = param.input_param.shape
        return _without_batch(shapes[min(number, len(shapes) - 1)].dim)
    if layer.type == "MemoryData" and number == 0:
        memory = param.memory_data_param
        return (int(memory.channels), int(memory.height), int(memory.width))
    if layer.type == "DummyData":
        dummy = param.dummy_data_param
        if dummy.shape:
            return _without_batch(dummy.shape[min(number, len(dummy.shape) - 1)].dim)
        sides = (dummy.channels, dummy.height, dummy.width)
        if all(sides):
            channels, height, width = (int(side[min(number, len(side) - 1)]) for side in sides)
            return channels, height, width
    return None


def _in_test(layer: Layer, state: Any) -> bool:
    """Caffe's rule: included if any `include` holds, or no `exclude` does; in the test phase, with the level and the
    stages that the file's own `state` names (0 and none if it names none)."""
    if layer.param.include:
        return any(_holds(rule, state) for rule in layer.param.include)
    return not any(_holds(rule, state) for rule in layer.param.exclude)


def _holds(rule: Any, state: Any) -> bool:
    if rule.HasField("phase") and rule.phase != _TEST:
        return False
    if (rule.HasField("min_level") and state.level < rule.min_level) or (
        rule.HasField("max_level") and state.level > rule.max_level
    ):
        return False
    stages = set(state.stage)
    return stages.issuperset(rule.stage) and stages.isdisjoint(rule.not_stage)


def _kind_hint(content: bytes) -> str:
    if content.startswith(b"\x89HDF"):
        return "It is HDF5; kd reads binary caffemodels: save it from Caffe as snapshot_format BINARYPROTO."
    if content.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "It looks like a zip or PyTorch file; kd convert-caffe reads .caffemodel and caffe-tensorflow .npy."
    return "Is the download complete, and the name right?"


def _is_text(content: bytes) -> bool:
    """Whether it reads as a network's text form; a binary one begins with a byte below the blank, or a tag."""
    head = content[:4096]
    return b"layer" in head and all(byte in b"\t\n\r" or byte >= 32 for byte in head)
