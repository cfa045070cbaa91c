"""Layers of a network in the order they run, with shapes, parameters and multiply-accumulates."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerSummary:
    """One call of a layer: path in the network, the module's repr in one line, shape and work.

    `macs` are multiply-accumulates per image; 0 except in convolutions and linear layers. None if unknown.
    """

    name: str
    kind: str
    output: tuple[int, ...]  # shape of the output for one image
    parameters: int  # trainable values; 0 if an earlier call counted them
    macs: int | None


@dataclass(frozen=True)
class ModelCounts:
    """Size and work of a model."""

    parameters: int  # trainable values (of an ONNX file: values in weight tensors, without scales of int8)
    network_bytes: int  # weights and buffers of the network
    preprocessing_bytes: int  # constants of the preprocessing in the file
    macs: int | None  # multiply-accumulates of one image in convolutions and linear layers; None if unknown
    precision: str  # fp32, fp16 or int8
    layers: tuple[LayerSummary, ...]  # in the order they run


def run_with_hooks(
    network: nn.Module, prepared: Tensor, hook: Callable[[str, nn.Module, Any, Any], None]
) -> Tensor:
    """Run a network once in eval mode; `hook(name, module, inputs, output)` is called after each submodule."""
    handles = [module.register_forward_hook(partial(hook, name)) for name, module in network.named_modules()]
    training = network.training
    try:
        with torch.no_grad():
            logits: Tensor = network.eval()(prepared)
    finally:
        network.train(training)
        for handle in handles:
            handle.remove()
    return logits


def summarize_layers(network: nn.Module, prepared: Tensor) -> list[LayerSummary]:
    """Summaries of the modules without children, in the order in which one image (B, C, H, W) passes them."""
    rows: list[LayerSummary] = []
    seen: set[int] = set()
    called: set[str] = set()

    def record(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        called.add(name)
        if any(module.children()) or not isinstance(output, Tensor):
            return
        new = [value for value in module.parameters() if id(value) not in seen]
        seen.update(map(id, new))
        count = sum(value.numel() for value in new)
        kind = " ".join(repr(module).split())
        rows.append(LayerSummary(name, kind, tuple(output.shape[1:]), count, _macs(module, inputs, output)))

    run_with_hooks(network, prepared[:1], record)
    for name, module in network.named_modules():  # attention uses the weights of such layers without a call
        if isinstance(module, _COUNTED) and name not in called and name.rpartition(".")[0] in called:
            rows.append(LayerSummary(name, " ".join(repr(module).split()), (), parameter_count(module), None))
    return rows


def count_network(network: nn.Module, prepared: Tensor, preprocess: nn.Module | None = None) -> ModelCounts:
    """Size and work of a network for images like the first of (B, C, H, W), and of its preprocessing."""
    layers = tuple(summarize_layers(network, prepared))
    parts = (network, preprocess or nn.Identity())
    network_bytes, preprocessing_bytes = (
        sum(value.numel() * value.element_size() for value in part.state_dict().values()) for part in parts
    )
    macs = None if any(layer.macs is None for layer in layers) else sum(layer.macs or 0 for layer in layers)
    return ModelCounts(parameter_count(network), network_bytes, preprocessing_bytes, macs, "fp32", layers)


def parameter_count(module: nn.Module) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in module.parameters())


_COUNTED = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


def _macs(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    if isinstance(module, nn.Linear):
        return output[0].numel() * module.in_features
    if isinstance(module, nn.Conv2d):
        return output[0].numel() * module.in_channels // module.groups * math.prod(module.kernel_size)
    if isinstance(module, nn.ConvTranspose2d):
        return inputs[0][0].numel() * module.out_channels // module.groups * math.prod(module.kernel_size)
    return 0
