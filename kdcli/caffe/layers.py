"""Caffe layers → nodes of a `kdcli.models.graph`, and their blobs → its parameters.

Adding a layer: one function `(layer) -> (operation, args)` and one row in `LAYERS`; if it has weights, a row
in `PARAMETERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kdcli.caffe.read import Array, Layer, squeezed
from kdcli.errors import KdError
from kdcli.models.graph import shown

Node = tuple[str, dict[str, Any]]


def node_of(layer: Layer) -> Node:
    """The operation and its arguments.

    Raises:
        KdError: a layer type, or a setting of it, that kd does not know; names layer and type.
    """
    if layer.type not in LAYERS:
        raise KdError(
            f"layer {layer.name}: unknown type {layer.type or '(none)'}",
            f"kd knows {', '.join(sorted(LAYERS))}.",
        )
    try:
        return LAYERS[layer.type](layer)
    except KdError as error:
        raise KdError(f"layer {layer.name} ({layer.type}): {error.message}", error.hint) from error


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
    if not names:
        return {}
    if not blobs:
        shapes = ", ".join(f"{name} {shown(wanted[name])}" for name in names if name in wanted)
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
                f"layer {layer.name}: {name} in the file is {shown(blob.shape)}, "
                f"the network wants {shown(stored)}"
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
    "scale": ("weight", "bias"),
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
    if param.axis != 1:
        raise KdError(f"axis {param.axis} is not the channels")
    return "conv", {
        "out": _outputs(param),
        "kernel": _pair(param, "kernel", None, "kernel_size"),
        "stride": _pair(param, "stride", 1),
        "pad": _pair(param, "pad", 0),
        "dilation": _pair(param, "dilation", 1),
        "groups": int(param.group),
        "bias": bool(param.bias_term),
    }


def _outputs(param: Any) -> int:
    if param.num_output < 1:
        raise KdError("it has no num_output")
    return int(param.num_output)


def _inner_product(layer: Layer) -> Node:
    param = layer.param.inner_product_param
    if param.axis != 1:
        raise KdError(f"axis {param.axis} is not supported, only 1")
    return "linear", {"out": _outputs(param), "bias": bool(param.bias_term)}


def _pooling(layer: Layer) -> Node:
    param = layer.param.pooling_param
    if param.pool not in (0, 1):
        raise KdError("stochastic pooling is not supported")
    if param.round_mode != 0:
        raise KdError("round_mode FLOOR is not supported, only Caffe's own CEIL")
    operation = "ave_pool" if param.pool == 1 else "max_pool"
    args = {"stride": _pair(param, "stride", 1), "pad": _pair(param, "pad", 0)}
    if param.global_pooling:
        if args != {"stride": [1, 1], "pad": [0, 0]}:
            raise KdError("global pooling takes neither stride nor padding")
        return operation, {}
    return operation, {"kernel": _pair(param, "kernel", None, "kernel_size"), **args}


def _lrn(layer: Layer) -> Node:
    param = layer.param.lrn_param
    if param.norm_region != 0:
        raise KdError("normalisation within a channel is not supported, only across channels")
    size, alpha, beta, k = int(param.local_size), float(param.alpha), float(param.beta), float(param.k)
    return "lrn", {"size": size, "alpha": alpha, "beta": beta, "k": k}


def _scale(layer: Layer) -> Node:
    param = layer.param.scale_param
    if len(layer.bottoms) != 1 or param.axis != 1 or param.num_axes != 1:
        raise KdError("only one factor a channel is supported")
    return "scale", {"bias": bool(param.bias_term)}


def _concat(layer: Layer) -> Node:
    param = layer.param.concat_param
    return "concat", {"axis": int(param.concat_dim if param.HasField("concat_dim") else param.axis)}


def _eltwise(layer: Layer) -> Node:
    param = layer.param.eltwise_param
    operation = ("prod", "sum", "max")[param.operation]
    coefficients = [float(value) for value in param.coeff]
    return "eltwise", {"operation": operation, "coefficients": coefficients}


def _flatten(layer: Layer) -> Node:
    param = layer.param.flatten_param if hasattr(layer.param, "flatten_param") else None
    if param is not None and (param.axis, param.end_axis) != (1, -1):
        raise KdError("only flattening everything but the batch is supported")
    return "flatten", {}


def _softmax(layer: Layer) -> Node:
    if layer.param.softmax_param.axis not in (1,):
        raise KdError("only the softmax over channels is supported")
    return "softmax", {}


LAYERS: dict[str, Callable[[Layer], Node]] = {
    "Convolution": _convolution,
    "InnerProduct": _inner_product,
    "Pooling": _pooling,
    "LRN": _lrn,
    "BatchNorm": lambda layer: ("batch_norm", {"eps": float(layer.param.batch_norm_param.eps)}),
    "Scale": _scale,
    "Concat": _concat,
    "Eltwise": _eltwise,
    "ReLU": lambda layer: ("relu", {"negative_slope": float(layer.param.relu_param.negative_slope)}),
    "Dropout": lambda layer: ("dropout", {"ratio": float(layer.param.dropout_param.dropout_ratio)}),
    "Flatten": _flatten,
    "Softmax": _softmax,
    "Sigmoid": lambda layer: ("sigmoid", {}),
    "TanH": lambda layer: ("tanh", {}),
}
