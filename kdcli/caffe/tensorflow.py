"""caffe-tensorflow's `.npy`: a pickled dict of layers, onto the networks kd knows by name.

Layouts: {layer: {weights, biases}} of its later releases, {layer: [weights, biases]} of its first ones, and flat
{layer/weights, layer/biases}.
Convolutions are stored HWIO, inner products (K, N) with K in H, W, C order where they follow a convolution;
kd holds OIHW and (N, K) with K in C, H, W order, as Caffe does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcli import models
from kdcli.base import safe_pickle
from kdcli.base.errors import KdError
from kdcli.base.text import dims
from kdcli.caffe.network import Built, LayerRow
from kdcli.caffe.read import Array, Weights
from kdcli.models.operations.shapes import Shape

Layers = dict[str, tuple[Array, Array]]  # name → weights, biases, as stored

_NIN = ("conv1", "cccp1", "cccp2", "conv2", "cccp3", "cccp4", "conv3", "cccp5")
_PARTS = ("weights", "biases")
LAYOUTS: dict[str, tuple[str, ...]] = {  # registered network → its layers in order
    "nin": (*_NIN, "cccp6"),
    "nin-fc": (*_NIN, "ip1", "ip2"),
    "lenet": ("conv1", "conv2", "ip1", "ip2"),
}


_NIN_KERNELS = dict.fromkeys(_NIN, 1) | {"conv1": 5, "conv2": 5, "conv3": 3}
_KERNELS: dict[str, dict[str, int]] = {  # of the convolutions
    "nin": {**_NIN_KERNELS, "cccp6": 1},
    "nin-fc": _NIN_KERNELS,
    "lenet": {"conv1": 5, "conv2": 5},
}


def read_layers(path: Path) -> Layers:
    """The layers of a `.npy`, read without executing anything in it.

    Raises:
        KdError: not a dict of layers with weights and biases of finite numbers.
    """
    content = safe_pickle.load_npy(path)
    if isinstance(content, np.ndarray) and content.shape == ():
        content = content.item()
    if not isinstance(content, Mapping) or not content:
        raise KdError(f"{path} is not a caffe-tensorflow file: it holds no dict of layers")
    layers: Layers = {}
    for name, parts in _by_layer(content, path).items():
        if set(parts) != {"weights", "biases"}:
            raise KdError(
                f"{path}: layer {name} holds {', '.join(sorted(parts)) or 'nothing'}, not weights and biases"
            )
        weights, biases = (
            _numbers(parts[part], f"{path}: layer {name}, {part}") for part in ("weights", "biases")
        )
        if weights.ndim not in (2, 4) or biases.shape != weights.shape[-1:]:
            raise KdError(f"{path}: layer {name}: weights {dims(weights.shape)}, biases {dims(biases.shape)}")
        layers[name] = (weights, biases)
    return layers


def _by_layer(content: Mapping[Any, Any], path: Path) -> dict[str, dict[str, Any]]:
    """Layer → part → values, from any of the layouts."""
    layers: dict[str, dict[str, Any]] = {}
    for key, value in content.items():
        name = _text(key)
        layer, _, part = name.rpartition("/")
        if isinstance(value, Mapping):
            found = {_text(word): array for word, array in value.items()}
        elif isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype == object):
            if len(value) != len(_PARTS):
                raise KdError(f"{path}: layer {name} is a list of {len(value)}, not of weights and biases")
            found = dict(zip(_PARTS, value, strict=True))
        elif layer and isinstance(value, np.ndarray):
            name, found = layer, {part.removesuffix(":0"): value}  # TensorFlow numbers a variable's outputs
        else:
            raise KdError(f"{path}: layer {name} is not a dict of weights and biases")
        twice = set(found) & set(layers.get(name, ()))
        if twice:
            raise KdError(f"{path}: layer {name} holds {', '.join(sorted(twice))} twice")
        layers.setdefault(name, {}).update(found)
    return layers


def _text(key: object) -> str:
    return key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key)


def _numbers(value: object, where: str) -> Array:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or value.size == 0:
        raise KdError(f"{where} are not floating-point numbers")
    values: Array = value.astype(np.float32)
    if not np.isfinite(values).all():
        raise KdError(f"{where}: some values are not finite")
    return values


def known_names(layers: Layers) -> Layers:
    """Layers under the names of the network they belong to: their own, or those of the network that has their kinds,
    kernels and widths in the order of the file. Of none that kd knows: as they are."""
    if any(set(names) == set(layers) for names in LAYOUTS.values()):
        return layers
    arch = next((arch for arch in LAYOUTS if _looks_like(arch, list(layers.values()))), None)
    return layers if arch is None else dict(zip(LAYOUTS[arch], layers.values(), strict=True))


def detect(layers: Layers) -> str:
    """The network whose layers these are.

    Raises:
        KdError: of none that kd knows.
    """
    for arch, names in LAYOUTS.items():
        if set(names) == set(layers):
            return arch
    known = "; ".join(f"{arch}: {', '.join(names)}" for arch, names in LAYOUTS.items())
    raise KdError(f"no known network has the layers {', '.join(layers)}", f"kd knows {known}.")


def _looks_like(arch: str, stored: list[tuple[Array, Array]]) -> bool:
    """Whether layers in this order have a network's kinds and kernels, each reading what the one before it writes."""
    names = LAYOUTS[arch]
    if len(stored) != len(names):
        return False
    before = 0
    for name, (weights, _) in zip(names, stored, strict=True):
        kernel = _KERNELS[arch].get(name)
        if kernel is None:
            fits = weights.ndim == 2 and before > 0 and weights.shape[0] % before == 0
        else:
            fits = weights.ndim == 4 and weights.shape[:3] == (kernel, kernel, before or weights.shape[2])
        if not fits:
            return False
        before = weights.shape[-1]
    return True


def caffe_layout(layers: Layers) -> Weights:
    """Arrays as Caffe holds them: OIHW, and (N, K) with K in C, H, W order."""
    result: Weights = {}
    channels = 0  # of the maps that an inner product would flatten; 0 after one
    order = next((names for names in LAYOUTS.values() if set(names) == set(layers)), tuple(layers))
    for name in order:
        weights, biases = layers[name]
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


def input_size(layers: Layers) -> tuple[int, int, int] | None:
    """(H, W, C) if an inner product tells it."""
    before = "cccp5" if "cccp5" in layers else "conv2"
    if not {"conv1", "ip1", before} <= set(layers) or layers["conv1"][0].ndim != 4:
        return None
    colours = layers["conv1"][0].shape[2]
    side = math.isqrt(layers["ip1"][0].shape[0] // layers[before][0].shape[-1])
    pixels = 4 * side if before == "cccp5" else 2 * (2 * side + 4) + 4
    return pixels, pixels, colours


def build(layers: Layers, arch: str, size: tuple[int, int, int]) -> Built:
    """The registered network that takes these layers.

    Args:
        arch: a key of `LAYOUTS`, or `auto`.
        size: (H, W, C) of the images.

    Raises:
        KdError: layers missing, left over, or of other shapes; names the layer and both shapes.
    """
    arch = detect(layers) if arch == "auto" else arch
    names = LAYOUTS[arch]
    for name in names:
        if name not in layers:
            raise KdError(f"layer {name}: {arch} needs it, the file holds {', '.join(layers)}", "See --arch.")
    extra = [name for name in layers if name not in names]
    if extra:
        raise KdError(f"layer {extra[0]}: {arch} has no such layer", "See --arch.")
    for name in names:
        wanted = 2 if name.startswith("ip") else 4
        if layers[name][0].ndim != wanted:
            raise KdError(
                f"layer {name}: weights are {dims(layers[name][0].shape)}, {arch} wants {wanted} axes"
            )
    stored = caffe_layout(layers)
    arch_args = _widths(arch, stored)
    classes = stored[names[-1]][1].shape[0]
    with torch.device("meta"):  # shapes alone
        network = models.build(arch, classes=classes, input_size=size, **arch_args)
    state: dict[str, Tensor] = {}
    for name, (weights, biases) in stored.items():
        module = network.get_submodule(name)
        for part, array in (("weight", weights), ("bias", biases)):
            shape = tuple(module.get_parameter(part).shape)
            if array.shape != shape:
                raise KdError(
                    f"layer {name}: {part} in the file is {dims(array.shape)}, {arch} wants {dims(shape)} "
                    f"for images of {dims(size)}"
                )
            state[f"{name}.{part}"] = torch.from_numpy(array.copy())
    return Built(arch, arch_args, state, classes, size, _rows(network, size))


def _widths(arch: str, stored: Weights) -> dict[str, Any]:
    outputs = {name: int(arrays[1].shape[0]) for name, arrays in stored.items()}
    if arch == "lenet":
        return {"widths": [outputs["conv1"], outputs["conv2"], outputs["ip1"]]}
    widths: dict[str, Any] = {"widths": [outputs[name] for name in _NIN]}
    return {**widths, "hidden": outputs["ip1"]} if arch == "nin-fc" else widths


_KINDS: dict[type[nn.Module], str] = {
    nn.Conv2d: "Convolution",
    nn.Linear: "InnerProduct",
    nn.MaxPool2d: "Pooling",
    nn.AvgPool2d: "Pooling",
    nn.Dropout: "Dropout",
}


def _rows(network: nn.Module, size: tuple[int, int, int]) -> tuple[LayerRow, ...]:
    shapes: dict[str, Shape] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            shapes[name] = tuple(output.shape[1:])

        return hook

    for name, module in network.named_children():
        module.register_forward_hook(record(name))
    height, width, channels = size
    with torch.inference_mode():
        network.eval()(torch.empty((1, channels, height, width), device="meta"))
    rows = []
    for name, shape in shapes.items():
        module = network.get_submodule(name)
        held = {part: tuple(value.shape) for part, value in module.named_parameters()}
        kind = _KINDS.get(type(module), type(module).__name__)
        rows.append(LayerRow(name, kind, shape, held, sum(math.prod(part) for part in held.values())))
    return tuple(rows)
