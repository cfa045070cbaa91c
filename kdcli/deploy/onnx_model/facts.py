"""What can be counted in an ONNX file."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx

from kdcli.models.layer_summary import LayerSummary

PREPROCESSING = "preprocess/"  # kd export names the nodes that prepare pixels so
CHANNELS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Facts:
    """What can be counted in an ONNX file.

    Attributes:
        parameters: values in weight tensors; quantisation scales and shapes are not counted.
        network_bytes: all constants of the network.
        preprocessing_bytes: constants of the preprocessing inside the file.
        macs: multiply-accumulates of one image in the network's Conv, Gemm and MatMul; None if not known.
        operators: kinds of nodes.
        nodes: all of them, in the order they run.
    """

    parameters: int
    network_bytes: int
    preprocessing_bytes: int
    macs: int | None
    operators: tuple[str, ...]
    nodes: tuple[LayerSummary, ...]


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
    network_bytes = preprocessing_bytes = 0
    weights: dict[str, int] = {}  # values of each
    for name, tensor in constants.items():
        count = math.prod(tensor.dims)
        size = count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        if name not in of_network:
            preprocessing_bytes += size
            continue
        network_bytes += size
        if name not in helpers and tensor.data_type != onnx.TensorProto.INT64:
            weights[name] = count
    nodes = _nodes(model, input_size, weights)
    work = [node.macs for node in nodes]
    return Facts(
        parameters=sum(weights.values()),
        network_bytes=network_bytes,
        preprocessing_bytes=preprocessing_bytes,
        macs=None if None in work else sum(count or 0 for count in work),
        operators=tuple(sorted({node.op_type for node in model.graph.node})),
        nodes=nodes,
    )


def _nodes(
    model: onnx.ModelProto, input_size: tuple[int, int, int] | None, weights: dict[str, int]
) -> tuple[LayerSummary, ...]:
    """Nodes with the shape and the work for one image; `weights` are values by name, counted where first used."""
    shapes = _shapes(model, input_size)
    left = dict(weights)
    alive = {info.name for info in model.graph.input} - weights.keys()  # what depends on the image
    rows = []
    for node in model.graph.node:
        shape: tuple[int, ...] = ()
        if alive.intersection(node.input):
            alive.update(node.output)
            shape = shapes.get(node.output[0], ()) if node.output else ()
        own = sum(left.pop(name, 0) for name in node.input)
        kind = " ".join([node.op_type, *("×".join(map(str, shapes[n])) for n in node.input if n in weights)])
        rows.append(LayerSummary(node.name, kind, shape[1:], own, _macs(node, shapes)))
    return tuple(rows)


def _shapes(model: onnx.ModelProto, input_size: tuple[int, int, int] | None) -> dict[str, tuple[int, ...]]:
    """Shapes by name for a batch of one, those that can be inferred."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    fix_input(fixed, input_size)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in fixed.graph.initializer}
    try:
        inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    except Exception:  # a shape it cannot infer leaves the work unknown, which is what None says
        return shapes
    for info in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        sides = info.type.tensor_type.shape.dim
        if all(side.HasField("dim_value") for side in sides):
            shapes[info.name] = tuple(side.dim_value for side in sides)
    return shapes


def _macs(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int | None:
    if node.op_type not in ("Conv", "Gemm", "MatMul") or node.name.startswith(PREPROCESSING):
        return 0
    if any(name not in shapes for name in (*node.input[:2], node.output[0])):
        return None
    outputs = math.prod(shapes[node.output[0]])
    if node.op_type == "Conv":
        return outputs * math.prod(shapes[node.input[1]][1:])  # weight (M, C/groups, kernel …)
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return outputs * shapes[node.input[0]][-2 if transposed else -1]


def fix_input(model: onnx.ModelProto, input_size: tuple[int, int, int] | None) -> None:
    info = image_input(model)
    if info is None or len(info.type.tensor_type.shape.dim) != 4:
        return
    sides = info.type.tensor_type.shape.dim
    sides[0].dim_value = 1
    if input_size is not None:
        height, width, channels = input_size
        last = layout_of(info) == "NHWC"
        values = (height, width, channels) if last else (channels, height, width)
        for side, value in zip(sides[1:], values, strict=True):
            side.dim_value = value
    for output in model.graph.output:  # a named batch side would contradict the 1
        output.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]


def layout_of(info: onnx.ValueInfoProto) -> str:
    """`NCHW` or `NHWC`: which of the second and the last side is a number of channels.

    Where both or neither is, pixels lie NHWC and floats NCHW, as in kd's own files. TensorFlow's are NHWC.
    """
    sides = info.type.tensor_type.shape.dim
    second, last = sides[1].dim_value, sides[3].dim_value
    if info.type.tensor_type.elem_type == onnx.TensorProto.UINT8:
        return "NCHW" if second in CHANNELS and last not in CHANNELS else "NHWC"
    return "NHWC" if last in CHANNELS and second and second not in CHANNELS else "NCHW"


def image_input(model: onnx.ModelProto) -> onnx.ValueInfoProto | None:
    constants = {tensor.name for tensor in model.graph.initializer}  # old files list weights as inputs
    inputs = [info for info in model.graph.input if info.name not in constants]
    return inputs[0] if len(inputs) == 1 else None
