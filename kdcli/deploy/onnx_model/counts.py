"""Parameters, bytes and multiply-accumulates of an ONNX model, and the form of its input."""

import copy
import math

import onnx

from kdcli.base.text import dims
from kdcli.deploy.onnx_model.form import image_input
from kdcli.models.layers import LayerSummary, ModelCounts

_ML = "ai.onnx.ml"  # domain of scikit-learn's operators
_WEIGHT_INPUT = {
    "Conv": 1, "ConvInteger": 1, "ConvTranspose": 1, "QLinearConv": 3,
    "Gemm": 1, "MatMul": 1, "MatMulInteger": 1, "QLinearMatMul": 3,
}  # fmt: skip
PREPROCESSING = "preprocess/"  # prefix of the names of preprocessing nodes in exported files


def count_model(model: onnx.ModelProto, image: tuple[int, ...] = ()) -> ModelCounts:
    """Count a model's values, bytes and work; `image` are the sides of one image of its input, if they are open."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    network_inputs: set[str] = set()
    scales: set[str] = set()  # and zero points
    for node in model.graph.node:
        if node.op_type == "Constant":
            values = [entry.t for entry in node.attribute if entry.name == "value"]
            constants |= dict(zip(node.output, values, strict=False))
        if not node.name.startswith(PREPROCESSING):
            network_inputs.update(node.input)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scales.update(node.input[1:])
    preprocessing_bytes = 0
    network_bytes = 4 * sum(map(_attribute_weights, model.graph.node))
    weights: dict[str, int] = {}  # number of values by name
    for name, tensor in constants.items():
        count = math.prod(tensor.dims)
        size = count * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        if name not in network_inputs:
            preprocessing_bytes += size
            continue
        network_bytes += size
        if name not in scales and tensor.data_type != onnx.TensorProto.INT64:
            weights[name] = count
    nodes = _node_rows(model, image, weights)
    macs = None if any(node.macs is None for node in nodes) else sum(node.macs or 0 for node in nodes)
    parameters = sum(node.parameters for node in nodes)
    return ModelCounts(parameters, network_bytes, preprocessing_bytes, macs, _precision(model), nodes)


def _attribute_weights(node: onnx.NodeProto) -> int:
    """Number of weights of an operator of classical machine learning, which are attributes."""
    return sum(len(entry.floats) for entry in node.attribute) if node.domain == _ML else 0


def _precision(model: onnx.ModelProto) -> str:
    """By quantising operators, else by most of the weights: a float16 file may take and give float32."""
    if any("Quantize" in node.op_type or "QLinear" in node.op_type for node in model.graph.node):
        return "int8"
    kinds = [weight.data_type for weight in model.graph.initializer if len(weight.dims) > 1]
    return "fp16" if kinds.count(onnx.TensorProto.FLOAT16) > len(kinds) / 2 else "fp32"


def _node_rows(
    model: onnx.ModelProto, image: tuple[int, ...], weights: dict[str, int]
) -> tuple[LayerSummary, ...]:
    """A row for each node, for a batch of one; `weights` are counted in the first node that uses them."""
    shapes = _infer_shapes(model, image)
    uncounted = dict(weights)
    image_values = {info.name for info in model.graph.input} - weights.keys()  # all that depends on the image
    rows = []
    for node in model.graph.node:
        shape: tuple[int, ...] = ()
        if image_values.intersection(node.input):
            image_values.update(node.output)
            shape = shapes.get(node.output[0], ()) if node.output else ()
        own = sum(uncounted.pop(name, 0) for name in node.input) + _attribute_weights(node)
        known = (shapes[name] for name in node.input if name in weights and name in shapes)
        kind = " ".join([node.op_type, *map(dims, known)])
        rows.append(LayerSummary(node.name, kind, shape[1:], own, _macs(node, shapes)))
    return tuple(rows)


def _infer_shapes(model: onnx.ModelProto, image: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes by name for a batch of one, as far as they can be inferred."""
    fixed = copy.deepcopy(model)
    info = image_input(fixed)
    if info is not None:
        sides = info.type.tensor_type.shape.dim
        sides[0].dim_value = 1
        for side, value in zip(sides[1:], image, strict=False):
            side.dim_value = value
        for output in fixed.graph.output:  # a named batch side would contradict the 1
            output.type.tensor_type.ClearField("shape")
        del fixed.graph.value_info[:]
    shapes = {tensor.name: tuple(tensor.dims) for tensor in fixed.graph.initializer}
    try:
        inferred = onnx.shape_inference.infer_shapes(fixed, data_prop=True)
    except Exception:  # shapes remain unknown, and so does the work
        return shapes
    for info in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        sides = info.type.tensor_type.shape.dim
        if info.type.tensor_type.HasField("shape") and all(side.HasField("dim_value") for side in sides):
            shapes[info.name] = tuple(side.dim_value for side in sides)
    return shapes


def _macs(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int | None:
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type not in _WEIGHT_INPUT or node.name.startswith(PREPROCESSING):
        return 0
    weight = node.input[_WEIGHT_INPUT[node.op_type]]
    if any(name not in shapes for name in (node.input[0], weight, node.output[0])):
        return None
    inputs, outputs = math.prod(shapes[node.input[0]]), math.prod(shapes[node.output[0]])
    if "Conv" in node.op_type:  # weight (M, C/groups, kernel …), transposed (C, M/groups, kernel …)
        return (inputs if node.op_type == "ConvTranspose" else outputs) * math.prod(shapes[weight][1:])
    transposed = any(entry.name == "transA" and entry.i for entry in node.attribute)
    return outputs * shapes[node.input[0]][-2 if transposed else -1]
