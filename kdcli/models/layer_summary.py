"""What a network is made of: its layers in the order they run, with shapes, parameters and work."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerSummary:
    """One layer, each time it runs.

    Attributes:
        name: its path in the network.
        kind: what it computes, as it is printed.
        output: shape of what it gives for one image.
        parameters: its trainable values; 0 where they were counted before.
        macs: multiply-accumulates of one image; 0 for all but convolutions and linear layers. None if not known.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    macs: int | None


def summarize_layers(network: nn.Module, prepared: Tensor) -> list[LayerSummary]:
    """The modules without parts of their own, as one image passes them.

    Args:
        network: prepared (B, C, H, W) → logits.
        prepared: any input of it.
    """
    rows: list[LayerSummary] = []
    names = {module: name for name, module in network.named_modules()}
    seen: set[int] = set()

    def look(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        own = [value for value in module.parameters() if id(value) not in seen]
        seen.update(map(id, own))
        count = sum(value.numel() for value in own)
        kind = " ".join(repr(module).split())
        rows.append(
            LayerSummary(names[module], kind, tuple(output.shape[1:]), count, _macs(module, inputs, output))
        )

    leaves = [module for module in network.modules() if not any(module.children())]
    handles = [leaf.register_forward_hook(look) for leaf in leaves]
    try:
        with torch.inference_mode():
            network(prepared[:1])
    finally:
        for handle in handles:
            handle.remove()
    return rows


def count_macs(network: nn.Module, prepared: Tensor) -> int:
    """Multiply-accumulates of one image in convolutions and linear layers, see `summarize_layers`."""
    return sum(row.macs or 0 for row in summarize_layers(network, prepared))


def _macs(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> int:
    if isinstance(module, nn.Linear):
        return output[0].numel() * module.in_features
    if isinstance(module, nn.Conv2d):
        return output[0].numel() * module.in_channels // module.groups * math.prod(module.kernel_size)
    if isinstance(module, nn.ConvTranspose2d):
        return inputs[0][0].numel() * module.out_channels // module.groups * math.prod(module.kernel_size)
    return 0
