"""Operations of the nodes of a `kdcli.models.graph`, with Caffe's exact arithmetic.

Adding an operation: one function `(inputs: list[Shape], **args) -> (module, output shape)`, one row in `OPS`.
Shapes are without the batch: (C, H, W) for maps, (C,) for vectors; axes are counted with it, as in Caffe.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from kdcli.models.operations import arrange, normal, pointwise, windows
from kdcli.models.operations.shapes import Shape

OPS: dict[str, Callable[..., tuple[nn.Module, Shape]]] = {
    "conv": windows.conv,
    "deconv": partial(windows.conv, transposed=True),
    "linear": windows.linear,
    "max_pool": partial(windows.pool, average=False),
    "ave_pool": partial(windows.pool, average=True),
    "lrn": normal.lrn,
    "batch_norm": normal.batch_norm,
    "mvn": normal.mvn,
    "scale": normal.scale,
    "bias": normal.bias,
    "concat": arrange.concat,
    "slice": arrange.slice_,
    "crop": arrange.crop,
    "flatten": arrange.flatten,
    "reshape": arrange.reshape,
    "eltwise": arrange.eltwise,
    "reduction": arrange.reduction,
    "softmax": arrange.softmax,
    "argmax": arrange.argmax,
    "relu": pointwise.relu,
    "prelu": pointwise.prelu,
    "elu": pointwise.elu,
    "sigmoid": pointwise.sigmoid,
    "tanh": pointwise.tanh,
    "softplus": pointwise.softplus,
    "abs": pointwise.absolute,
    "power": pointwise.power,
    "exp": pointwise.exp,
    "log": pointwise.log,
    "dropout": pointwise.dropout,
}
