"""Features of a network: the maps at the end of each stage and the embedding, read by hooks."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from kdcli.base.errors import UsageError
from kdcli.models.layers import run_with_hooks

_IDENTITIES = (nn.Dropout, nn.Dropout2d, nn.Identity)  # in eval mode their output is their input


class FeatureExtractor(nn.Module):
    """A network that returns its features and its logits. Its weights are the network's.

    `stages` are the names of submodules whose outputs are the maps, from input to output, see `find_stages`.
    """

    def __init__(self, network: nn.Module, stages: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.stages = tuple(stages)
        self._features: dict[str, Tensor] = {}
        self._head: str | None = getattr(network, "head_name", None)
        self._hooks = [
            network.get_submodule(name).register_forward_hook(partial(self._store, name))
            for name in (*self.stages, *([] if self._head is None else [self._head]))
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _store(self, name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._features[name] = inputs[0] if name == self._head else output

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Preprocessed pixels (B, C, H, W) → logits (B, classes), maps (B, C, H, W) of each stage, embedding (B, D).

        The embedding is the input of the last linear layer; without one, the means of the last maps.
        """
        logits = self.network(pixels)
        maps = [self._features[name] for name in self.stages]
        embedding = maps[-1].mean(dim=(2, 3)) if self._head is None else self._features[self._head]
        self._features = {}
        return logits, maps, embedding.flatten(1)


def find_stages(
    network: nn.Module, example: Tensor, wanted: str = "", owner: str = "the network"
) -> tuple[str, ...]:
    """Names of the submodules whose outputs are the maps at the end of each stage, from input to output.

    In order of preference: the wanted ones; the network's attribute `stage_names`; the last maps of each size above
    1×1. Of the last, maps with one channel per class, which are logits, are skipped where others have their size.
    Outputs with channels last, as of swin transformers, are no maps.

    Args:
        example: a prepared batch (B, C, H, W).
        wanted: names joined by commas; UsageError if one returns no maps.
    """
    shapes: dict[str, list[tuple[int, ...]]] = {}  # of each output, one per call, in the order of their ends

    def record(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if name and isinstance(output, Tensor):
            shapes.setdefault(name, []).append(tuple(output.shape))

    classes = run_with_hooks(network, example, record).shape[1]
    maps = _channels_first({name: calls[0] for name, calls in shapes.items() if len(calls) == 1}, example)
    if wanted:
        names = [word.strip() for word in wanted.split(",")]
        for name in names:
            if name not in maps:
                raise UsageError(
                    f"{owner} has no layer {name!r} that returns maps (B, C, H, W) once per pass",
                    f"It has {', '.join(list(maps)[:12])} …",
                )
        return tuple(name for name in maps if name in names)
    own = getattr(network, "stage_names", None)
    if own:
        return tuple(own)
    last: dict[tuple[int, int], str] = {}
    for name, (_, channels, height, width) in maps.items():
        is_logits = channels == classes and (height, width) in last
        if height * width > 1 and not is_logits and not isinstance(network.get_submodule(name), _IDENTITIES):
            last.pop((height, width), None)  # to the end of the order
            last[height, width] = name
    if not last:
        raise UsageError(f"{owner} has no maps larger than 1×1, which methods that compare features need")
    return tuple(last.values())


def _channels_first(shapes: Mapping[str, tuple[int, ...]], example: Tensor) -> dict[str, tuple[int, ...]]:
    """The shapes (B, C, H, W), without (B, H, W, C): those whose last two sides have the aspect of the images.

    Cubes, which fit both, are left out where another output has its channels last.
    """
    aspect = example.shape[2] / example.shape[3]

    def difference(height: int, width: int) -> float:
        return abs(math.log(height / width / aspect))

    four = {name: shape for name, shape in shapes.items() if len(shape) == 4 and 0 not in shape}
    excess = {name: difference(*shape[2:]) - difference(*shape[1:3]) for name, shape in four.items()}
    mixed = any(value > 0 for value in excess.values())
    return {name: four[name] for name, value in excess.items() if value < 0 or (value == 0 and not mixed)}
