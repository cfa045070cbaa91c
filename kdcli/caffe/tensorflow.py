"""caffe-tensorflow's `.npy`: a pickled dict of layers → a registered network.

Layouts: {layer: {weights, biases}} of its later releases, {layer: [weights, biases]} of the first ones, and flat
{layer/weights, layer/biases}. Convolutions are stored as HWIO, inner products as (K, N) with K in H, W, C order
after a convolution; kd holds OIHW, and (N, K) with K in C, H, W order, as Caffe does.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcli.base import pickles
from kdcli.base.errors import KdError
from kdcli.base.text import dims
from kdcli.caffe.network import ConvertedNetwork
from kdcli.caffe.read import Array, Weights, finite, text

Layers = dict[str, tuple[Array, Array]]  # name → weights, biases, as stored

_NIN = {"conv1": 5, "cccp1": 1, "cccp2": 1, "conv2": 5, "cccp3": 1, "cccp4": 1, "conv3": 3, "cccp5": 1}
KERNELS: dict[str, dict[str, int]] = {  # registered network → layer → kernel side; 0 for an inner product
    "nin": {**_NIN, "cccp6": 1},
    "nin-fc": {**_NIN, "ip1": 0, "ip2": 0},
    "lenet": {"conv1": 5, "conv2": 5, "ip1": 0, "ip2": 0},
}
_PARTS = ("weights", "biases")


def read_layers(path: Path) -> Layers:
    """The layers of a `.npy`, of which nothing is executed; KdError without finite weights and biases."""
    layers: Layers = {}
    for name, parts in _by_layer(pickles.load_npy(path), path).items():
        if set(parts) != set(_PARTS):
            raise KdError(
                f"{path}: layer {name} holds {', '.join(sorted(parts)) or 'nothing'}, not weights and biases"
            )
        weights, biases = (_floats(parts[part], f"{path}: layer {name}, {part}") for part in _PARTS)
        if weights.ndim not in (2, 4) or biases.shape != weights.shape[-1:]:
            raise KdError(f"{path}: layer {name}: weights {dims(weights.shape)}, biases {dims(biases.shape)}")
        layers[name] = (weights, biases)
    return layers


def _by_layer(content: Mapping[Any, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Layer → part → values, from any of the layouts."""
    layers: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        name = text(key)
        layer, _, part = name.rpartition("/")
        if isinstance(value, Mapping):
            parts = {text(part): array for part, array in value.items()}
        elif isinstance(value, list | tuple) and len(value) == len(_PARTS):
            parts = dict(zip(_PARTS, value, strict=True))
        elif layer and isinstance(value, np.ndarray):
            name, parts = layer, {part.removesuffix(":0"): value}  # `:0` is TensorFlow's number of the output
        else:
            raise KdError(f"{path}: layer {name} must be a pair of weights and biases")
        layers.setdefault(name, {}).update(parts)
    return layers


def _floats(value: object, context: str) -> Array:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.size == 0:
        raise KdError(f"{context} are not floating-point numbers")
    return finite(value, context)


def identify(layers: Layers, arch: str) -> tuple[str, Layers]:
    """The registered network that has these layers (`arch`, or any for `auto`), and the layers under its names.

    Layers of other names are recognised by their kernels, in the order of the file.
    """
    candidates = KERNELS if arch == "auto" else {arch: KERNELS[arch]}
    kernels = {name: weights.shape[0] if weights.ndim == 4 else 0 for name, (weights, _) in layers.items()}
    for name, layout in candidates.items():
        if kernels == layout:
            return name, {layer: layers[layer] for layer in layout}
        if list(kernels.values()) == list(layout.values()):
            return name, dict(zip(layout, layers.values(), strict=True))
    known = "; ".join(f"{name}: {_listed(layout)}" for name, layout in candidates.items())
    kind = "known network" if arch == "auto" else "network of that --arch"
    raise KdError(f"no {kind} has the layers {_listed(kernels)}", f"Layers of {known}.")


def _listed(kernels: dict[str, int]) -> str:
    """`conv1 5×5, ip1`."""
    return ", ".join(f"{name} {side}×{side}" if side else name for name, side in kernels.items())


def caffe_layout(layers: Layers) -> Weights:
    """Arrays in Caffe's layout: OIHW, and (N, K) with K in C, H, W order."""
    result: Weights = {}
    channels = 0  # of the maps that an inner product flattens; 0 after another inner product
    for name, (stored, biases) in layers.items():
        weights = stored
        if weights.ndim == 4:
            channels = weights.shape[3]
            result[name] = (np.ascontiguousarray(weights.transpose(3, 2, 0, 1)), biases)
            continue
        features, outputs = weights.shape
        if channels:
            side = math.isqrt(features // channels)
            if side * side * channels != features:
                raise KdError(f"layer {name}: {features} inputs are no square map of {channels} channels")
            weights = weights.reshape(side, side, channels, outputs).transpose(2, 0, 1, 3)
        result[name] = (np.ascontiguousarray(weights.reshape(features, outputs).T), biases)
        channels = 0
    return result


def input_size(arch: str, layers: Layers) -> tuple[int, int, int] | None:
    """(H, W, C) where an inner product gives it: `nin` averages maps of any size."""
    if arch == "nin":
        return None
    maps = layers["cccp5" if arch == "nin-fc" else "conv2"][0].shape[3]
    side = math.isqrt(layers["ip1"][0].shape[0] // maps)
    pixels = 4 * side if arch == "nin-fc" else 2 * (2 * side + 4) + 4
    return pixels, pixels, layers["conv1"][0].shape[2]


def build(arch: str, weights: Weights) -> ConvertedNetwork:
    """The registered network, and the weights, in Caffe's layout, as its state."""
    outputs = {name: int(biases.shape[0]) for name, (_, biases) in weights.items()}
    wide = ("conv1", "conv2", "ip1") if arch == "lenet" else _NIN
    arch_args: dict[str, Any] = {"widths": [outputs[name] for name in wide]}
    if arch == "nin-fc":
        arch_args["hidden"] = outputs["ip1"]
    classes = list(outputs.values())[-1]
    state: dict[str, Tensor] = {}
    for name, (weight, bias) in weights.items():
        state[f"{name}.weight"] = torch.from_numpy(weight.copy())
        state[f"{name}.bias"] = torch.from_numpy(bias.copy())
    return ConvertedNetwork(arch, arch_args, state, classes)
