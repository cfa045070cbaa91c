"""Convolution, inner product and pooling."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from kdcli.base.errors import KdError
from kdcli.models.operations.shapes import Shape, axis_of, check_maps, check_size, pair


def conv(
    shape: Shape,
    *,
    out: int,
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    pad: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    bias: bool = True,
    transposed: bool = False,
) -> nn.Module:
    """Convolution (incomplete windows are dropped), or its transpose (padding is cropped from the output)."""
    check_maps(shape)
    check_size((out,), "output")
    kernel, stride, dilation, pad = pair(kernel, 1), pair(stride, 1), pair(dilation, 1), pair(pad, 0)
    if transposed:
        return nn.ConvTranspose2d(shape[0], out, kernel, stride, pad, 0, groups, bias, dilation)
    return nn.Conv2d(shape[0], out, kernel, stride, pad, dilation, groups, bias)


class InnerProduct(nn.Linear):
    """Caffe's inner product: flattens the axes from `axis` on first."""

    def __init__(self, features: int, out: int, bias: bool, axis: int) -> None:
        super().__init__(features, out, bias=bias)
        self.axis = axis

    def forward(self, values: Tensor) -> Tensor:
        """(B, …) → (B, out_features), or with an axis beyond 1 (B, …, out_features)."""
        return super().forward(values.flatten(self.axis))


def linear(shape: Shape, *, out: int, bias: bool = True, axis: int = 1) -> nn.Module:
    """Inner product over all axes from `axis` on."""
    axis = axis_of(axis, shape)
    check_size((out,), "output")
    return InnerProduct(math.prod(shape[axis - 1 :]), out, bias, axis)


def pool_window(
    size: int, kernel: int, stride: int, pad: int, *, round_up: bool, padded: bool
) -> tuple[int, int, int, bool]:
    """Pooling along one axis with Caffe's geometry, in terms on which torch and ONNX agree.

    `ceil((size + 2·pad − kernel) / stride) + 1` windows (or `floor`); with padding on this axis or the other
    (`padded`), one less where the last would start at `size + pad` or after (from the padded start). It is clipped to
    `size + 2·pad`. KdError if no window fits, or one would lie wholly outside.

    Returns:
        Length of the windows, explicit padding before and after, and whether the last window overhangs the padded
        axis and is clipped.
    """
    if pad >= kernel:
        raise KdError(f"padding {pad} is not below the window {kernel}")
    span = size + 2 * pad - kernel
    out = (-(-span // stride) if round_up else span // stride) + 1
    if padded and (out - 1) * stride >= size + pad:
        out -= 1
    if out < 1:
        raise KdError(f"a window of {kernel} with stride {stride} does not fit {size} + 2·{pad}")
    if (out - 1) * stride >= size + pad:  # Caffe gives −3.4e38 (MAX) or 0/0 (AVE) there
        raise KdError(f"window {kernel}, stride {stride} on {size}: the last window holds no value")
    beyond = max((out - 1) * stride + kernel - size - pad, 0)  # pixels of the last window beyond the input
    after = min(beyond, pad)
    length = size + pad + after
    # A window longer than the padded axis is the only one, and clipped to it
    return min(kernel, length), pad, after, beyond > pad and kernel <= length


def pool(
    shape: Shape,
    *,
    average: bool,
    kernel: Sequence[int] | None = None,
    stride: Sequence[int] = (1, 1),
    pad: Sequence[int] = (0, 0),
    round_up: bool = True,
) -> nn.Module:
    """Maximum or average of each window; without `kernel` of all of it.

    Padding counts in the divisor of an average, an overhang does not.
    """
    check_maps(shape)
    channels, *sides = shape
    stride, pad = pair(stride, 1), pair(pad, 0)
    kernel = pair(sides if kernel is None else kernel, 1)
    windows = (
        pool_window(*axis, round_up=round_up, padded=any(pad))
        for axis in zip(sides, kernel, stride, pad, strict=True)
    )
    window, before, after, overhangs = zip(*windows, strict=True)
    padded = (side + b + a for side, b, a in zip(sides, before, after, strict=True))
    check_size((channels, *padded), "padded input")
    ceil_mode = any(overhangs)
    module: nn.Module = nn.MaxPool2d(window, stride, ceil_mode=ceil_mode)
    if average:
        module = nn.AvgPool2d(window, stride, ceil_mode=ceil_mode, count_include_pad=False)
    if any((*before, *after)):
        # torch, onnxruntime and Caffe disagree about windows that touch a pooling layer's own padding
        edge = nn.ConstantPad2d((before[1], after[1], before[0], after[0]), 0.0 if average else -math.inf)
        module = nn.Sequential(edge, module)
    return module
