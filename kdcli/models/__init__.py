"""Networks by name, and the `Classifier` that joins a network with its preprocessing.

Adding a network: write a function named as the model in a file of its family, add a row to `MODELS`; if it ends
in a linear layer, which then reads vectors (B, D), name that in the class attribute `head`. The attribute `stages`
names the submodules, each called once, whose outputs are the maps (B, C, H, W) at the end of each stage, in order.
"""

from __future__ import annotations

import importlib
import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kdcli.base.errors import KdError, UsageError
from kdcli.base.events import OnEvent, Progress, ignore
from kdcli.data import rows
from kdcli.data.preprocess import Preprocess, from_spec
from kdcli.models import checkpoint
from kdcli.models.checkpoint import Checkpoint

# name -> where its function lives; `graph` is what kd convert-caffe builds and cannot be asked for by name
MODELS = {
    "lenet": "kdcli.models.lenet:lenet",
    "lenet-caffe": "kdcli.models.lenet:lenet_caffe",
    "nin": "kdcli.models.nin:nin",
    "nin-fc": "kdcli.models.nin:nin_fc",
    "convnet-tiny": "kdcli.models.convnet:convnet_tiny",
    "convnet-small": "kdcli.models.convnet:convnet_small",
    "convnet-large": "kdcli.models.convnet:convnet_large",
    "resnet8": "kdcli.models.resnet:resnet8",
    "resnet14": "kdcli.models.resnet:resnet14",
    "resnet20": "kdcli.models.resnet:resnet20",
    "resnet32": "kdcli.models.resnet:resnet32",
    "resnet44": "kdcli.models.resnet:resnet44",
    "resnet56": "kdcli.models.resnet:resnet56",
    "resnet110": "kdcli.models.resnet:resnet110",
    "resnet8x4": "kdcli.models.resnet:resnet8x4",
    "resnet32x4": "kdcli.models.resnet:resnet32x4",
    "wrn-16-1": "kdcli.models.wide_resnet:wrn_16_1",
    "wrn-16-2": "kdcli.models.wide_resnet:wrn_16_2",
    "wrn-40-1": "kdcli.models.wide_resnet:wrn_40_1",
    "wrn-40-2": "kdcli.models.wide_resnet:wrn_40_2",
    "vgg8": "kdcli.models.vgg:vgg8",
    "vgg13": "kdcli.models.vgg:vgg13",
    "mobilenetv2-half": "kdcli.models.mobilenet:mobilenetv2_half",
    "shufflenetv1": "kdcli.models.shufflenet:shufflenetv1",
    "shufflenetv2": "kdcli.models.shufflenet:shufflenetv2",
    "graph": "kdcli.models.graph:graph",
}


class Classifier(nn.Module):
    """Preprocessing and network as one module.

    Attributes:
        network: float32 (B, C, H, W) as preprocessed → logits (B, classes).
        preprocess: raw pixels (B, C, H, W) in 0–255 → the network's input.
        arch, arch_args: how `build` makes the network again.
        classes: class names in the order of the logits.
        input_size: (H, W, C) of the raw images.
        provenance: plain values: method, data, teacher, accuracy, source file …
    """

    def __init__(
        self,
        network: nn.Module,
        preprocess: Preprocess,
        *,
        arch: str,
        arch_args: dict[str, Any],
        classes: tuple[str, ...],
        input_size: tuple[int, int, int],
        provenance: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.preprocess = preprocess
        self.arch = arch
        self.arch_args = arch_args
        self.classes = classes
        self.input_size = input_size
        self.provenance = dict(provenance or {})

    def forward(self, images: Tensor) -> Tensor:
        """Raw images uint8 (B, H, W, C) → logits (B, classes)."""
        logits: Tensor = self.network(self.prepare(images))
        return logits

    def prepare(self, images: Tensor) -> Tensor:
        """Raw images uint8 (B, H, W, C) → the network's input float32 (B, C, H, W).

        The permutation of contiguous NHWC is channels-last NCHW: no copy but the cast.
        """
        prepared: Tensor = self.preprocess(images.permute(0, 3, 1, 2).float())
        return prepared

    def to_checkpoint(self, training: dict[str, Any] | None = None) -> Checkpoint:
        """As it lies on disk."""
        return Checkpoint(
            arch=self.arch,
            arch_args=self.arch_args,
            state_dict=dict(self.network.state_dict()),
            preprocess=self.preprocess.spec(),
            classes=self.classes,
            input_size=self.input_size,
            provenance=self.provenance,
            training=training,
        )

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically."""
        checkpoint.save(path, self.to_checkpoint())


def build(arch: str, *, classes: int, input_size: tuple[int, int, int], **arch_args: Any) -> nn.Module:
    """A freshly initialised network: float32 (B, C, H, W) → logits (B, classes).

    Args:
        arch: a name in `MODELS`.
        classes: number of logits.
        input_size: (H, W, C) of the images.
        arch_args: what the model's function takes beside these two.

    Raises:
        UsageError: unknown name or argument, or images too small for the network.
    """
    make = _function(arch)
    try:
        network: nn.Module = make(classes=classes, input_size=input_size, **arch_args)
    except TypeError as error:
        raise UsageError(f"network {arch} does not take these arguments: {error}") from error
    return network


def names() -> tuple[str, ...]:
    """The networks that can be asked for by name."""
    return tuple(name for name in MODELS if name != "graph")


def _function(arch: str) -> Callable[..., nn.Module]:
    if arch not in MODELS:
        raise UsageError(
            f"unknown network: {arch}",
            f"Known are {', '.join(names())}; kd train also takes a checkpoint (.pt).",
        )
    module, name = MODELS[arch].split(":")
    function: Callable[..., nn.Module] = getattr(importlib.import_module(module), name)
    return function


def takes_dropout(arch: str) -> bool:
    """Whether a network has dropout to set."""
    return "dropout" in inspect.signature(_function(arch)).parameters


def takes_width(arch: str) -> bool:
    """Whether a network has a multiplier of its channel counts, `width`."""
    return "width" in inspect.signature(_function(arch)).parameters


def from_checkpoint(stored: Checkpoint, source: str = "checkpoint") -> Classifier:
    """Build the network a checkpoint describes and fill in its weights, in eval mode.

    Raises:
        KdError: the weights do not fit the network they claim to belong to.
    """

    def made() -> nn.Module:
        return build(
            stored.arch, classes=len(stored.classes), input_size=stored.input_size, **stored.arch_args
        )

    try:
        with torch.random.fork_rng(
            devices=[]
        ):  # initial weights are thrown away; leave the caller's RNG alone
            with torch.device("meta"):  # nothing is allocated before it is known to be what the file holds
                wanted = {name: value.shape for name, value in made().state_dict().items()}
            found = {name: value.shape for name, value in stored.state_dict.items()}
            if wanted != found:
                odd = sorted(n for n in {*wanted, *found} if wanted.get(n) != found.get(n))
                told = [f"{n} is {_shape(found.get(n))}, wanted {_shape(wanted.get(n))}" for n in odd[:3]]
                raise RuntimeError("; ".join(told))
            network = made()
            network.load_state_dict(stored.state_dict)
        preprocess = from_spec(stored.preprocess)
    except KdError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        detail = " ".join(str(error).split())[:300]
        raise KdError(
            f"{source}: weights do not fit network {stored.arch}: {detail}",
            "The file is damaged, or was made by another version of kd; write it again.",
        ) from error
    return Classifier(
        network.to(memory_format=torch.channels_last),
        preprocess,
        arch=stored.arch,
        arch_args=stored.arch_args,
        classes=stored.classes,
        input_size=stored.input_size,
        provenance=stored.provenance,
    ).eval()


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else "×".join(map(str, shape)) or "one value"


def load(path: Path) -> Classifier:
    """Read a checkpoint file into a `Classifier` in eval mode."""
    stored = checkpoint.load(path)
    if stored.training is not None:
        raise KdError(
            f"{path} is the state of a run, not a finished model",
            f"Use {path.with_name('student.pt')}, or finish it: kd train --resume {path.parent}",
        )
    return from_checkpoint(stored, str(path))


def final_linear(network: nn.Module) -> nn.Linear | None:
    """The last layer, where its outputs are the logits as they are.

    A network says so by the attribute `head`, the layer's name; None if something follows (in NIN a ReLU).
    """
    name = getattr(network, "head", None)
    layer = network.get_submodule(name) if isinstance(name, str) else None
    return layer if isinstance(layer, nn.Linear) else None


def parameter_count(module: nn.Module) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in module.parameters())


def predict_logits(
    model: Callable[[Tensor], Tensor],
    images: rows.Images,
    samples: npt.NDArray[np.int64] | None = None,
    *,
    batch_size: int = 64,
    task: str = "evaluating",
    on_event: OnEvent = ignore,
) -> Tensor:
    """Logits float32 (N, classes) of a model for raw images uint8 (N, H, W, C), on the CPU.

    Args:
        model: from uint8 (B, H, W, C) to logits (B, classes); in eval mode. A module gets the images on its device.
        samples: numbers of the images; by default all.
    """
    device = (
        next((value.device for value in model.parameters()), None) if isinstance(model, nn.Module) else None
    )
    count = len(images) if samples is None else len(samples)
    parts: list[Tensor] = []
    told = 0.0
    with torch.inference_mode():
        for start in range(0, count, batch_size):
            chosen = (
                slice(start, start + batch_size) if samples is None else samples[start : start + batch_size]
            )
            batch = torch.from_numpy(rows.take(images, chosen))
            parts.append(model(batch if device is None else batch.to(device)).float().cpu())
            done = min(start + batch_size, count)
            now = time.monotonic()
            if now - told > 0.1 or done == count:
                told = now
                on_event(Progress(task, done, count))
    return torch.cat(parts) if parts else torch.zeros(0, 0)
