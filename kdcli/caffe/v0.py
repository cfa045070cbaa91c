"""Caffe's oldest form, V0: `layers { layer { type: "conv" kernelsize: 5 … } }`, brought to V1."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcli.base.errors import KdError
from kdcli.caffe import schema

_TYPES = {
    "accuracy": "ACCURACY", "bnll": "BNLL", "concat": "CONCAT", "conv": "CONVOLUTION", "data": "DATA",
    "dropout": "DROPOUT", "euclidean_loss": "EUCLIDEAN_LOSS", "flatten": "FLATTEN", "hdf5_data": "HDF5_DATA",
    "hdf5_output": "HDF5_OUTPUT", "im2col": "IM2COL", "images": "IMAGE_DATA", "infogain_loss": "INFOGAIN_LOSS",
    "innerproduct": "INNER_PRODUCT", "lrn": "LRN", "multinomial_logistic_loss": "MULTINOMIAL_LOGISTIC_LOSS",
    "pool": "POOLING", "relu": "RELU", "sigmoid": "SIGMOID", "softmax": "SOFTMAX",
    "softmax_loss": "SOFTMAX_LOSS", "split": "SPLIT", "tanh": "TANH", "window_data": "WINDOW_DATA",
}  # fmt: skip
_PADDING = "padding"  # a layer of its own then; Caffe folds it into the layer that reads it
_FIELDS: dict[str, dict[str, str]] = {  # V0 type → V0 field → where it went
    "conv": {
        "num_output": "convolution_param.num_output", "biasterm": "convolution_param.bias_term",
        "pad": "convolution_param.pad", "kernelsize": "convolution_param.kernel_size",
        "group": "convolution_param.group", "stride": "convolution_param.stride",
    },
    "innerproduct": {
        "num_output": "inner_product_param.num_output", "biasterm": "inner_product_param.bias_term",
    },
    "pool": {
        "pool": "pooling_param.pool", "pad": "pooling_param.pad", "kernelsize": "pooling_param.kernel_size",
        "stride": "pooling_param.stride",
    },
    "dropout": {"dropout_ratio": "dropout_param.dropout_ratio"},
    "lrn": {
        "local_size": "lrn_param.local_size", "alpha": "lrn_param.alpha", "beta": "lrn_param.beta",
        "k": "lrn_param.k",
    },
    "concat": {"concat_dim": "concat_param.concat_dim"},
    "data": {
        "scale": "data_param.scale", "meanfile": "data_param.mean_file", "cropsize": "data_param.crop_size",
    },
    "images": {
        "scale": "image_data_param.scale", "meanfile": "image_data_param.mean_file",
        "cropsize": "image_data_param.crop_size",
    },
    "window_data": {
        "scale": "window_data_param.scale", "meanfile": "window_data_param.mean_file",
        "cropsize": "window_data_param.crop_size",
    },
}  # fmt: skip


def upgraded(params: Sequence[Any], path: Path) -> list[Any]:
    """V1LayerParameters as they are; if they hold V0's, what V1 makes of those, paddings folded in.

    Raises:
        KdError: V0 and V1 in one file, a type that V0 does not have, or a padding that nothing can take up.
    """
    old = [param.HasField("layer") for param in params]
    if not any(old):
        return list(params)
    if not all(old):
        raise KdError(
            f"{path} mixes Caffe's V0 and V1 layers", "A network is written in one form or the other."
        )
    padded: dict[str, tuple[str, int]] = {}  # a padding's blob → the blob it pads, by how much
    layers = []
    for param in params:
        inner = param.layer
        name = inner.name if isinstance(inner.name, str) else "(not UTF-8)"
        if inner.type == _PADDING:
            if len(param.bottom) != 1 or len(param.top) != 1:
                raise KdError(f"{path}: layer {name} (padding) must have one input and one output")
            padded[param.top[0]] = (param.bottom[0], int(inner.pad))
            continue
        bottoms, pad = list(param.bottom), 0
        if any(bottom in padded for bottom in bottoms):
            if inner.type not in ("conv", "pool") or len(bottoms) != 1 or inner.pad:
                raise KdError(f"{path}: layer {name} ({inner.type}) cannot take up the padding before it")
            bottoms[0], pad = padded[bottoms[0]]
        layers.append(_layer(param, bottoms, pad, f"{path}: layer {name}"))
    return layers


def _layer(param: Any, bottoms: list[str], pad: int, where: str) -> Any:
    inner = param.layer
    if inner.type not in _TYPES:
        raise KdError(
            f"{where}: unknown type {inner.type or '(none)'}", f"V0 knows {', '.join(sorted(_TYPES))}."
        )
    layer = schema.v1_layer()
    layer.name = inner.name
    layer.type = schema.v1_type_number(_TYPES[inner.type])
    layer.bottom.extend(bottoms)
    layer.top.extend(param.top)
    layer.blobs.extend(inner.blobs or param.blobs)
    for field, place in _FIELDS.get(inner.type, {}).items():
        if inner.HasField(field):
            _put(layer, place, getattr(inner, field))
    if pad:
        _put(layer, f"{'convolution' if inner.type == 'conv' else 'pooling'}_param.pad", pad)
    return layer


def _put(layer: Any, place: str, value: Any) -> None:
    message, field = place.split(".")
    target = getattr(layer, message)
    current = getattr(target, field)
    if hasattr(current, "append"):
        current.append(value)
    else:
        setattr(target, field, value)
