"""Networks by name; those of other packages are in `external`.

Adding a network: a class in a new file, and a row in `MODELS` or `@register("name")` above the class. It is called
with `classes`, `input_size` and the arguments of its row. Optional arguments are `width`, a multiplier of the channel
counts, and `dropout`. Two class attributes serve the methods that compare features: `stage_names`, the submodules
whose outputs are the maps (B, C, H, W) at the end of each stage, in order; and `head_name`, the linear layer at the
end, which reads vectors (B, D). Optional are `lr_factors`, factors of --optimizer sgd's learning rate by the end of a
parameter's name, and `fit_to_images`, called with prepared training images (N, C, H, W) before training.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from torch import nn

from kdcli.base import code
from kdcli.base.errors import UsageError
from kdcli.base.names import nearest
from kdcli.models import external
from kdcli.models.cifarnet import CifarNet
from kdcli.models.convnet import ConvNet
from kdcli.models.graph import GraphNet
from kdcli.models.lenet import LeNet
from kdcli.models.mobilenet import MobileNetV2
from kdcli.models.nin import NIN, NINFc
from kdcli.models.resnet import ResNet, WideResNet
from kdcli.models.shufflenet import ShuffleNetV1, ShuffleNetV2
from kdcli.models.vgg import VGG

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])

MODELS: dict[str, partial[Any]] = {
    "lenet": partial(LeNet),
    "lenet-caffe": partial(LeNet, widths=(20, 50, 500)),
    "nin": partial(NIN),
    "nin-fc": partial(NINFc),
    "cifarnet": partial(CifarNet),
    "convnet-tiny": partial(ConvNet, widths=(8, 16)),
    "convnet-small": partial(ConvNet, widths=(16, 32, 64)),
    "convnet-large": partial(ConvNet, widths=(64, 128, 128)),
    **{f"resnet{depth}": partial(ResNet, depth=depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "resnet8x4": partial(ResNet, depth=8, widths=(32, 64, 128, 256)),
    "resnet32x4": partial(ResNet, depth=32, widths=(32, 64, 128, 256)),
    "wrn-16-1": partial(WideResNet, depth=16, factor=1),
    "wrn-16-2": partial(WideResNet, depth=16, factor=2),
    "wrn-40-1": partial(WideResNet, depth=40, factor=1),
    "wrn-40-2": partial(WideResNet, depth=40, factor=2),
    "vgg8": partial(VGG, convolutions=1),
    "vgg13": partial(VGG, convolutions=2),
    "mobilenetv2-half": partial(MobileNetV2),
    "shufflenetv1": partial(ShuffleNetV1),
    "shufflenetv2": partial(ShuffleNetV2),
    "graph": partial(GraphNet),
}


def register(name: str, **args: Any) -> Callable[[Builder], Builder]:
    """Return a decorator that adds a network class, with those arguments of it, to `MODELS` for `--student NAME`."""

    def add(builder: Builder) -> Builder:
        MODELS[name] = partial(builder, **args)
        return builder

    return add


def build(arch: str, /, *, classes: int, input_size: tuple[int, int, int], **arch_args: Any) -> nn.Module:
    """Build a freshly initialised network of `MODELS`: float32 (B, C, H, W) → logits (B, classes).

    UsageError for an unknown name or argument, and for images (H, W, C) too small for the network.
    """
    row = _row(arch)
    try:
        sizes: dict[str, Any] = {"classes": classes, "input_size": input_size}
        network: nn.Module = row.func(*row.args, **sizes, **row.keywords, **arch_args)
    except TypeError as error:
        raise UsageError(f"network {arch} does not take these arguments: {error}") from error
    return network


def names() -> tuple[str, ...]:
    """Names that `--student` takes, as it takes `source:name`; not `graph`, which its checkpoint describes."""
    return tuple(name for name in MODELS if name != "graph")


def is_network(name: str) -> bool:
    """Whether a text names a network, without weights."""
    return name in names() or (code.is_network(name) and name.count(":") == 1)


def accepts(arch: str, argument: str) -> bool:
    return argument in inspect.signature(_row(arch).func).parameters


def _row(arch: str) -> partial[Any]:
    row = MODELS.get(arch) or external.row(arch)
    if row is None:
        raise UsageError(
            f"unknown network: {arch}",
            nearest(
                arch, names(), "; kd train also takes torchvision:NAME, timm:NAME and a checkpoint (.pt)"
            ),
        )
    return row
