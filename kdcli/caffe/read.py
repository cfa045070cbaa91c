"""Caffe's files → `Network` (the layers of the test phase) and weights by layer name.

The files are untrusted: their size is bounded, and a file that does not parse raises KdError.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf import text_format
from google.protobuf.message import DecodeError

from kdcli.base.errors import KdError
from kdcli.base.files import check_pointer, read_bytes
from kdcli.base.text import first_line
from kdcli.caffe import schema
from kdcli.models.foreign import explain

Array = npt.NDArray[np.float32]
Weights = dict[str, tuple[Array, ...]]  # layer name → its blobs

_MAX_BYTES = 2**31 - 1  # protobuf's own limit
_MAX_TEXT = 2**22  # a few seconds of parsing; the largest published networks have a twentieth of it
_MAX_MEAN = 2**26
_MAX_AXES = 32
_TEST = 1  # Phase.TEST
_FORMATS = (
    "kd reads whole binary caffemodels (snapshot_format BINARYPROTO, not HDF5) and caffe-tensorflow's .npy."
)

_V1_TYPES = tuple(schema.V1_TYPES.values())


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
        """Whether it produces images or labels, with Caffe's types or user-defined ones."""
        return not self.bottoms and (self.type in ("Input", "Python") or self.type.endswith("Data"))

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
        inputs: blob name → (C, H, W), or None where `input` or an Input layer declares no such shape.
    """

    name: str
    layers: tuple[Layer, ...]  # layers of the test phase, in order
    sources: tuple[Layer, ...]  # data and input layers of any phase, those of the test phase first
    inputs: dict[str, tuple[int, ...] | None]


def read_caffemodel(path: Path) -> tuple[Network, Weights]:
    """Network definition and weights of a binary caffemodel, V1 or V2; KdError where it is not a whole one."""
    content = _read_bytes(path, _MAX_BYTES)
    head = content[:4096]
    if b"layer" in head and all(byte in b"\t\n\r" or byte >= 32 for byte in head):  # no binary field tags
        if b"blobs" in content:
            raise KdError(
                f"{path} is a caffemodel written as text; kd reads binary ones",
                "Encode it with Caffe's caffe.proto: protoc --encode=caffe.NetParameter caffe.proto. "
                "(Caffe's upgrade_net_proto_text upgrades an old text file first.)",
            )
        raise explain(path) or KdError(
            f"{path} is a prototxt: it holds no weights",
            "Pass the caffemodel first, and this file with --prototxt.",
        )
    message = schema.NetParameter()
    try:
        message.ParseFromString(content)
    except (DecodeError, RecursionError) as error:
        found = None if content.startswith(b"\x89HDF") else explain(path)  # HDF5 is a form of Caffe's, too
        raise found or KdError(f"{path} is not a whole caffemodel: {first_line(error)}", _FORMATS) from error
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
    return _network(message, layers, snapshot=True), weights


def read_prototxt(path: Path) -> Network:
    """Network definition in text form, V1 or V2; unknown fields are skipped, and KdError names a malformed line."""
    content = _read_bytes(path, _MAX_TEXT).decode("utf-8-sig", "replace")  # comments may be in any encoding
    message = schema.NetParameter()
    try:
        text_format.Parse(content, message, allow_unknown_field=True)
    except (text_format.ParseError, ValueError, RecursionError, OverflowError) as error:
        raise KdError(f"{path} is not a well-formed prototxt: {first_line(error)}") from error
    if not message.layers and not message.layer:
        raise KdError(f"{path} holds no layers", "kd takes a deploy or train_val prototxt, not a solver.")
    return _network(message, _all_layers(message, path), snapshot=False)


def read_mean(path: Path) -> Array:
    """`mean.binaryproto` → the mean image (C, H, W), in the network's channel order."""
    message = schema.BlobProto()
    try:
        message.ParseFromString(_read_bytes(path, _MAX_MEAN))
    except (DecodeError, RecursionError) as error:
        raise KdError(f"{path} is not a mean image: {first_line(error)}") from error
    mean = blob_array(message, str(path))
    if mean.ndim == 4 and mean.shape[0] == 1:
        mean = mean[0]
    if mean.ndim != 3:
        raise KdError(f"{path}: a mean image is C×H×W, this is {mean.shape}")
    return mean


def _read_bytes(path: Path, limit: int) -> bytes:
    content = read_bytes(path, limit)
    check_pointer(content, str(path))
    return content


def blob_array(blob: Any, context: str) -> Array:
    """BlobProto → float32 array; KdError, with `context`, for values that do not fit its shape or are not finite."""
    sides = blob.shape.dim if blob.HasField("shape") else (blob.num, blob.channels, blob.height, blob.width)
    shape = tuple(map(int, sides))
    dtype = np.dtype("<f8" if blob.double_data else "<f4")
    data = b"".join(blob.double_data or blob.data)
    positive = len(shape) <= _MAX_AXES and all(side > 0 for side in shape)
    if not positive or math.prod(shape) * dtype.itemsize != len(data):
        stored = len(data) / dtype.itemsize
        raise KdError(f"{context}: shape {shape[:_MAX_AXES]} does not fit its {stored:,g} values")
    return finite(np.frombuffer(data, dtype).reshape(shape), context)


def finite(values: npt.NDArray[Any], context: str) -> Array:
    """The values as float32; KdError if any is not finite."""
    result: Array = values.astype(np.float32)
    if not np.isfinite(result).all():
        raise KdError(f"{context}: some values are not finite")
    return result


def squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    """A shape without leading ones: V1 wrote (1, 1, 1, N) where V2 writes (N,)."""
    sides = tuple(shape)
    while len(sides) > 1 and sides[0] == 1:
        sides = sides[1:]
    return sides


def weights_sha256(weights: Weights) -> str:
    """SHA-256 over names, shapes without leading ones, and float32 values: equal for every encoding."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        for blob in weights[name]:
            digest.update(repr((name, squeezed(blob.shape))).encode())
            digest.update(np.ascontiguousarray(blob, dtype="<f4").tobytes())
    return digest.hexdigest()


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

    A solver's `snapshot` has only the layers of training: one with weights, whose output the test phase reads, stands
    for its missing twin.
    """
    included = [(layer, _is_included(layer, message.state)) for layer in every]
    tested = [layer for layer, test in included if test]
    names = {layer.name for layer in tested}
    read = {blob for layer in tested for blob in layer.bottoms}

    def is_missing(layer: Layer) -> bool:
        return bool(layer.param.blobs) and layer.name not in names and not read.isdisjoint(layer.tops)

    layers = tuple(layer for layer, test in included if test or (snapshot and is_missing(layer)))
    # Sources of the test phase come first: their sizes win
    ordered = (*tested, *(layer for layer, test in included if not test))
    sources = tuple(layer for layer in ordered if layer.is_data)
    inputs: dict[str, tuple[int, ...] | None] = {}
    for number, name in enumerate(message.input):
        sides = message.input_dim[4 * number : 4 * number + 4]
        if len(message.input_shape) > number:
            sides = message.input_shape[number].dim
        inputs[text(name)] = _without_batch(sides)
    for layer in sources:
        shapes = layer.param.input_param.shape if layer.type == "Input" else ()
        for number, top in enumerate(layer.tops):  # the last shape holds for all further outputs
            shape = shapes[min(number, len(shapes) - 1)].dim if shapes else ()
            inputs.setdefault(top, _without_batch(shape))
    return Network(text(message.name), layers, sources, inputs)


def _without_batch(sides: Iterable[int]) -> tuple[int, ...] | None:
    """(N, C, H, W) → (C, H, W); None for another number of axes."""
    shape = tuple(int(side) for side in sides)
    return shape[1:] if len(shape) == 4 else None


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
