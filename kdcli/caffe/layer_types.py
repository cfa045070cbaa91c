"""Caffe layers → operations of a `kdcli.models.graph`, and their blobs → its parameters.

Adding a layer type: one row in `LAYERS`, with a function `(layer) -> (operation, args)` where fields need more than
copying; if it has weights, a row in `PARAMETERS`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kdcli.base.errors import KdError
from kdcli.base.text import dims
from kdcli.caffe.read import Array, Layer, squeezed

Operation = tuple[str, dict[str, Any]]  # name in `kdcli.models.graph.OPS`, arguments

PARAMETERS = {  # operation → its parameters, in the order of Caffe's blobs
    "conv": ("weight", "bias"),
    "deconv": ("weight", "bias"),
    "linear": ("weight", "bias"),
    "batch_norm": ("running_mean", "running_var", "factor"),
    "scale": ("weight", "bias"),
    "bias": ("bias",),
    "prelu": ("weight",),
}
DEPTHWISE = ("ConvolutionDepthwise", "DepthwiseConvolution")  # of Caffe's forks: as many groups as outputs


def operation_of(layer: Layer, output: int = 0) -> Operation:
    """The operation and its arguments, for output number `output` of a Slice; KdError names layer and type."""
    check_type(layer)
    try:
        operation, args = LAYERS[layer.type](layer)
        return operation, {**args, "part": output} if operation == "slice" else args
    except KdError as error:
        raise KdError(f"layer {layer.name} ({layer.type}): {error.message}", error.hint) from error


def check_type(layer: Layer) -> None:
    """Raise KdError for an unknown layer type."""
    if layer.type not in LAYERS:
        raise KdError(
            f"layer {layer.name}: unknown type {layer.type or '(none)'}",
            f"Supported types: {', '.join(sorted({*LAYERS, 'Split', 'Silence'}))}.",
        )


def state_of(
    layer: Layer, operation: str, shapes: dict[str, tuple[int, ...]], blobs: Sequence[Array]
) -> dict[str, Array]:
    """A layer's blobs as the state of its module; KdError names the layer and both shapes where they differ.

    Args:
        shapes: parameter name → shape in the module.
    """
    names = [name for name in PARAMETERS.get(operation, ()) if name in shapes or name == "factor"]
    if not names:
        return {}
    if len(blobs) != len(names):
        wanted = ", ".join(f"{name} {dims(shapes[name])}" for name in names if name in shapes)
        raise KdError(
            f"layer {layer.name}: the file holds {len(blobs)} blobs, the network has {len(names)} ({wanted})"
        )
    transposed = operation == "linear" and layer.param.inner_product_param.transpose
    state: dict[str, Array] = {}
    for name, blob in zip(names, blobs, strict=True):
        shape = (1,) if name == "factor" else shapes[name]
        stored = shape[::-1] if transposed and name == "weight" else shape
        if squeezed(blob.shape) != squeezed(stored):
            raise KdError(
                f"layer {layer.name}: {name} in the file is {dims(blob.shape)}, in the network {dims(stored)}"
            )
        values = blob.reshape(stored)
        state[name] = np.ascontiguousarray(values.T) if stored is not shape else values
    if operation == "batch_norm":
        # Caffe stores running sums; the third blob is the sum of their weights, and 0 gives zero statistics
        factor = float(state.pop("factor").item())
        state = {name: value * np.float32(1 / factor if factor else 0) for name, value in state.items()}
        state["num_batches_tracked"] = np.zeros((), np.int64)
    return state


def _fields(operation: str, message: str = "", *names: str, **renamed: str) -> Callable[[Layer], Operation]:
    """A translation that copies fields of `message` to arguments: `names`, and `renamed`, argument → field."""
    fields = {**{name: name for name in names}, **renamed}

    def translate(layer: Layer) -> Operation:
        param = getattr(layer.param, message, None)
        if param is None:  # no settings, as for V1's Flatten
            return operation, {}
        args = {arg: getattr(param, field) for arg, field in fields.items()}
        scalar = (bool, int, float)
        return operation, {arg: v if isinstance(v, scalar) else list(v) for arg, v in args.items()}

    return translate


def _pair(param: Any, name: str, default: int) -> list[int]:
    """A setting of both spatial axes as [y, x]: `<name>_h` and `<name>_w`, or the repeated field once or twice."""
    height, width = f"{name}_h", f"{name}_w"
    if hasattr(param, height) and (param.HasField(height) or param.HasField(width)):
        return [getattr(param, height) or default, getattr(param, width) or default]
    values = list(getattr(param, "kernel_size" if name == "kernel" else name)) or [default]
    if len(values) > 2:
        raise KdError(f"{len(values)} values of {name}: two spatial axes are supported")
    return [values[0], values[-1]]


def _axis(param: Any, deprecated: str) -> int:
    """`axis`, or the deprecated field where it is set."""
    return int(getattr(param, deprecated) if param.HasField(deprecated) else param.axis)


def _convolution(layer: Layer) -> Operation:
    param = layer.param.convolution_param
    if param.axis not in (1, -3):
        raise KdError(f"axis {param.axis} is not the channels")
    return "deconv" if layer.type == "Deconvolution" else "conv", {
        "out": param.num_output,
        "kernel": _pair(param, "kernel", 0),
        "stride": _pair(param, "stride", 1),
        "pad": _pair(param, "pad", 0),
        "dilation": _pair(param, "dilation", 1),
        "groups": param.num_output if layer.type in DEPTHWISE else param.group,
        "bias": param.bias_term,
    }


def _pooling(layer: Layer) -> Operation:
    param = layer.param.pooling_param
    if param.pool not in (0, 1):
        raise KdError("stochastic pooling is not supported")
    operation = "ave_pool" if param.pool == 1 else "max_pool"
    if param.global_pooling:  # Caffe takes it with no stride or padding
        return operation, {}
    return operation, {
        "kernel": _pair(param, "kernel", 0),
        "stride": _pair(param, "stride", 1),
        "pad": _pair(param, "pad", 0),
        "round_up": param.round_mode == 0 and param.ceil_mode,
    }


def _lrn(layer: Layer) -> Operation:
    param = layer.param.lrn_param
    _, args = _fields("lrn", "lrn_param", "alpha", "beta", "k", size="local_size")(layer)
    return "lrn", {**args, "within": param.norm_region == 1}


def _batch_norm(layer: Layer) -> Operation:
    param = layer.param.batch_norm_param
    snapshot = layer.param.HasField("phase") and layer.param.phase == 0  # a solver records its training phase
    if param.HasField("use_global_stats") and not param.use_global_stats and not snapshot:
        raise KdError(
            "use_global_stats: false normalises with each batch's statistics; a classifier needs the running ones",
            "Pass a deploy prototxt with --prototxt, in which it is true or absent.",
        )
    return "batch_norm", {"eps": param.eps}


def _slice(layer: Layer) -> Operation:
    param = layer.param.slice_param
    args = {"axis": _axis(param, "slice_dim"), "points": list(param.slice_point)}
    return "slice", {"of": len(layer.tops), **args}


def _eltwise(layer: Layer) -> Operation:
    param = layer.param.eltwise_param
    operation = ("prod", "sum", "max")[param.operation]
    return "eltwise", {"operation": operation, "coefficients": list(param.coeff)}


def _reshape(layer: Layer) -> Operation:
    param = layer.param.reshape_param
    return "reshape", {"dims": list(param.shape.dim), "axis": param.axis, "num_axes": param.num_axes}


def _reduction(layer: Layer) -> Operation:
    param = layer.param.reduction_param
    operation = {1: "sum", 2: "asum", 3: "sumsq", 4: "mean"}[param.operation]
    return "reduction", {"operation": operation, "axis": param.axis, "factor": param.coeff}


def _exponential(layer: Layer) -> Operation:
    operation = layer.type.lower()
    _, args = _fields(operation, f"{operation}_param", "base", "scale", "shift")(layer)
    return operation, {**args, "base": None if args["base"] == -1 else args["base"]}


LAYERS: dict[str, Callable[[Layer], Operation]] = {
    "AbsVal": _fields("abs"),
    "BNLL": _fields("softplus"),
    "BatchNorm": _batch_norm,
    "Bias": _fields("bias", "bias_param", "axis", "num_axes"),
    "Concat": lambda layer: ("concat", {"axis": _axis(layer.param.concat_param, "concat_dim")}),
    "Convolution": _convolution,
    "Crop": _fields("crop", "crop_param", "axis", "offset"),
    "Deconvolution": _convolution,
    "Dropout": _fields("dropout", "dropout_param", "scale_train", ratio="dropout_ratio"),
    "ELU": _fields("elu", "elu_param", "alpha"),
    "Eltwise": _eltwise,
    "Exp": _exponential,
    "Flatten": _fields("flatten", "flatten_param", "axis", "end_axis"),
    "InnerProduct": _fields("linear", "inner_product_param", out="num_output", bias="bias_term", axis="axis"),
    "LRN": _lrn,
    "Log": _exponential,
    "MVN": _fields("mvn", "mvn_param", "eps", variance="normalize_variance", across="across_channels"),
    "PReLU": _fields("prelu", "prelu_param", shared="channel_shared"),
    "Pooling": _pooling,
    "Power": _fields("power", "power_param", "power", "scale", "shift"),
    "ReLU": _fields("relu", "relu_param", "negative_slope"),
    "Reduction": _reduction,
    "Reshape": _reshape,
    "Scale": _fields("scale", "scale_param", "axis", "num_axes", bias="bias_term"),
    "Sigmoid": _fields("sigmoid"),
    "Slice": _slice,
    "Softmax": _fields("softmax", "softmax_param", "axis"),
    "TanH": _fields("tanh"),
    **dict.fromkeys(DEPTHWISE, _convolution),
}
