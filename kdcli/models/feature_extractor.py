"""Features of a network: the maps at the end of each stage and the embedding, read by hooks."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kdcli.base.errors import UsageError
from kdcli.models.layers import run_with_hooks

_IDENTITIES = (nn.Dropout, nn.Dropout2d, nn.Identity)  # in eval mode their output is their input
_EMBEDDING = ""


class FeatureExtractor(nn.Module):
    """A network that returns its features beside its logits. Its weights are the network's.

    Attributes:
        network: float32 (B, C, H, W) → logits (B, classes).
        stages: names of submodules whose outputs are the maps, from input to output, see `find_stages`.
    """

    def __init__(self, network: nn.Module, stages: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.stages = tuple(stages)
        self._features: dict[str, Tensor] = {}
        self._hooks = [
            network.get_submodule(name).register_forward_hook(self._store_output(name))
            for name in self.stages
        ]
        self._head: str | None = getattr(network, "head", None)
        if self._head is not None:
            layer = network.get_submodule(self._head)
            self._hooks.append(layer.register_forward_pre_hook(self._store_embedding))

    def remove(self) -> None:
        """Remove the hooks from the network."""
        for hook in self._hooks:
            hook.remove()

    def _store_output(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self._features[name] = output

        return hook

    def _store_embedding(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features[_EMBEDDING] = inputs[0]

    def forward(self, pixels: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Preprocessed pixels (B, C, H, W) → logits (B, classes), maps (B, C, H, W) of each stage, embedding (B, D).

        The embedding is the input of the last linear layer; without one, the means of the last maps.
        """
        logits = self.network(pixels)
        maps = [self._features[name] for name in self.stages]
        embedding = self._features[_EMBEDDING] if self._head is not None else maps[-1].mean(dim=(2, 3))
        self._features = {}
        return logits, maps, embedding.flatten(1)


def find_stages(network: nn.Module, example: Tensor, wanted: str = "") -> tuple[str, ...]:
    """Names of the submodules whose outputs are the maps at the end of each stage, from input to output.

    In order of preference: the wanted ones; the network's attribute `stages`; the last maps of each size above 1×1.
    Of the last, maps with one channel per class are skipped where there are others of their size: they are logits.

    Args:
        example: a prepared batch (B, C, H, W).
        wanted: names joined by commas.

    Raises:
        UsageError: a wanted layer does not exist or returns no maps; or the network has no maps.
    """
    shapes: dict[str, list[tuple[int, ...]]] = {}  # of each output, one per call, in the order of their ends

    def record(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if name and isinstance(output, Tensor):
            shapes.setdefault(name, []).append(tuple(output.shape))

    classes = run_with_hooks(network, example, record).shape[1]
    if wanted:
        return _check_wanted(wanted, shapes)
    own = getattr(network, "stages", None)
    if own:
        return tuple(own)
    last: dict[tuple[int, int], str] = {}
    for name, outputs in shapes.items():
        if not _is_map(outputs) or isinstance(network.get_submodule(name), _IDENTITIES):
            continue
        _, channels, height, width = outputs[0]
        if height * width > 1 and not (channels == classes and (height, width) in last):
            last.pop((height, width), None)
            last[height, width] = name
    if not last:
        raise UsageError("the network has no maps larger than 1×1, which methods that compare features need")
    return tuple(last.values())


def _check_wanted(wanted: str, shapes: dict[str, list[tuple[int, ...]]]) -> tuple[str, ...]:
    names = dict.fromkeys(word.strip() for word in wanted.split(","))
    for name in names:
        if name not in shapes:
            maps = [known for known, outputs in shapes.items() if _is_map(outputs)]
            raise UsageError(
                f"the network has no layer {name!r} that runs", f"It has {', '.join(maps[:12])} …"
            )
        if not _is_map(shapes[name]):
            raise UsageError(
                f"layer {name} does not return maps (B, C, H, W) once per pass", "kd info lists layers."
            )
    return tuple(sorted(names, key=list(shapes).index))


def _is_map(outputs: list[tuple[int, ...]]) -> bool:
    """Whether a layer runs once per pass and returns maps (B, C, H, W)."""
    return len(outputs) == 1 and len(outputs[0]) == 4
