"""Summary of a network: its layers in the order they run, with shapes, parameters and multiply-accumulates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerSummary:
    """One call of a layer.

    Attributes:
        name: path in the network.
        kind: the module's repr in one line.
        output: shape of the output for one image.
        parameters: trainable values; 0 if an earlier call counted them.
        macs: multiply-accumulates per image; 0 except in convolutions and linear layers. None if unknown.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    macs: int | None


def summarize_layers(network: nn.Module, prepared: Tensor) -> list[LayerSummary]:
    """Summaries of the modules without children, in the order in which one image passes them.

    Args:
        network: prepared (B, C, H, W) → logits.
        prepared: any input of the network.
    """
    rows: list[LayerSummary] = []
    names = {module: name for name, module in network.named_modules()}
    seen: set[int] = set()

    def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        new = [value for value in module.parameters() if id(value) not in seen]
        seen.update(map(id, new))
        count = sum(value.numel() for value in new)
        kind = " ".join(repr(module).split())
        rows.append(
            LayerSummary(names[module], kind, tuple(output.shape[1:]), count, _macs(module, inputs, output))
        )

    leaves = [module for module in network.modules() if not any(module.children())]
    handles = [leaf.register_forward_hook(record) for leaf in leaves]
    try:
        with torch.inference_mode():
            network(prepared[:1])
    finally:
        for handle in handles:
            handle.remove()
    return rows


def count_macs(network: nn.Module, prepared: Tensor) -> int:
    """Multiply-accumulates per image in convolutions and linear layers, see `summarize_layers`."""
    return sum(row.macs or 0 for row in summarize_layers(network, prepared))


def _macs(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    if isinstance(module, nn.Linear):
        return output[0].numel() * module.in_features
    if isinstance(module, nn.Conv2d):
        return output[0].numel() * module.in_channels // module.groups * math.prod(module.kernel_size)
    if isinstance(module, nn.ConvTranspose2d):
        return inputs[0][0].numel() * module.out_channels // module.groups * math.prod(module.kernel_size)
    return 0
