"""What lies between a network's pixels and its logits, read off by hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.base.errors import UsageError

_PASSING = (nn.Dropout, nn.Dropout2d, nn.Identity)  # what they give is what they got


class FeatureExtractor(nn.Module):
    """A network that gives its features beside its logits. It has the network's weights and none of its own.

    Attributes:
        network: float32 (B, C, H, W) → logits (B, classes).
        stages: names of submodules whose outputs are the maps, from input to output, see `find_stages`.
    """

    def __init__(self, network: nn.Module, stages: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.stages = tuple(stages)
        self._kept: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        for name in self.stages:
            self._hooks.append(network.get_submodule(name).register_forward_hook(self._keeper(name)))
        head = getattr(network, "head", None)
        self._head = head if isinstance(head, str) else None
        if self._head is not None:
            layer = network.get_submodule(self._head)
            self._hooks.append(layer.register_forward_pre_hook(self._keep_embedding))

    def remove(self) -> None:
        """Leave the network as it was found."""
        for hook in self._hooks:
            hook.remove()

    def _keeper(self, name: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._kept[name] = output

        return keep

    def _keep_embedding(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._kept[""] = inputs[0]

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Preprocessed pixels (B, C, H, W) → logits (B, classes), maps (B, C, H, W) of each stage, embedding (B, D).

        The embedding is what the last linear layer reads; where there is none, the means of the last maps.
        """
        logits = self.network(pixels)
        maps = [self._kept[name] for name in self.stages]
        embedding = self._kept[""] if self._head is not None else maps[-1].mean(dim=(2, 3))
        self._kept = {}
        return logits, maps, embedding.flatten(1)


def find_stages(network: nn.Module, example: Tensor, wanted: str = "") -> tuple[str, ...]:
    """Names of the submodules whose outputs are the maps at the end of each stage, from input to output.

    These are the ones asked for, else those the network names in `stages`, else the last maps of each size, larger
    than 1×1. Maps with one channel a class are passed over where there are others of their size: they are the answer.

    Args:
        example: a prepared batch (B, C, H, W).
        wanted: names joined by commas.

    Raises:
        UsageError: one that is asked for is not there, or gives no maps; or the network has none.
    """
    ran, classes = _outputs(network, example)
    if wanted:
        names = tuple(word.strip() for word in wanted.split(","))
        for name in names:
            if name not in ran:
                maps = [known for known, shapes in ran.items() if len(shapes) == 1 and len(shapes[0]) == 4]
                raise UsageError(
                    f"the network has no layer {name!r} that runs", f"It has {', '.join(maps[:12])} …"
                )
            if len(ran[name]) > 1 or len(ran[name][0]) != 4:
                raise UsageError(
                    f"layer {name} does not give maps (B, C, H, W), once", "kd info lists layers."
                )
        if len(set(names)) < len(names):
            raise UsageError(f"{wanted} names a layer twice", "Name each once.")
        order = list(ran)
        return tuple(sorted(names, key=order.index))
    own = getattr(network, "stages", None)
    if own:
        return tuple(own)
    last: dict[tuple[int, int], str] = {}
    for name, shapes in ran.items():
        if len(shapes) != 1 or len(shapes[0]) != 4 or isinstance(network.get_submodule(name), _PASSING):
            continue
        _, channels, height, width = shapes[0]
        if height * width > 1 and not (channels == classes and (height, width) in last):
            last.pop((height, width), None)
            last[height, width] = name
    if not last:
        raise UsageError("the network has no maps larger than 1×1 that a method of features could read")
    return tuple(last.values())


def _outputs(network: nn.Module, example: Tensor) -> tuple[dict[str, list[tuple[int, ...]]], int]:
    """Shapes of what each submodule gives, in the order in which they end, and the number of classes."""
    found: dict[str, list[tuple[int, ...]]] = {}
    hooks = []

    def noter(name: str) -> Any:
        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found.setdefault(name, []).append(tuple(output.shape))

        return note

    for name, module in network.named_modules():
        if name:
            hooks.append(module.register_forward_hook(noter(name)))
    training = network.training
    try:
        network.eval()
        with torch.no_grad():
            logits = network(example)
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    return found, logits.shape[1]
