"""Networks by name.

Adding a network: a class in a new file, and a row in `MODELS` or `@register("name")` above the class. It is called
with `classes`, `input_size` and the arguments of its row. Optional arguments are `width`, a multiplier of the channel
counts, and `dropout`. Two class attributes serve the methods that compare features: `stages`, the submodules whose
outputs are the maps (B, C, H, W) at the end of each stage, in order; and `head`, the linear layer at the end, which
reads vectors (B, D).
"""

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import nn

from kdcli.base.errors import UsageError

Builder = TypeVar("Builder", bound=Callable[..., nn.Module])


class Entry(NamedTuple):
    """A network: `module:class`, imported on first use, and its arguments."""

    path: str
    args: dict[str, Any]


def _entry(path: str, **args: Any) -> Entry:
    return Entry(f"kdcli.models.{path}", args)


MODELS: dict[str, Entry] = {
    "lenet": _entry("lenet:LeNet"),
    "lenet-caffe": _entry("lenet:LeNet", widths=(20, 50, 500)),
    "nin": _entry("nin:NIN"),
    "nin-fc": _entry("nin:NINFc"),
    "convnet-tiny": _entry("convnet:ConvNet", widths=(8, 16)),
    "convnet-small": _entry("convnet:ConvNet", widths=(16, 32, 64)),
    "convnet-large": _entry("convnet:ConvNet", widths=(64, 128, 128)),
    **{f"resnet{depth}": _entry("resnet:ResNet", depth=depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "resnet8x4": _entry("resnet:ResNet", depth=8, widths=(32, 64, 128, 256)),
    "resnet32x4": _entry("resnet:ResNet", depth=32, widths=(32, 64, 128, 256)),
    **{
        f"wrn-{depth}-{factor}": _entry("wide_resnet:WideResNet", depth=depth, factor=factor)
        for depth in (16, 40)
        for factor in (1, 2)
    },
    "vgg8": _entry("vgg:VGG", convolutions=1),
    "vgg13": _entry("vgg:VGG", convolutions=2),
    "mobilenetv2-half": _entry("mobilenet:MobileNetV2"),
    "shufflenetv1": _entry("shufflenet:ShuffleNetV1"),
    "shufflenetv2": _entry("shufflenet:ShuffleNetV2"),
    "graph": _entry("graph:graph"),
}


def register(name: str, **args: Any) -> Callable[[Builder], Builder]:
    """Return a decorator that adds a network class (or function) to `MODELS`.

    Args:
        name: what `--student` takes.
        args: arguments of the class that belong to this name.
    """

    def add(builder: Builder) -> Builder:
        MODELS[name] = Entry(f"{builder.__module__}:{builder.__qualname__}", args)
        return builder

    return add


def build(arch: str, *, classes: int, input_size: tuple[int, int, int], **arch_args: Any) -> nn.Module:
    """Build a freshly initialised network: float32 (B, C, H, W) → logits (B, classes).

    Args:
        arch: a name in `MODELS`.
        classes: number of logits.
        input_size: (H, W, C) of the images.
        arch_args: further arguments of the network, as `width`.

    Raises:
        UsageError: unknown name or argument, or images too small for the network.
    """
    builder = _builder(arch)
    try:
        network: nn.Module = builder(classes=classes, input_size=input_size, **MODELS[arch].args, **arch_args)
    except TypeError as error:
        raise UsageError(f"network {arch} does not take these arguments: {error}") from error
    return network


def names() -> tuple[str, ...]:
    """Names that `--student` takes. `graph`, a network described by its checkpoint, is none of them."""
    return tuple(name for name in MODELS if name != "graph")


def accepts(arch: str, argument: str) -> bool:
    """Whether a network has an argument, as `dropout` or `width`."""
    return argument in inspect.signature(_builder(arch)).parameters


def _builder(arch: str) -> Callable[..., nn.Module]:
    if arch not in MODELS:
        raise UsageError(
            f"unknown network: {arch}",
            f"Known are {', '.join(names())}; kd train also takes a checkpoint (.pt).",
        )
    module, name = MODELS[arch].path.split(":")
    return getattr(importlib.import_module(module), name)
