"""External networks: torchvision, timm, modules passed from Python, and factories `package.module:function`.

Adding a source `source:name`: a function that builds a network and one that returns its `Published`, in `SOURCES`,
and its name in `base.code.SOURCES`. Files may name networks of a source; factories are named by the user only.
"""

import contextlib
import copy
import inspect
import io
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdcli.base import code
from kdcli.base.errors import KdError, UsageError, is_out_of_memory
from kdcli.base.names import similar
from kdcli.base.text import dims, first_line
from kdcli.data.preprocess import INTERPOLATIONS, Photo
from kdcli.models.checkpoint import digest
from kdcli.models.layers import run_with_hooks

_AUXILIARY = ("googlenet", "inception_v3")  # their output in training is no tensor
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of pixels in 0–1
_OWN: dict[str, nn.Module] = {}  # the user's modules
_CROP_SHARE = 0.875  # of timm's descriptions without one
_FACTORY = "It is package.module:function; the function returns a torch.nn.Module that gives logits."


class Published(NamedTuple):
    """Published preprocessing and weights of a network; `weights()` reads them."""

    preprocess: Photo
    label: str
    weights: Callable[[], Mapping[str, Tensor]]


def row(arch: str) -> partial[Any] | None:
    """The function that builds an external network, as in `registry.MODELS`; None for other names."""
    source, _, name = arch.partition(":")
    if source in SOURCES:
        return partial(_examined, SOURCES[source][0], arch, name)
    return partial(_examined, _factory, arch, arch) if code.is_name(arch) else None


def published(arch: str, weights: str, sha256: str, args: Mapping[str, Any], side: int) -> Published:
    """Published preprocessing and weights: `weights` by name, or by the SHA-256 of a weights file, else the default.

    A function's network, made for images of this `side`, describes itself by an attribute `pretrained_cfg`, a
    dictionary as timm's.
    """
    source, _, name = arch.partition(":")
    if source in SOURCES:
        return SOURCES[source][1](name, weights, sha256)
    counts = _required(arch) & {"classes", "num_classes"} - set(args)
    if counts and not sha256:
        count = min(counts)
        raise UsageError(
            f"{arch} needs the number of its {count}",
            f"Add --teacher-args {count}=10, or its weights by --teacher-weights.",
        )
    network = _factory(arch, 0, (side, side, 3), **args)
    return Published(*_photo(getattr(network, "pretrained_cfg", {})), network.state_dict)


def imagenet_classes() -> tuple[str, ...]:
    """Names of ImageNet's 1,000 classes in the usual order."""
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.DEFAULT.meta["categories"])


def _examined(
    make: Callable[..., nn.Module],
    arch: str,
    name: str,
    /,
    *,
    classes: int,
    input_size: tuple[int, int, int],
    **args: Any,
) -> nn.Module:
    """Build a network, run it once, and find the linear layer that gives its logits.

    0 `classes` are the network's own number. The result has `head_name`, see `registry`, and `class_count`.
    """
    network = make(name, classes, input_size, **args)
    if not isinstance(network, nn.Module):
        raise UsageError(
            f"network {arch} is a {type(network).__name__}, expected a torch.nn.Module", _FACTORY
        )
    linear: list[tuple[str, Tensor]] = []

    def record(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, nn.Linear):
            linear.append((name, output))

    height, width, channels = input_size
    try:
        logits = run_with_hooks(network, torch.zeros(2, channels, height, width), record)
    except Exception as error:  # torch raises many kinds
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"network {arch} does not take {dims(input_size)} images: {first_line(error)}",
            "Use another --image-size, or another network.",
        ) from error
    if not isinstance(logits, Tensor):
        raise UsageError(
            f"network {arch} returns a {type(logits).__name__} instead of logits",
            "Wrap it in a module whose forward returns the tensor of logits.",
        )
    shape = tuple(logits.shape)
    if len(shape) != 2 or shape[1] != (classes or shape[1]):
        wanted = f"logits (2, {classes or 'classes'})"
        raise UsageError(
            f"network {arch} gives {shape} for 2 images instead of {wanted}", "Replace its last layer."
        )
    about: Any = network
    about.head_name = next((name for name, output in linear if output is logits), None)
    about.class_count = logits.shape[1]
    return network


def _torchvision_with(name: str) -> Any:
    """`torchvision.models`, which has a classifier of this name."""
    from torchvision import models as zoo

    known = sorted({*zoo.list_models(module=zoo)} - {*_AUXILIARY})
    if name not in known:
        hint = similar(name, known) or f"It has {', '.join(known)}."
        raise UsageError(f"torchvision has no classifier {name}", hint)
    return zoo


def _torchvision(name: str, classes: int, input_size: tuple[int, int, int]) -> nn.Module:
    count = {"num_classes": classes} if classes else {}
    made: nn.Module = _torchvision_with(name).get_model(name, weights=None, **count)
    if input_size[2] == 1:  # grey images as RGB
        made.register_forward_pre_hook(lambda module, inputs: inputs[0].expand(-1, 3, -1, -1))
    return made


def _of_torchvision(name: str, weights: str, sha256: str) -> Published:
    entries: Any = _torchvision_with(name).get_model_weights(name)
    if weights and weights not in entries.__members__:
        hint = f"It has {', '.join(entries.__members__)}; or name a file."
        raise UsageError(f"torchvision:{name} has no weights {weights}", hint)
    # the hash is part of each file's name
    by_file = (each for each in entries if each.url.endswith(f"-{sha256[:8]}.pth"))
    entry = entries[weights] if weights else next(by_file, entries.DEFAULT)
    preset = entry.transforms()
    [side], [crop] = preset.resize_size, preset.crop_size
    mean, std = (255 * torch.tensor(values) for values in (preset.mean, preset.std))
    photo = Photo(mean, std, max(side, crop), crop, preset.interpolation.value, bool(preset.antialias))
    read = partial(
        entry.get_state_dict, map_location="cpu", progress=False, check_hash=True, weights_only=True
    )
    return Published(photo, f"preprocessing of {entry}", read)


def _timm_with(name: str) -> Any:
    """The package timm, which has a network of this name: no file, and no repository on a hub."""
    try:
        import timm  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise UsageError("timm is not installed", "pip install 'kdcli[timm]'") from error
    arch, _, tag = name.partition(".")
    if not timm.is_model(name) or (tag and name not in timm.list_models(arch, include_tags=True)):
        raise UsageError(f"timm has no network {name}", similar(name, timm.list_models()))
    return timm


def _timm(name: str, classes: int, input_size: tuple[int, int, int]) -> nn.Module:
    count = {"num_classes": classes} if classes else {}
    return _timm_with(name).create_model(name, in_chans=input_size[2], **count)


def _of_timm(name: str, weights: str, sha256: str) -> Published:
    timm = _timm_with(name)
    if weights:
        raise UsageError(f"timm:{name}: weights are named {name}.{weights} there", "Or name a file.")
    cfg = timm.get_pretrained_cfg(name)
    read = partial(timm.create_model, name, pretrained=True)
    return Published(*_photo({} if cfg is None else vars(cfg)), lambda: read().state_dict())


def own(network: nn.Module) -> str:
    """Keep a copy of a user's module in this process; its name is made of class, layers, shapes and attributes."""
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    own_names = [vars(part).keys() - vars(nn.Module()).keys() for part in network.modules()]
    plain = [
        {key: value for key in names if isinstance(value := getattr(part, key), int | float | str | None)}
        for part, names in zip(network.modules(), own_names, strict=True)
    ]
    name = f"{type(network).__name__}-{digest([repr(network), shapes, plain])[:8]}"
    _OWN[name] = copy.deepcopy(network).cpu()
    return f"module:{name}"


def _module(name: str, classes: int, input_size: tuple[int, int, int]) -> nn.Module:
    if name not in _OWN:
        raise UsageError(
            f"the module {name} is not known to this process",
            "From Python, first: kd.load_model(module, data=…)",
        )
    return copy.deepcopy(_OWN[name])


def source_digests(arch: str) -> dict[str, str]:
    """SHA-256 of the source file of a user's function, which is imported, or of a module's weights; else empty."""
    source, _, name = arch.partition(":")
    if source == "module":
        return {arch: digest(dict(_module(name, 0, (0, 0, 0)).state_dict()))}
    if not code.is_name(arch):
        return {}
    _function(arch)
    return {arch: code.digest(arch)}


def _of_module(name: str, weights: str, sha256: str) -> Published:
    return Published(*_photo({}), _module(name, 0, (0, 0, 0)).state_dict)


def _function(name: str) -> Callable[..., Any]:
    """Import a user's function; a UsageError if it is not allowed, see `code.allow`."""
    if code.is_name(name) and name not in code.allowed():
        raise UsageError(
            f"network {name} is a custom function, which runs only if you name it",
            f"If you trust its code: export {code.ALLOWED}={name}",
        )
    return code.load(name, f"network {name}", similar(name.partition(":")[0], code.SOURCES) or _FACTORY)


def _required(name: str) -> set[str]:
    """The parameters of a user's function that have no default."""
    parameters = inspect.signature(_function(name)).parameters
    return {key for key, each in parameters.items() if each.default is each.empty}


def _factory(name: str, classes: int, input_size: tuple[int, int, int], /, **args: Any) -> nn.Module:
    """The network that a user's function makes, with those of these values that its signature names.

    With 0 classes, their own number or that of its weights, with those that it requires.
    """
    function = _function(name)
    known = {"classes": classes or 2, "num_classes": classes or 2, "input_size": input_size}
    named = inspect.signature(function).parameters if classes else _required(name)
    chosen = {key: known[key] for key in known if key in named}
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            made: nn.Module = function(**{**chosen, **args})
    except Exception as error:
        raise KdError(
            f"network {name} cannot be made: {type(error).__name__}: {first_line(error)}",
            "--debug shows where.",
        ) from error
    return made


def _photo(cfg: Mapping[str, Any]) -> tuple[Photo, str]:
    """The preprocessing of timm's `pretrained_cfg`, and its origin; without a size, images are taken as they are."""
    crop = (cfg.get("input_size") or (0,))[-1]
    side = math.floor(crop / (cfg.get("crop_pct") or _CROP_SHARE))
    mean, std = (
        255 * torch.tensor(cfg.get(key) or values)
        for key, values in zip(("mean", "std"), _IMAGENET, strict=True)
    )
    label = "preprocessing of its pretrained_cfg" if cfg else "ImageNet's mean and deviation"
    wanted = interpolation = cfg.get("interpolation") or "bilinear"
    if wanted not in INTERPOLATIONS:  # timm's `lanczos` and `random`
        interpolation, label = "bicubic", f"{label}, with bicubic for {wanted}"
    return Photo(mean, std, max(side, crop), crop, interpolation), label


SOURCES: dict[str, tuple[Callable[..., nn.Module], Callable[..., Published]]] = {
    "torchvision": (_torchvision, _of_torchvision),
    "timm": (_timm, _of_timm),
    "module": (_module, _of_module),
}
