"""Form of an ONNX classifier: order and sides of its input, and the output that holds its classes."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from kdcli.base.config import InputSettings
from kdcli.base.errors import KdError
from kdcli.base.text import dims
from kdcli.deploy.onnx_model.runner import OnnxRunner

CHANNELS = (1, 2, 3, 4)
MAX_SIDE = 4096
MAX_BATCH = 4096
MAX_VALUES = 2**27  # of a fixed batch: 0.5 GB as float32
_MOST_STEPS = 1000  # tensors between the input and the first operator that needs a layout
_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.UINT8)
_Size = tuple[int, int, int]
_Dims = Mapping[str, tuple[int, ...]]

# Operators of channels on the second side, with the input of their weights and the side of it that has the channels.
_CHANNELS_SECOND = {
    "Conv": (1, 1),
    "ConvInteger": (1, 1),
    "QLinearConv": (3, 1),
    "BatchNormalization": (1, 0),
}
_KEEP_LAYOUT = re.compile(
    "Add|Cast|Clip|Concat|Div|DynamicQuantizeLinear|DequantizeLinear|Gather|Identity|Mul|Neg|Pad|"
    "QuantizeLinear|Relu|Resize|Slice|Split|Sub|Upsample"
)
# Operators that may follow a softmax or sigmoid without changing its values.
_KEEP_VALUES = re.compile(
    "Cast|Clip|DequantizeLinear|QuantizeLinear|Flatten|Identity|Reshape|Squeeze|Unsqueeze"
)
_NAMES_OF_OUTPUTS = tuple(map(re.compile, ("logit", "prob|softmax", "out|pred|class|label|score")))
_SUM_TOLERANCE = 1e-3
_SAME = 1e-2  # of the largest logit: rounding of float16 is below, other statistics of a batch are far above
_LEAST_PROBABILITY = 1e-7  # in that comparison


@dataclass(frozen=True)
class InputForm:
    """The one image input of a model."""

    layout: str  # NCHW or NHWC
    dtype: np.dtype[Any]
    size: _Size  # (H, W, C)


def input_form(
    path: Path,
    model: onnx.ModelProto,
    metadata: Mapping[str, str],
    assumed: InputSettings,
    data_size: _Size | None,
) -> InputForm:
    """Type, layout and sides of the input; a KdError if they are not those of images, or unknown.

    Open sides are taken from `assumed`, the metadata or the data, in this order.
    """
    hint = (
        "kd runs files with one input: (N, C, H, W), (N, H, W, C), or (N, values) of square images, uint8 or a float "
        "type."
    )
    if "kd.format" not in metadata:
        _take_images(model, assumed, data_size)
    info = image_input(model)
    if info is None or info.type.tensor_type.elem_type not in _TYPES:
        raise KdError(f"{path} does not take images", hint)
    dtype = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
    sides = [side.dim_value for side in info.type.tensor_type.shape.dim]  # 0: open
    if "kd.format" in metadata:
        layout, channels = "NHWC" if dtype == np.uint8 else "NCHW", 0
    else:
        layout, channels = _layout(path, model, info.name, sides, assumed)
    batch, *size = sides if layout == "NHWC" else (sides[0], sides[2], sides[3], sides[1])
    side = assumed.image_size or 0
    # ultralytics records `[224, 224]` or `224`
    recorded = [int(word) for word in re.findall(r"\d{1,5}", metadata.get("imgsz", "")[:100])] or [0]
    for known in ((side, side, channels), (recorded[0], recorded[-1], 0), data_size or (0, 0, 0)):
        size = [own or other for own, other in zip(size, known, strict=True)]
    height, width, channels = size
    if min(size) < 1:
        given = "×".join(str(side or "?") for side in size)
        raise KdError(
            f"{path} leaves the size of its images open ({given})",
            f"Set height and width with {assumed.flag('image_size')}.",
        )
    if max(height, width) > MAX_SIDE or channels not in CHANNELS:
        limits = f"Images have at most {MAX_SIDE:,} pixels a side and {max(CHANNELS)} channels."
        raise KdError(f"{path} takes images of {dims(size)} in {layout} order", limits)
    if batch > MAX_BATCH or batch * math.prod(size) > MAX_VALUES:
        raise KdError(f"{path} takes {batch} images at a time", f"The limit is {MAX_BATCH:,} small ones.")
    return InputForm(layout, dtype, (height, width, channels))


def image_input(model: onnx.ModelProto, sides: int = 4) -> onnx.ValueInfoProto | None:
    """The only input of a model, if it has so many sides; else None."""
    constants = {tensor.name for tensor in model.graph.initializer}  # old files list weights as inputs
    inputs = [info for info in model.graph.input if info.name not in constants]
    return inputs[0] if len(inputs) == 1 and len(inputs[0].type.tensor_type.shape.dim) == sides else None


def _take_images(model: onnx.ModelProto, assumed: InputSettings, data_size: _Size | None) -> None:
    """Change a model of vectors (N, H · W · C), as scikit-learn's, to one of images; and maps of classes to tensors.

    Images are those of the data, or square, of one or three channels.
    """
    graph = model.graph
    if (info := image_input(model, 2)) is not None:
        kind, (batch, values) = info.type.tensor_type.elem_type, info.type.tensor_type.shape.dim
        square = ((math.isqrt(values.dim_value // count), count) for count in (1, 3))
        sizes = [*([data_size] if data_size else []), *((side, side, count) for side, count in square)]
        size = next((each for each in sizes if values.dim_value in (0, math.prod(each))), None)
        if size is not None:
            ordered = (size[2], *size[:2]) if assumed.layout == "nchw" else size
            graph.node.insert(0, onnx.helper.make_node("Flatten", [f"{info.name}/images"], [info.name]))
            sides = [batch.dim_value or "n", *ordered]
            info.CopyFrom(onnx.helper.make_tensor_value_info(f"{info.name}/images", kind, sides))
    outputs = {output.name: output for output in graph.output}
    for node in [node for node in graph.node if node.op_type == "ZipMap" and node.input]:
        for name in set(node.output) & set(outputs):
            of_classes = onnx.helper.make_tensor_value_info(node.input[0], onnx.TensorProto.FLOAT, None)
            outputs[name].CopyFrom(of_classes)
        graph.node.remove(node)


def _layout(
    path: Path, model: onnx.ModelProto, name: str, sides: list[int], assumed: InputSettings
) -> tuple[str, int]:
    """NCHW or NHWC, and the channels that the network needs, 0 if unknown; a KdError if nothing decides.

    By --layout, else by the side that alone can be a count of channels, else by the network's operators, else by the
    order in which the images are square.
    """
    needed, channels = _needed_layout(model, name)
    second, last = sides[1] in CHANNELS, sides[3] in CHANNELS
    if assumed.layout:
        return assumed.layout.upper(), channels
    if second != last:
        return "NCHW" if second else "NHWC", channels
    if needed:
        return needed, channels
    if second and last and (sides[2] == sides[3]) != (sides[1] == sides[2]):  # only one reading is square
        return "NCHW" if sides[2] == sides[3] else "NHWC", channels
    shape = ", ".join(str(side) if side else "?" for side in sides)
    raise KdError(
        f"{path} takes ({shape}), and nothing in it shows which side has the channels",
        f"Set {assumed.flag('layout')} nchw for (N, C, H, W), or nhwc for (N, H, W, C).",
    )


def _needed_layout(model: onnx.ModelProto, name: str) -> tuple[str | None, int]:
    """The layout that the first operators of the network need, if they agree, and the number of channels or 0."""
    constants = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants |= {name: tuple(entry.t.dims) for entry in node.attribute for name in node.output}
        for each in node.input:
            readers[each].append(node)
    layouts, channels, seen = set(), 0, {name}
    waiting = [(name, False)]  # tensors, and whether a transposition precedes
    while waiting and len(seen) < _MOST_STEPS:
        tensor, transposed = waiting.pop()
        for node in readers[tensor]:
            layout, count = _needs(node, tensor, constants)
            channels = channels or count
            if layout and not transposed:
                layouts.add(layout)
            transposes = node.op_type == "Transpose"
            if (not layout and _KEEP_LAYOUT.fullmatch(node.op_type)) or (transposes and not transposed):
                waiting += [
                    (output, transposed or transposes) for output in node.output if output not in seen
                ]
                seen.update(node.output)
    return (layouts.pop(), channels) if len(layouts) == 1 else (None, 0)


def _needs(node: onnx.NodeProto, tensor: str, constants: _Dims) -> tuple[str | None, int]:
    """The layout that an operator needs of one of its inputs, None if any, and the number of channels or 0."""
    attributes = {entry.name: entry for entry in node.attribute}
    if node.op_type == "Transpose" and "perm" in attributes:
        perm = list(attributes["perm"].ints)
        return ("NHWC" if perm[1:2] == [3] else "NCHW" if perm[3:4] == [1] else None), 0
    if node.op_type in _CHANNELS_SECOND and node.input[0] == tensor:
        position, side = _CHANNELS_SECOND[node.op_type]
        weight = constants.get(node.input[position], ()) if 0 <= position < len(node.input) else ()
        groups = attributes["group"].i if "group" in attributes and side == 1 else 1
        return "NCHW", weight[side] * groups if len(weight) > side else 0
    return None, 0


def form_of_outputs(model: onnx.ModelProto, output: str, values: npt.NDArray[Any]) -> str:
    """`probabilities`, `sigmoids` or `logits`: by values (N, classes) of this output, and by its last operator."""
    if are_probabilities(values):
        return "probabilities"
    producers = {name: node for node in model.graph.node for name in node.output}
    node = producers.get(output)
    for _ in range(len(producers)):  # bounded: a hostile graph may have cycles
        if node is None or not _KEEP_VALUES.fullmatch(node.op_type) or not node.input:
            break
        node = producers.get(node.input[0])
    return {"Softmax": "probabilities", "Sigmoid": "sigmoids"}.get(node.op_type if node else "", "logits")


def are_probabilities(outputs: npt.NDArray[Any]) -> bool:
    """Whether outputs (N, classes) are not negative and every row adds up to 1."""
    sums = outputs.astype(np.float64).sum(axis=1)
    return bool((outputs >= 0).all() and (np.abs(sums - 1) <= _SUM_TOLERANCE).all())


def choose_output(path: Path, values: Mapping[str, npt.NDArray[Any]], images: int) -> str:
    """Name of the classifier's output (N, classes) among the values for so many images; of several by its name."""
    classes = {}  # classes by name of an output
    for name, value in values.items():
        sides = [side for side in value.shape[1:] if side != 1]
        if value.shape[:1] == (images,) and len(sides) == 1 and np.issubdtype(value.dtype, np.floating):
            classes[name] = sides[0]
    shapes = ", ".join(f"{name[:60]} {value.dtype} {value.shape}" for name, value in list(values.items())[:8])
    problem = f"{path} is not a classifier: for a batch of {images} it gives {shapes}"
    if not classes:
        if any(np.issubdtype(value.dtype, np.floating) and value.size == images for value in values.values()):
            raise KdError(
                f"{path} gives one number an image, as a classifier of two classes with a sigmoid does",
                "Export it with one output for each class: [1 − p, p].",
            )
        raise KdError(
            problem,
            "A classifier gives float (images, classes), unlike detectors and segmenters.",
        )
    vectors = all(sum(side != 1 for side in value.shape[1:]) <= 1 for value in values.values())
    for form in _NAMES_OF_OUTPUTS if vectors else _NAMES_OF_OUTPUTS[:2]:  # a detector's may be named scores
        named = [name for name in classes if form.search(name.lower())]
        if len(named) == 1 and len(values) > 1:
            return named[0]
        if named:
            break
    if len(classes) == 1 and vectors:
        return next(iter(classes))
    raise KdError(
        f"{path} has several outputs, and none is named as that of a classifier: {shapes}",
        "Keep one of them: onnx.utils.extract_model(path, new_path, [input], [output]).",
    )


def check_alone(
    path: Path, runner: OnnxRunner, images: npt.NDArray[Any], *, dynamic: bool
) -> npt.NDArray[Any]:
    """Outputs (N, classes) of three images; a KdError unless the first has the same output in a batch of one.

    Sets `runner.batch` to 1 where larger batches fail.

    `dynamic`: activations are quantised by the range of the batch: such a file is run singly.
    """
    alone = runner.run(images[:1])
    if runner.batch is None:
        try:
            if dynamic:
                raise KdError("its outputs depend on the batch")
            runner.run(images)
        except KdError:
            runner.batch = 1
    outputs = runner.run(images).reshape(len(images), -1)
    alone, among = alone.reshape(1, -1).astype(np.float64), outputs[:1].astype(np.float64)
    if are_probabilities(outputs):
        alone, among = (np.log(np.maximum(values, _LEAST_PROBABILITY)) for values in (alone, among))
    tolerance = _SAME * max(float(np.abs(alone).max()), 1e-3)
    if not np.allclose(alone, among, rtol=0, atol=tolerance, equal_nan=True):
        raise KdError(
            f"{path} gives an image another output alone than within a batch",
            "It was exported with layers in training mode, such as batch normalisation or dropout: export it in "
            "eval mode.",
        )
    return outputs
