"""A network built from a plain list of nodes, as kd convert-caffe makes it. `operations` has what nodes compute."""

import re
from collections.abc import Collection, Sequence
from itertools import chain, count
from typing import Any

from torch import Tensor, nn

from kdcli.base.errors import KdError
from kdcli.base.text import dims
from kdcli.models.operations import OPS
from kdcli.models.operations.shapes import Shape, check_size, is_vector

INPUT = "input"  # the name under which nodes refer to the network's input
_RESERVED = {"head", "shapes", "training"}  # attributes of a GraphNet's instance


class GraphNet(nn.Module):
    """Nodes in the order they run; each is a submodule under its name.

    Attributes:
        shapes: node name → output shape for one image.
        head: the output node, if it is linear, see `models.final_linear`.
    """

    def __init__(
        self, shape: Shape, nodes: Sequence[dict[str, Any]], output: str, classes: int | None
    ) -> None:
        super().__init__()
        self.shapes: dict[str, Shape] = {INPUT: shape}
        self._steps: list[tuple[str, tuple[str, ...]]] = []
        self._output = output
        for node in nodes:
            self._add(node)
        if output not in self.shapes:
            raise KdError(f"the network has no node {output!r} to read logits from")
        if classes is not None and not is_vector(self.shapes[output], classes):
            raise KdError(f"layer {output}: its output is {dims(self.shapes[output])}, not {classes} classes")
        self._unused = self._unused_after()
        last = self._modules.get(output)
        if isinstance(last, nn.Linear) and last.bias is not None and self.shapes[output] == (classes,):
            self.head = output

    def _add(self, node: dict[str, Any]) -> None:
        try:
            name, kind = str(node["name"]), str(node["op"])
            sources = tuple(str(source) for source in node["inputs"])
            args = dict(node.get("args", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise KdError(f"a node of the network is incomplete: {error}") from error
        if kind not in OPS:
            raise KdError(f"layer {name}: unknown operation {kind}", "A newer kd may know it.")
        if name != safe_name(name, self.shapes):
            raise KdError(f"layer {name}: the name is taken or cannot name a module")
        missing = [source for source in sources if source not in self.shapes]
        if missing or not sources:
            raise KdError(
                f"layer {name}: its input {', '.join(missing) or '(none)'} is not computed before it"
            )
        try:
            module, shape = OPS[kind](*(self.shapes[source] for source in sources), **args)
        except KdError as error:
            raise KdError(f"layer {name}: {error.message}", error.hint) from error
        except (TypeError, ValueError, ArithmeticError) as error:
            raise KdError(f"layer {name}: {kind} cannot be built from {args}: {error}") from error
        check_size(shape, "output")
        self.add_module(name, module)
        self.shapes[name] = shape
        self._steps.append((name, sources))

    def _unused_after(self) -> list[tuple[str, ...]]:
        """Values that no step after each one reads: freed, since a deep network's outputs add up to gigabytes."""
        last = {INPUT: 0} | {name: number for number, (name, _) in enumerate(self._steps)}
        last |= {source: number for number, (_, sources) in enumerate(self._steps) for source in sources}
        del last[self._output]
        unused: list[list[str]] = [[] for _ in self._steps]
        for name, step in last.items():
            unused[step].append(name)
        return [tuple(names) for names in unused]

    def forward(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels (B, C, H, W) → logits (B, classes)."""
        values = {INPUT: pixels}
        for (name, sources), unused in zip(self._steps, self._unused, strict=True):
            values[name] = self._modules[name](*(values[source] for source in sources))  # type: ignore[misc]
            for source in unused:
                del values[source]
        return values[self._output].flatten(1)


def graph(
    classes: int,
    input_size: tuple[int, int, int],
    input: Sequence[int],  # noqa: A002 - the key in checkpoints
    nodes: Sequence[dict[str, Any]],
    output: str,
) -> GraphNet:
    """Build a network from its description.

    Args:
        classes: number of logits; the output node must have as many values.
        input_size: (H, W, C) of the images.
        input: (C, H, W) of the first node's input.
        nodes: `{"name", "op", "inputs": [names], "args": {...}}`, each after its inputs; `input` is the network's.
        output: name of the node whose output are the logits.

    Raises:
        KdError: unknown operation, or shapes that do not fit; names the layer and both shapes.
    """
    height, width, channels = input_size
    shape = (channels, height, width)
    if list(input) != list(shape):
        raise KdError(f"the network takes {dims(input)}, the images are {dims(shape)}")
    check_size(shape, "input")
    return GraphNet(shape, nodes, output, classes)


def safe_name(name: str, taken: Collection[str]) -> str:
    """A name that torch accepts for a submodule and `taken` lacks: dots and slashes become underscores."""
    cleaned = re.sub(r"[^\w-]", "_", name) or "layer"
    if cleaned == INPUT or cleaned.startswith("_") or hasattr(nn.Module, cleaned) or cleaned in _RESERVED:
        cleaned = f"layer_{cleaned.lstrip('_')}"
    candidates = chain([cleaned], (f"{cleaned}_{number}" for number in count(2)))
    return next(name for name in candidates if name not in taken)
