"""Caffe's files → `Network` (the layers of the test phase) and weights by layer name.

The files are untrusted: their size is bounded, and a file that does not parse raises KdError.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from google.protobuf.message import DecodeError

from kdcli.base.errors import KdError
from kdcli.base.text import first_line
from kdcli.caffe import schema
from kdcli.caffe.blobs import Array, Weights, blob_array

_MAX_BYTES = 2**31 - 1  # protobuf's own limit
_MAX_TEXT = (
    2**22
)  # bounds the parser's time to seconds; the largest published networks have a twentieth of it
_MAX_MEAN = 2**26
_TEST = 1  # Phase.TEST
_FORMATS = (
    "kd reads whole binary caffemodels (snapshot_format BINARYPROTO, not HDF5) and caffe-tensorflow's .npy."
)

_V1_TYPES = tuple(schema.V1_TYPES.values())
_DATA_TYPES = {
    "Data", "ImageData", "HDF5Data", "MemoryData", "DummyData", "WindowData", "AnnotatedData", "Input",
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One layer: `type` is the V2 name; `param` is the message, whose `*_param` fields V1 and V2 share."""

    name: str
    type: str
    bottoms: tuple[str, ...]
    tops: tuple[str, ...]
    param: Any

    @property
    def is_data(self) -> bool:
        """Whether it produces images or labels: Caffe's data layers and user-defined ones without inputs."""
        user_defined = self.type == "Python" or self.type.endswith("Data")
        return self.type in _DATA_TYPES or (user_defined and not self.bottoms)

    @property
    def is_loss(self) -> bool:
        """Whether it measures or stores outputs; a `loss_weight` makes a layer of any type a loss."""
        return (
            self.type.endswith("Loss")
            or self.type in ("Accuracy", "Silence", "HDF5Output")
            or any(self.param.loss_weight)
        )


@dataclass(frozen=True)
class Network:
    """A network definition.

    Attributes:
        layers: layers of the test phase, in order.
        sources: data and input layers of any phase, those of the test phase first.
        inputs: blob name → (C, H, W), or None where `input` or an Input layer declares no such shape.
    """

    name: str
    layers: tuple[Layer, ...]
    sources: tuple[Layer, ...]
    inputs: dict[str, tuple[int, ...] | None]


@dataclass(frozen=True)
class CaffeModel:
    """A caffemodel: the network definition stored in it and its weights."""

    sha256: str
    network: Network
    weights: Weights


def read_caffemodel(path: Path) -> CaffeModel:
    """Read a binary caffemodel, V1 or V2.

    Raises:
        KdError: missing, too large, truncated, not a binary caffemodel of V1 or V2, or blobs whose values do not
            match their shape.
    """
    content = read_bytes(path, _MAX_BYTES)
    if _is_textual(content):
        if b"blobs" in content:
            raise KdError(
                f"{path} is a caffemodel written as text; kd reads binary ones",
                "Encode it with Caffe's caffe.proto: protoc --encode=caffe.NetParameter caffe.proto. "
                "(Caffe's upgrade_net_proto_text upgrades an old text file first.)",
            )
        raise KdError(
            f"{path} is a prototxt: it holds no weights",
            "Pass the caffemodel first, and this file with --prototxt.",
        )
    message = schema.net_parameter()
    try:
        message.ParseFromString(content)
    except (DecodeError, RecursionError) as error:
        raise KdError(f"{path} is not a whole caffemodel: {first_line(error)}", _FORMATS) from error
    if not message.layers and not message.layer:
        raise KdError(f"{path} is not a caffemodel: it holds no layers", _FORMATS)
    layers = _all_layers(message, path)
    weights: Weights = {}
    for layer in layers:
        if layer.param.blobs and layer.name in weights:
            raise KdError(f"{path}: two layers named {layer.name} hold weights")
        if layer.param.blobs:
            context = f"{path}: layer {layer.name}, blob"
            blobs = (blob_array(blob, f"{context} {n}") for n, blob in enumerate(layer.param.blobs))
            weights[layer.name] = tuple(blobs)
    if not weights:
        raise KdError(f"{path} holds no weights", "Pass the file that Caffe saved after training.")
    network = _network(message, layers, snapshot=True)
    return CaffeModel(hashlib.sha256(content).hexdigest(), network, weights)


def read_prototxt(path: Path) -> Network:
    """Read a network definition in text form, V1 or V2; unknown fields are skipped.

    Raises:
        KdError: missing, not text, or malformed; names the line.
    """
    content = read_bytes(path, _MAX_TEXT).decode("utf-8-sig", "replace")  # comments may be in any encoding
    if "\0" in content:
        raise KdError(f"{path} is not a prototxt: it is not text", "Pass the network's text form.")
    message = schema.net_parameter()
    try:
        text_format.Parse(content, message, allow_unknown_field=True)
    except text_format.ParseError as error:
        raise KdError(f"{path} is not a well-formed prototxt: line {first_line(error)}") from error
    except (ValueError, RecursionError, OverflowError) as error:
        raise KdError(f"{path} is not a well-formed prototxt: {first_line(error)}") from error
    if not message.layers and not message.layer:
        raise KdError(f"{path} holds no layers", "kd takes a deploy or train_val prototxt, not a solver.")
    return _network(message, _all_layers(message, path), snapshot=False)


def read_mean(path: Path) -> Array:
    """`mean.binaryproto` → the mean image (C, H, W), in the network's channel order."""
    message = schema.blob_proto()
    try:
        message.ParseFromString(read_bytes(path, _MAX_MEAN))
    except (DecodeError, RecursionError) as error:
        raise KdError(f"{path} is not a mean image: {first_line(error)}") from error
    mean = blob_array(message, str(path))
    if mean.ndim == 4 and mean.shape[0] == 1:
        mean = mean[0]
    if mean.ndim != 3:
        raise KdError(f"{path}: a mean image is C×H×W, this is {mean.shape}")
    return mean


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes."""
    if not path.is_file():
        raise KdError(f"no such file: {path}")
    size = path.stat().st_size
    if size > limit:
        raise KdError(f"{path} is {size:,} bytes; kd reads at most {limit:,}")
    return path.read_bytes()


def _all_layers(message: Any, path: Path) -> list[Layer]:
    """Layers of every phase, with V2's type names."""
    if message.layers and message.layer:
        raise KdError(
            f"{path} holds both `layer` and `layers`", "A network is written in one form or the other."
        )
    if any(param.HasField("layer") for param in message.layers):
        raise KdError(
            f"{path} is in Caffe's V0 format, which kd does not read",
            "Upgrade it with Caffe's own tool: upgrade_net_proto_binary OLD.caffemodel NEW.caffemodel, "
            "or upgrade_net_proto_text OLD.prototxt NEW.prototxt.",
        )
    layers = []
    for number, param in enumerate(message.layers or message.layer):
        kind = _V1_TYPES[param.type] if message.layers else text(param.type)
        name = text(param.name) or f"layer {number + 1}"
        bottoms, tops = (tuple(map(text, blobs)) for blobs in (param.bottom, param.top))
        layers.append(Layer(name, kind, bottoms, tops, param))
    return layers


def text(value: object) -> str:
    """A name as text; protobuf returns bytes where it is not UTF-8, Python 2's pickles hold bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _network(message: Any, every: Sequence[Layer], *, snapshot: bool) -> Network:
    """The test phase of a network of these layers.

    Args:
        snapshot: whether a solver saved it. It records only the layers of training, so that a layer with weights
            that is marked for training, and whose output the test phase reads, stands for its missing twin.
    """
    tested = [_is_included(layer, message.state) for layer in every]
    names = {layer.name for layer, test in zip(every, tested, strict=True) if test}
    read = {blob for layer, test in zip(every, tested, strict=True) if test for blob in layer.bottoms}

    def is_missing(layer: Layer) -> bool:
        return bool(layer.param.blobs) and layer.name not in names and not read.isdisjoint(layer.tops)

    layers = tuple(
        layer for layer, test in zip(every, tested, strict=True) if test or (snapshot and is_missing(layer))
    )
    # Sources of the test phase come first: their sizes win
    order = sorted(zip(tested, every, strict=True), key=lambda pair: not pair[0])
    sources = tuple(layer for _, layer in order if layer.is_data)
    inputs: dict[str, tuple[int, ...] | None] = {}
    for number, name in enumerate(message.input):
        sides = message.input_dim[4 * number : 4 * number + 4]
        if len(message.input_shape) > number:
            sides = message.input_shape[number].dim
        inputs[text(name)] = _without_batch(sides)
    for layer in sources:
        for number, top in enumerate(layer.tops):
            inputs.setdefault(top, _declared_shape(layer, number))
    return Network(text(message.name), layers, sources, inputs)


def _without_batch(sides: Iterable[int]) -> tuple[int, ...] | None:
    """(N, C, H, W) → (C, H, W); None for another number of axes."""
    shape = tuple(int(side) for side in sides)
    return shape[1:] if len(shape) == 4 else None


def _declared_shape(layer: Layer, number: int) -> tuple[int, ...] | None:
    """(C, H, W) of a source's output `number`; of repeated fields, the last holds for all further outputs."""
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
        sides = (dummy.num, dummy.channels, dummy.height, dummy.width)
        return _without_batch(side[min(number, len(side) - 1)] for side in sides if side)
    return None


def _is_included(layer: Layer, state: Any) -> bool:
    """Caffe's rule for the test phase: any `include` rule matches, or, without `include`, no `exclude` rule does."""
    if layer.param.include:
        return any(_matches(rule, state) for rule in layer.param.include)
    return not any(_matches(rule, state) for rule in layer.param.exclude)


def _matches(rule: Any, state: Any) -> bool:
    """Whether a NetStateRule matches the test phase, with the level and stages of the file's `state`."""
    if rule.HasField("phase") and rule.phase != _TEST:
        return False
    if rule.HasField("min_level") and state.level < rule.min_level:
        return False
    if rule.HasField("max_level") and state.level > rule.max_level:
        return False
    stages = set(state.stage)
    return stages.issuperset(rule.stage) and stages.isdisjoint(rule.not_stage)


def _is_textual(content: bytes) -> bool:
    """Whether it is a network's text form; a binary file starts with a control byte (a field tag)."""
    head = content[:4096]
    return b"layer" in head and all(byte in b"\t\n\r" or byte >= 32 for byte in head)
