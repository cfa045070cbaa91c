"""Operations of the nodes of a `kdcli.models.graph`, with Caffe's exact arithmetic.

Adding an operation: one function `(*input shapes, **args) -> (module, output shape)`, one row in `OPS`; or, if it
keeps the shape, `(**args) -> module`, one row in `_POINTWISE`. Shapes are without the batch: (C, H, W) for maps, (C,)
for vectors; axes are counted with it, as in Caffe.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from kdcli.models.operations import arrange, normal, pointwise, windows
from kdcli.models.operations.shapes import Shape

_POINTWISE: dict[str, Callable[..., nn.Module]] = {
    "relu": pointwise.relu,
    "elu": nn.ELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,  # Caffe's BNLL
    "abs": pointwise.absolute,
    "power": pointwise.power,
    "exp": pointwise.exp,
    "log": pointwise.log,
    "dropout": pointwise.dropout,
}


def _same_shape(build: Callable[..., nn.Module], shape: Shape, **args: Any) -> tuple[nn.Module, Shape]:
    return build(**args), shape


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
    "prelu": normal.prelu,
    **{name: partial(_same_shape, build) for name, build in _POINTWISE.items()},
}
