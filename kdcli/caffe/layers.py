"""Caffe layers → nodes of a `kdcli.models.graph`, and their blobs → its parameters.

Adding a layer: one function `(layer) -> (operation, args)` and one row in `LAYERS`; if it has weights, a row
in `PARAMETERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kdcli.base.errors import KdError
from kdcli.base.text import dims
from kdcli.caffe.read import Array, Layer, squeezed

Node = tuple[str, dict[str, Any]]


def node_of(layer: Layer, part: int = 0) -> Node:
    """The operation and its arguments.

    Args:
        part: which of the layer's outputs, where it has several.

    Raises:
        KdError: a layer type, or a setting of it, that kd does not know; names layer and type.
    """
    check_type(layer)
    try:
        operation, args = LAYERS[layer.type](layer)
        return operation, {**args, "part": part} if operation == "slice" else args
    except KdError as error:
        raise KdError(f"layer {layer.name} ({layer.type}): {error.message}", error.hint) from error


def check_type(layer: Layer) -> None:
    """Refuse a layer type that kd does not know; names layer and type."""
    if layer.type not in LAYERS:
        raise KdError(
            f"layer {layer.name}: unknown type {layer.type or '(none)'}",
            f"kd knows {', '.join(sorted({*LAYERS, 'Split', 'Silence'}))}.",
        )


def state_of(
    layer: Layer, operation: str, wanted: dict[str, tuple[int, ...]], blobs: Sequence[Array]
) -> dict[str, Array]:
    """A layer's blobs as the parameters of its module.

    Args:
        wanted: parameter name → shape.
        blobs: as in the file.

    Raises:
        KdError: too few or too many blobs, or shapes that differ; names the layer and both shapes.
    """
    names = [name for name in PARAMETERS.get(operation, ()) if name in wanted or name == "factor"]
    if not names or (operation == "batch_norm" and not wanted):
        return {}
    if not blobs:
        shapes = ", ".join(f"{name} {dims(wanted[name])}" for name in names if name in wanted)
        raise KdError(f"layer {layer.name}: the file holds no weights for it (the network wants {shapes})")
    if len(blobs) != len(names):
        raise KdError(
            f"layer {layer.name}: the file holds {len(blobs)} blobs, the network wants {len(names)}"
        )
    transposed = operation == "linear" and layer.param.inner_product_param.transpose
    state: dict[str, Array] = {}
    for name, blob in zip(names, blobs, strict=True):
        shape = (1,) if name == "factor" else wanted[name]
        stored = shape[::-1] if transposed and name == "weight" else shape
        if squeezed(blob.shape) != squeezed(stored):
            raise KdError(
                f"layer {layer.name}: {name} in the file is {dims(blob.shape)}, "
                f"the network wants {dims(stored)}"
            )
        values = blob.reshape(stored)
        state[name] = np.ascontiguousarray(values.T) if stored is not shape else values
    if operation == "batch_norm":
        # Caffe keeps running sums; the third blob is what they were weighted with
        factor = float(state.pop("factor").item())
        state = {name: value * np.float32(1 / factor if factor else 0) for name, value in state.items()}
        state["num_batches_tracked"] = np.zeros((), np.int64)
    return state


PARAMETERS = {
    "conv": ("weight", "bias"),
    "linear": ("weight", "bias"),
    "batch_norm": ("running_mean", "running_var", "factor"),
    "deconv": ("weight", "bias"),
    "scale": ("weight", "bias"),
    "bias": ("bias",),
    "prelu": ("weight",),
}


def _pair(param: Any, name: str, default: int | None, plain: str = "") -> list[int]:
    """`kernel_h`/`kernel_w`, or `kernel_size` once or twice: [y, x]."""
    values = [int(value) for value in getattr(param, plain or name)]
    high, wide = f"{name}_h", f"{name}_w"
    if hasattr(param, high) and (param.HasField(high) or param.HasField(wide)):
        if values:
            raise KdError(f"{plain or name} and {high}/{wide} exclude each other")
        return [int(getattr(param, high)) or (default or 0), int(getattr(param, wide)) or (default or 0)]
    if not values:
        if default is None:
            raise KdError(f"it has no {plain or name}")
        return [default, default]
    if len(values) > 2:
        raise KdError(f"{len(values)} values of {plain or name}: kd knows two spatial axes")
    return [values[0], values[-1]]


def _convolution(layer: Layer) -> Node:
    param = layer.param.convolution_param
    if param.axis not in (1, -3):
        raise KdError(f"axis {param.axis} is not the channels")
    return "deconv" if layer.type == "Deconvolution" else "conv", {
        "out": _outputs(param),
        "kernel": _pair(param, "kernel", None, "kernel_size"),
        "stride": _pair(param, "stride", 1),
        "pad": _pair(param, "pad", 0),
        "dilation": _pair(param, "dilation", 1),
        "groups": int(param.num_output if layer.type in DEPTHWISE else param.group),
        "bias": bool(param.bias_term),
    }


def _outputs(param: Any) -> int:
    if param.num_output < 1:
        raise KdError("it has no num_output")
    return int(param.num_output)


def _inner_product(layer: Layer) -> Node:
    param = layer.param.inner_product_param
    return "linear", {"out": _outputs(param), "bias": bool(param.bias_term), "axis": int(param.axis)}


def _pooling(layer: Layer) -> Node:
    param = layer.param.pooling_param
    if param.pool not in (0, 1):
        raise KdError("stochastic pooling is not supported")
    operation = "ave_pool" if param.pool == 1 else "max_pool"
    args = {"stride": _pair(param, "stride", 1), "pad": _pair(param, "pad", 0)}
    if param.global_pooling:
        if args != {"stride": [1, 1], "pad": [0, 0]}:
            raise KdError("global pooling takes neither stride nor padding")
        return operation, {}
    return operation, {
        "kernel": _pair(param, "kernel", None, "kernel_size"),
        **args,
        "round_up": param.round_mode == 0,
    }


def _lrn(layer: Layer) -> Node:
    param = layer.param.lrn_param
    return "lrn", {
        "size": int(param.local_size),
        "alpha": float(param.alpha),
        "beta": float(param.beta),
        "k": float(param.k),
        "within": param.norm_region == 1,
    }


def _batch_norm(layer: Layer) -> Node:
    param = layer.param.batch_norm_param
    trained = layer.param.HasField("phase") and layer.param.phase == 0  # as a solver records it
    if param.HasField("use_global_stats") and not param.use_global_stats and not trained:
        raise KdError(
            "use_global_stats: false takes the statistics of each batch; a classifier needs the kept ones",
            "Give a deploy prototxt with --prototxt, in which it is true or absent.",
        )
    return "batch_norm", {"eps": float(param.eps)}


def _mvn(layer: Layer) -> Node:
    param = layer.param.mvn_param
    return "mvn", {
        "variance": bool(param.normalize_variance),
        "across": bool(param.across_channels),
        "eps": float(param.eps),
    }


def _scale(layer: Layer) -> Node:
    param = layer.param.scale_param
    return "scale", {"bias": bool(param.bias_term), "axis": int(param.axis), "num_axes": int(param.num_axes)}


def _bias(layer: Layer) -> Node:
    param = layer.param.bias_param
    return "bias", {"axis": int(param.axis), "num_axes": int(param.num_axes)}


def _axis(param: Any, older: str) -> int:
    """`axis`, or the field that came before it."""
    return int(getattr(param, older) if param.HasField(older) else param.axis)


def _slice(layer: Layer) -> Node:
    param = layer.param.slice_param
    return "slice", {
        "of": len(layer.tops),
        "axis": _axis(param, "slice_dim"),
        "points": [int(point) for point in param.slice_point],
    }


def _crop(layer: Layer) -> Node:
    param = layer.param.crop_param
    return "crop", {"axis": int(param.axis), "offset": [int(first) for first in param.offset]}


def _eltwise(layer: Layer) -> Node:
    param = layer.param.eltwise_param
    operation = ("prod", "sum", "max")[param.operation]
    coefficients = [float(value) for value in param.coeff]
    return "eltwise", {"operation": operation, "coefficients": coefficients}


def _flatten(layer: Layer) -> Node:
    if not hasattr(layer.param, "flatten_param"):  # V1 has no settings for it
        return "flatten", {}
    param = layer.param.flatten_param
    return "flatten", {"axis": int(param.axis), "end_axis": int(param.end_axis)}


def _reshape(layer: Layer) -> Node:
    param = layer.param.reshape_param
    if not param.HasField("shape"):
        raise KdError("it has no shape")
    dims = [int(side) for side in param.shape.dim]
    return "reshape", {"dims": dims, "axis": int(param.axis), "num_axes": int(param.num_axes)}


def _reduction(layer: Layer) -> Node:
    param = layer.param.reduction_param
    operation = {1: "sum", 2: "asum", 3: "sumsq", 4: "mean"}[param.operation]
    return "reduction", {"operation": operation, "axis": int(param.axis), "factor": float(param.coeff)}


def _argmax(layer: Layer) -> Node:
    param = layer.param.argmax_param
    axis = int(param.axis) if param.HasField("axis") else None
    return "argmax", {"axis": axis, "top_k": int(param.top_k), "values": bool(param.out_max_val)}


def _power(layer: Layer) -> Node:
    param = layer.param.power_param
    return "power", {"power": float(param.power), "scale": float(param.scale), "shift": float(param.shift)}


def _exponential(layer: Layer) -> Node:
    operation = layer.type.lower()
    param = getattr(layer.param, f"{operation}_param")
    base = None if param.base == -1 else float(param.base)
    return operation, {"base": base, "scale": float(param.scale), "shift": float(param.shift)}


def _dropout(layer: Layer) -> Node:
    param = layer.param.dropout_param
    return "dropout", {"ratio": float(param.dropout_ratio), "scale_train": bool(param.scale_train)}


DEPTHWISE = ("ConvolutionDepthwise", "DepthwiseConvolution")  # of forks: a convolution of one channel a group

LAYERS: dict[str, Callable[[Layer], Node]] = {
    "AbsVal": lambda layer: ("abs", {}),
    "ArgMax": _argmax,
    "BNLL": lambda layer: ("softplus", {}),
    "BatchNorm": _batch_norm,
    "Bias": _bias,
    "Concat": lambda layer: ("concat", {"axis": _axis(layer.param.concat_param, "concat_dim")}),
    "Convolution": _convolution,
    "ConvolutionDepthwise": _convolution,
    "Crop": _crop,
    "Deconvolution": _convolution,
    "DepthwiseConvolution": _convolution,
    "Dropout": _dropout,
    "ELU": lambda layer: ("elu", {"alpha": float(layer.param.elu_param.alpha)}),
    "Eltwise": _eltwise,
    "Exp": _exponential,
    "Flatten": _flatten,
    "InnerProduct": _inner_product,
    "LRN": _lrn,
    "Log": _exponential,
    "MVN": _mvn,
    "PReLU": lambda layer: ("prelu", {"shared": bool(layer.param.prelu_param.channel_shared)}),
    "Pooling": _pooling,
    "Power": _power,
    "ReLU": lambda layer: ("relu", {"negative_slope": float(layer.param.relu_param.negative_slope)}),
    "Reduction": _reduction,
    "Reshape": _reshape,
    "Scale": _scale,
    "Sigmoid": lambda layer: ("sigmoid", {}),
    "Slice": _slice,
    "Softmax": lambda layer: ("softmax", {"axis": int(layer.param.softmax_param.axis)}),
    "TanH": lambda layer: ("tanh", {}),
}
