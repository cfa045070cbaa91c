"""A network drawn from a plain list of nodes: what kd convert-caffe builds, with Caffe's exact arithmetic.

Adding an operation: one function `(inputs: list[Shape], **args) -> (module, output shape)`, one row in `OPS`.
Shapes leave the batch out: (C, H, W) for maps, (C,) for vectors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdcli.errors import KdError

Shape = tuple[int, ...]
INPUT = "input"  # the name under which nodes refer to the network's input
_MOST_VALUES = 2**29  # per layer, parameters or activations of one image; a damaged file may ask for anything


class GraphNet(nn.Module):
    """Nodes in the order they run; each is a submodule under its name.

    Attributes:
        shapes: node name → output shape of one image.
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
            raise KdError(
                f"layer {output}: its output is {shown(self.shapes[output])}, not {classes} classes"
            )

    def _add(self, node: dict[str, Any]) -> None:
        try:
            name, kind = str(node["name"]), str(node["op"])
            sources = tuple(str(source) for source in node["inputs"])
            args = dict(node.get("args", {}))
        except (KeyError, TypeError, ValueError) as error:
            raise KdError(f"a node of the network is not whole: {error}") from error
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
            module, shape = OPS[kind]([self.shapes[source] for source in sources], **args)
        except KdError as error:
            raise KdError(f"layer {name}: {error.message}", error.hint) from error
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise KdError(f"layer {name}: {kind} cannot be built from {args}: {error}") from error
        _check_size(shape, "output")
        self.add_module(name, module)
        self.shapes[name] = shape
        self._steps.append((name, sources))

    def forward(self, pixels: Tensor) -> Tensor:
        """Preprocessed pixels (B, C, H, W) → logits (B, classes)."""
        values = {INPUT: pixels}
        for name, sources in self._steps:
            values[name] = self._modules[name](*(values[source] for source in sources))  # type: ignore[misc]
        return values[self._output].flatten(1)

    def extra_repr(self) -> str:
        return f"input {shown(self.shapes[INPUT])}, logits from {self._output}"


def graph(
    classes: int,
    input_size: tuple[int, int, int],
    input: Sequence[int],  # noqa: A002 - the key under which checkpoints keep it
    nodes: Sequence[dict[str, Any]],
    output: str,
) -> GraphNet:
    """Build a network from its description.

    Args:
        classes: number of logits; the output node must have as many values.
        input_size: (H, W, C) of the images.
        input: (C, H, W) as the first node sees them.
        nodes: `{"name", "op", "inputs": [names], "args": {...}}`, each after those it
            reads; `input` is the network's input.
        output: name of the node that gives the logits.

    Raises:
        KdError: unknown operation, or shapes that do not fit; names the layer and both shapes.
    """
    try:
        shape = tuple(int(side) for side in input)
        height, width, channels = input_size
    except (TypeError, ValueError) as error:
        raise KdError(f"input shape {input!r} is not (C, H, W)") from error
    if shape != (channels, height, width) or min(shape) < 1:
        raise KdError(f"the network takes {shown(shape)}, the images are {shown((channels, height, width))}")
    _check_size(shape, "input")
    return GraphNet(shape, nodes, output, classes)


def safe_name(name: str, taken: Collection[str]) -> str:
    """A name torch accepts for a submodule, not yet in `taken`: dots and slashes become underscores."""
    cleaned = re.sub(r"[^\w-]", "_", name) or "layer"
    if cleaned == INPUT or cleaned.startswith("_") or hasattr(nn.Module, cleaned) or cleaned in _OWN:
        cleaned = f"layer_{cleaned.lstrip('_')}"
    candidate, number = cleaned, 2
    while candidate in taken:
        candidate, number = f"{cleaned}_{number}", number + 1
    return candidate


_OWN = {"shapes", "training"}  # attributes of a GraphNet that are not a class attribute of nn.Module


def is_vector(shape: Sequence[int], length: int) -> bool:
    """Whether a shape is (length,) or (length, 1, 1)."""
    return tuple(shape[:1]) == (length,) and math.prod(shape) == length


def shown(shape: Sequence[int]) -> str:
    """(3, 32, 32) → `3×32×32`."""
    return "×".join(map(str, shape)) or "scalar"


def _check_size(shape: Shape, what: str) -> None:
    if any(side < 1 for side in shape):
        raise KdError(f"its {what} would be empty: {shown(shape)}")
    if math.prod(shape) > _MOST_VALUES:
        raise KdError(f"its {what} of {shown(shape)} values is beyond what kd takes ({_MOST_VALUES:,})")


def _only(inputs: list[Shape], *, maps: bool = False) -> Shape:
    if len(inputs) != 1:
        raise KdError(f"it takes one input, not {len(inputs)}")
    if maps and len(inputs[0]) != 3:
        raise KdError(f"it takes maps C×H×W, its input is {shown(inputs[0])}")
    return inputs[0]


def _pair(value: Sequence[int], least: int) -> tuple[int, int]:
    first, second = (int(side) for side in value)
    if min(first, second) < least:
        raise ValueError(f"{first}×{second} is below {least}")
    return first, second


# Convolution and inner product


def _conv(
    inputs: list[Shape],
    *,
    out: int,
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    pad: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    bias: bool = True,
) -> tuple[nn.Module, Shape]:
    channels, *sides = _only(inputs, maps=True)
    kernel, stride, dilation, pad = _pair(kernel, 1), _pair(stride, 1), _pair(dilation, 1), _pair(pad, 0)
    if groups < 1 or channels % groups or out % groups:
        raise KdError(f"{groups} groups do not divide {channels} input and {out} output channels")
    _check_size((out, channels // groups, *kernel), "weight")
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    if any(side + 2 * p < r for side, p, r in zip(sides, pad, reach, strict=True)):
        raise KdError(f"a window of {shown(reach)} does not fit its input of {shown((channels, *sides))}")
    size = [(side + 2 * p - r) // s + 1 for side, p, r, s in zip(sides, pad, reach, stride, strict=True)]
    _check_size((out, *size), "output")
    return nn.Conv2d(channels, out, kernel, stride, pad, dilation, groups, bias), (out, *size)


class InnerProduct(nn.Linear):
    """Caffe's inner product: flattens C, H, W first."""

    def forward(self, values: Tensor) -> Tensor:
        """(B, …) → (B, out_features)."""
        return super().forward(values.flatten(1))


def _linear(inputs: list[Shape], *, out: int, bias: bool = True) -> tuple[nn.Module, Shape]:
    features = math.prod(_only(inputs))
    _check_size((out, features), "weight")
    return InnerProduct(features, out, bias=bias), (out,)


# Pooling


@dataclass(frozen=True)
class Window:
    """How Caffe's pooling walks along one axis, in terms that torch and ONNX agree upon.

    The axis is padded explicitly by `before` and `after`; windows of `kernel` then lie inside it, but for the
    last one where `overhang` says so: it is clipped.
    """

    out: int
    kernel: int
    before: int
    after: int
    overhang: bool


def pool_window(size: int, kernel: int, stride: int, pad: int) -> Window:
    """Caffe's geometry: `ceil((size + 2·pad − kernel) / stride) + 1` windows; with padding, one less where
    the last would start at `size + pad` or after (from the padded start). It is clipped to `size + 2·pad`.

    Raises:
        KdError: no window fits, or one would lie wholly outside.
    """
    if pad >= kernel:
        raise KdError(f"padding {pad} is not below the window {kernel}")
    out = -(-(size + 2 * pad - kernel) // stride) + 1
    if pad and (out - 1) * stride >= size + pad:
        out -= 1
    if out < 1:
        raise KdError(f"a window of {kernel} with stride {stride} does not fit {size} + 2·{pad}")
    if (out - 1) * stride >= size + pad:  # Caffe gives −3.4e38 (MAX) or 0/0 (AVE) there
        raise KdError(f"window {kernel}, stride {stride} on {size}: the last window holds no value")
    after = (out - 1) * stride + kernel - size - pad  # what the last window covers beyond the input
    length = size + pad + min(max(after, 0), pad)
    # A window longer than the padded axis is the only one, and clipped to it
    return Window(out, min(kernel, length), pad, min(max(after, 0), pad), after > pad and kernel <= length)


def _pool(
    inputs: list[Shape],
    kernel: Sequence[int] | None,
    stride: Sequence[int],
    pad: Sequence[int],
    fill: float,
    make: Callable[[tuple[int, int], tuple[int, int], bool], nn.Module],
) -> tuple[nn.Module, Shape]:
    channels, *sides = _only(inputs, maps=True)
    stride, pad = _pair(stride, 1), _pair(pad, 0)
    kernel = (sides[0], sides[1]) if kernel is None else _pair(kernel, 1)
    y, x = (pool_window(*axis) for axis in zip(sides, kernel, stride, pad, strict=True))
    module = make((y.kernel, x.kernel), stride, y.overhang or x.overhang)
    if any((y.before, y.after, x.before, x.after)):
        # torch, onnxruntime and Caffe disagree about windows that touch a pooling layer's own padding
        module = nn.Sequential(nn.ConstantPad2d((x.before, x.after, y.before, y.after), fill), module)
    return module, (channels, y.out, x.out)


def _max_pool(
    inputs: list[Shape],
    *,
    kernel: Sequence[int] | None = None,
    stride: Sequence[int] = (1, 1),
    pad: Sequence[int] = (0, 0),
) -> tuple[nn.Module, Shape]:
    """`kernel=None` is global pooling."""
    return _pool(
        inputs, kernel, stride, pad, -math.inf, lambda k, s, ceil: nn.MaxPool2d(k, s, ceil_mode=ceil)
    )


def _ave_pool(
    inputs: list[Shape],
    *,
    kernel: Sequence[int] | None = None,
    stride: Sequence[int] = (1, 1),
    pad: Sequence[int] = (0, 0),
) -> tuple[nn.Module, Shape]:
    """`kernel=None` is global pooling. Padding counts in the divisor, what hangs over it does not."""
    return _pool(
        inputs,
        kernel,
        stride,
        pad,
        0.0,
        lambda k, s, ceil: nn.AvgPool2d(k, s, ceil_mode=ceil, count_include_pad=False),
    )


# Normalisation


def _lrn(
    inputs: list[Shape], *, size: int = 5, alpha: float = 1.0, beta: float = 0.75, k: float = 1.0
) -> tuple[nn.Module, Shape]:
    shape = _only(inputs, maps=True)
    if size < 1 or size % 2 == 0:
        raise KdError(f"local size {size} must be odd")
    return nn.LocalResponseNorm(size, alpha, beta, k), shape


def _batch_norm(inputs: list[Shape], *, eps: float = 1e-5) -> tuple[nn.Module, Shape]:
    shape = _only(inputs)
    if len(shape) == 3:
        return nn.BatchNorm2d(shape[0], eps=eps, affine=False), shape
    if len(shape) == 1:
        return nn.BatchNorm1d(shape[0], eps=eps, affine=False), shape
    raise KdError(f"it takes C or C×H×W, its input is {shown(shape)}")


class Scale(nn.Module):
    """One factor, and perhaps one summand, for each channel."""

    def __init__(self, channels: int, rank: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self._view = (-1, *[1] * (rank - 1))

    def forward(self, values: Tensor) -> Tensor:
        """(B, C, …) → the same shape."""
        scaled = values * self.weight.view(self._view)
        return scaled if self.bias is None else scaled + self.bias.view(self._view)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, bias={self.bias is not None}"


def _scale(inputs: list[Shape], *, bias: bool = False) -> tuple[nn.Module, Shape]:
    shape = _only(inputs)
    return Scale(shape[0], len(shape), bias), shape


# Joining


class Concat(nn.Module):
    """Concatenation; axis 1 is the channels."""

    def __init__(self, axis: int) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, *values: Tensor) -> Tensor:
        return torch.cat(values, dim=self.axis)

    def extra_repr(self) -> str:
        return f"axis={self.axis}"


def _concat(inputs: list[Shape], *, axis: int = 1) -> tuple[nn.Module, Shape]:
    rank = len(inputs[0])
    if not 1 <= axis <= rank:
        raise KdError(f"axis {axis} is not one of the {rank} axes after the batch")
    rest = {(len(s), *s[: axis - 1], *s[axis:]) for s in inputs}
    if len(rest) != 1:
        raise KdError(f"cannot join {' and '.join(map(shown, inputs))} along axis {axis}")
    total = sum(shape[axis - 1] for shape in inputs)
    return Concat(axis), (*inputs[0][: axis - 1], total, *inputs[0][axis:])


class Eltwise(nn.Module):
    """Sum (with coefficients), product or maximum of equal shapes."""

    def __init__(self, operation: str, coefficients: Sequence[float]) -> None:
        super().__init__()
        self.operation = operation
        self.coefficients = tuple(coefficients)

    def forward(self, *values: Tensor) -> Tensor:
        if self.operation == "sum" and self.coefficients:
            values = tuple(value * factor for value, factor in zip(values, self.coefficients, strict=True))
        result = values[0]
        for value in values[1:]:
            if self.operation == "sum":
                result = result + value
            elif self.operation == "prod":
                result = result * value
            else:
                result = torch.maximum(result, value)
        return result

    def extra_repr(self) -> str:
        return self.operation + (f", coefficients={self.coefficients}" if self.coefficients else "")


def _eltwise(
    inputs: list[Shape], *, operation: str = "sum", coefficients: Sequence[float] = ()
) -> tuple[nn.Module, Shape]:
    if operation not in ("sum", "prod", "max"):
        raise KdError(f"unknown operation {operation}")
    if len(set(inputs)) != 1:
        raise KdError(f"its inputs differ: {' and '.join(map(shown, inputs))}")
    if coefficients and (operation != "sum" or len(coefficients) != len(inputs)):
        raise KdError(f"{len(coefficients)} coefficients do not go with {operation} of {len(inputs)} inputs")
    return Eltwise(operation, [float(factor) for factor in coefficients]), inputs[0]


# Element by element


def _relu(inputs: list[Shape], *, negative_slope: float = 0.0) -> tuple[nn.Module, Shape]:
    return nn.LeakyReLU(negative_slope) if negative_slope else nn.ReLU(), _only(inputs)


def _dropout(inputs: list[Shape], *, ratio: float = 0.5) -> tuple[nn.Module, Shape]:
    return nn.Dropout(ratio), _only(inputs)


def _flatten(inputs: list[Shape]) -> tuple[nn.Module, Shape]:
    return nn.Flatten(), (math.prod(_only(inputs)),)


def _softmax(inputs: list[Shape]) -> tuple[nn.Module, Shape]:
    return nn.Softmax(dim=1), _only(inputs)


def _sigmoid(inputs: list[Shape]) -> tuple[nn.Module, Shape]:
    return nn.Sigmoid(), _only(inputs)


def _tanh(inputs: list[Shape]) -> tuple[nn.Module, Shape]:
    return nn.Tanh(), _only(inputs)


OPS: dict[str, Callable[..., tuple[nn.Module, Shape]]] = {
    "conv": _conv,
    "linear": _linear,
    "max_pool": _max_pool,
    "ave_pool": _ave_pool,
    "lrn": _lrn,
    "batch_norm": _batch_norm,
    "scale": _scale,
    "concat": _concat,
    "eltwise": _eltwise,
    "relu": _relu,
    "dropout": _dropout,
    "flatten": _flatten,
    "softmax": _softmax,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
}
