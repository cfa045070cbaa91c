"""A network built from a plain list of nodes, as kd convert-caffe makes it.

Adding an operation: a function `(*input shapes, **args) -> module` in `operations`, a row in `OPS`.
Shapes are without the batch: (C, H, W) for maps, (C,) for vectors; axes are counted with it, as in Caffe.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.base.errors import KdError
from kdcli.base.text import dims, first_line
from kdcli.models.operations import arrange, elementwise, windows
from kdcli.models.operations.shapes import Function, Shape, check_size, is_vector

INPUT = "input"  # the name under which nodes refer to the network's input
_MODULE = nn.Module()  # its attributes cannot name a submodule
OPS: dict[str, Callable[..., nn.Module]] = {
    "conv": windows.conv,
    "deconv": partial(windows.conv, transposed=True),
    "linear": windows.linear,
    "max_pool": partial(windows.pool, average=False),
    "ave_pool": partial(windows.pool, average=True),
    "lrn": elementwise.lrn,
    "batch_norm": elementwise.batch_norm,
    "mvn": elementwise.mvn,
    "scale": elementwise.affine,
    "bias": partial(elementwise.affine, scale=False, bias=True),
    "concat": arrange.concat,
    "slice": arrange.slice_,
    "crop": arrange.crop,
    "flatten": arrange.flatten,
    "reshape": arrange.reshape,
    "eltwise": arrange.eltwise,
    "reduction": arrange.reduction,
    "softmax": arrange.softmax,
    "prelu": elementwise.prelu,
    "relu": elementwise.relu,
    "elu": partial(elementwise.unchanged_shape, nn.ELU),
    "sigmoid": partial(elementwise.unchanged_shape, nn.Sigmoid),
    "tanh": partial(elementwise.unchanged_shape, nn.Tanh),
    "softplus": partial(elementwise.unchanged_shape, nn.Softplus),  # Caffe's BNLL
    "abs": elementwise.absolute,
    "power": elementwise.power,
    "exp": elementwise.exp,
    "log": elementwise.log,
    "dropout": elementwise.dropout,
}


class GraphNet(nn.Module):
    """Nodes in the order they run; each is a submodule under its name.

    `shapes` are output shapes for one image by node name; `head_name` the output node if linear, see
    `models.final_linear`.
    """

    def __init__(
        self,
        input: Sequence[int],  # noqa: A002 - the key in checkpoints
        nodes: Sequence[dict[str, Any]],
        output: str,
        classes: int | None = None,
        input_size: tuple[int, int, int] | None = None,
    ) -> None:
        """Build a network from its description; KdError names the layer that does not fit, and both shapes.

        Args:
            input: (C, H, W) of the first node's input.
            nodes: `{"name", "op", "inputs": [names], "args": {...}}`, each after its inputs, `input` being the first.
            output: name of the node whose output are the logits.
            classes, input_size: number of logits and (H, W, C) of the images, to be checked.
        """
        super().__init__()
        images = input if input_size is None else (input_size[2], *input_size[:2])
        if tuple(input) != tuple(images):
            raise KdError(f"the network takes {dims(input)}, the images are {dims(images)}")
        check_size(tuple(input), "input")
        self.shapes: dict[str, Shape] = {INPUT: tuple(input)}
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
            self.head_name = output

    def _add(self, node: dict[str, Any]) -> None:
        name, kind, args = str(node["name"]), str(node["op"]), dict(node.get("args", {}))
        sources = tuple(map(str, node["inputs"]))
        if kind not in OPS:
            raise KdError(f"layer {name}: unknown operation {kind}", "A newer kd may know it.")
        if name != safe_name(name) or name in self.shapes:
            raise KdError(f"layer {name}: the name is taken or cannot name a module")
        missing = [source for source in sources if source not in self.shapes]
        if missing or not sources:
            raise KdError(
                f"layer {name}: its input {', '.join(missing) or '(none)'} is not computed before it"
            )
        shapes = [self.shapes[source] for source in sources]
        try:
            build = partial(OPS[kind], *shapes, **args)
            with torch.device("meta"):  # sizes are checked before memory is allocated
                skeleton = build().eval()
                for value in skeleton.parameters():
                    check_size(tuple(value.shape), "weight")
                self.shapes[name] = tuple(skeleton(*(torch.empty(1, *shape) for shape in shapes)).shape[1:])
            check_size(self.shapes[name], "output")
            module = build()
            if isinstance(module, Function):
                module.description = f"{kind}({', '.join(f'{key}={value}' for key, value in args.items())})"
            self.add_module(name, module)
        except KdError as error:
            raise KdError(f"layer {name}: {error.message}", error.hint) from error
        except (RuntimeError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            inputs = " and ".join(map(dims, shapes))
            raise KdError(
                f"layer {name}: {kind} cannot be built from {args} for {inputs}: {first_line(error)}"
            ) from error
        self._steps.append((name, sources))

    def _unused_after(self) -> list[list[str]]:
        """Values that no step after each one reads: freed, since a deep network's outputs add up to gigabytes."""
        unused: list[list[str]] = [[] for _ in self._steps]
        last = {INPUT: 0} | {name: number for number, (name, _) in enumerate(self._steps)}
        last |= {source: number for number, (_, sources) in enumerate(self._steps) for source in sources}
        del last[self._output]
        for name, number in last.items():
            unused[number].append(name)
        return unused

    def forward(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels (B, C, H, W) → logits (B, classes)."""
        values = {INPUT: pixels}
        for (name, sources), unused in zip(self._steps, self._unused, strict=True):
            values[name] = self._modules[name](*(values[source] for source in sources))  # type: ignore[misc]
            for source in unused:
                del values[source]
        return values[self._output].flatten(1)


def safe_name(name: str) -> str:
    """A name that torch accepts for a submodule: dots and slashes become underscores."""
    cleaned = re.sub(r"[^\w-]", "_", name) or "layer"
    if cleaned in (INPUT, "head_name", "shapes") or cleaned.startswith("_") or hasattr(_MODULE, cleaned):
        cleaned = f"layer_{cleaned.lstrip('_')}"
    return cleaned
