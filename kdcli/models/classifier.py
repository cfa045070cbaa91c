"""`Classifier`: a network joined with its preprocessing; loading, and inference in batches."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kdcli.base import code
from kdcli.base.config import shell_command
from kdcli.base.errors import KdError, is_out_of_memory
from kdcli.base.events import OnEvent, Progress, ignore
from kdcli.data import rows
from kdcli.data.preprocess import Preprocess, from_spec, to_pixels
from kdcli.models import checkpoint, registry
from kdcli.models.checkpoint import Checkpoint
from kdcli.models.class_map import ClassMap
from kdcli.models.layers import ModelCounts, count_network

# attributes of Classifier and Checkpoint
_COMMON = ("arch", "arch_args", "classes", "input_size", "provenance", "resize")


class Classifier(nn.Module):
    """Preprocessing and network as one module.

    Attributes:
        network: float32 (B, C, H, W) as preprocessed → logits (B, classes).
        preprocess: raw pixels (B, C, H, W) in 0–255 → the network's input.
        arch, arch_args, classes, input_size, resize, provenance: as in `Checkpoint`.
        file_sha256: of the file that it was read from; empty without one.
        path: the file that it was read from; without one the network's name.
        class_map: from the network's outputs to `classes`; None where these are its outputs.
    """

    class_map: ClassMap | None = None
    # as of an ONNX file, see `deploy.onnx_model.OnnxClassifier`
    gives, is_foreign, why_not_runnable = "logits", False, None

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
        file_sha256: str = "",
        resize: int = 0,
    ) -> None:
        super().__init__()
        self.network = network
        self.preprocess = preprocess
        self.arch = arch
        self.arch_args = arch_args
        self.classes = classes
        self.input_size = input_size
        self.resize = resize
        self.provenance = dict(provenance or {})
        self.file_sha256 = file_sha256
        self.path = Path(arch)

    def forward(self, images: Tensor) -> Tensor:
        """Raw images uint8 (B, H, W, C) → logits (B, classes)."""
        return self.to_classes(self.network(self.prepare(images)))

    def to_classes(self, outputs: Tensor) -> Tensor:
        """Logits of the network's outputs (B, outputs) → those of the classes (B, classes)."""
        return outputs if self.class_map is None else self.class_map(outputs)

    def prepare(self, images: Tensor) -> Tensor:
        """Raw images uint8 (B, H, W, C) → the network's input float32 (B, C, H, W)."""
        return self.preprocess(to_pixels(images))

    @property
    def any_size(self) -> bool:
        """Whether it takes images of any size."""
        return self.preprocess.resizes

    @property
    def network_size(self) -> tuple[int, int, int]:
        """(H, W, C) of the network's input."""
        return self.preprocess.output_size(self.input_size)

    @property
    def file_bytes(self) -> int:
        return self.path.stat().st_size

    def counts(self) -> ModelCounts:
        height, width, channels = self.network_size
        return count_network(self.network, torch.zeros(1, channels, height, width), self.preprocess)

    def to_checkpoint(self, training: dict[str, Any] | None = None) -> Checkpoint:
        return Checkpoint(
            **{name: getattr(self, name) for name in _COMMON},
            state_dict=dict(self.network.state_dict()),
            preprocess=self.preprocess.spec(),
            training=training,
        )

    def save(self, path: Path) -> None:
        checkpoint.save(path, self.to_checkpoint())


def from_checkpoint(stored: Checkpoint, source: str = "checkpoint") -> Classifier:
    """Build a checkpoint's network with its weights, in eval mode; KdError if its parts do not fit each other."""
    try:
        return _build(stored)
    except Exception as error:  # what torch raises on odd arguments is not a closed set
        if is_out_of_memory(error):
            raise
        known = error.message if isinstance(error, KdError) else ""
        text = " ".join(str(error).split())[:300]
        message = known or f"weights or preprocessing do not fit network {stored.arch}: {text}"
        hint = getattr(error, "hint", "") or checkpoint.DAMAGED
        raise KdError(f"{source}: {message}", hint) from error


def _build(stored: Checkpoint) -> Classifier:
    about: dict[str, Any] = {name: getattr(stored, name) for name in (*_COMMON, "file_sha256")}
    prepared = from_spec(stored.preprocess).output_size(stored.input_size)
    size: dict[str, Any] = {"classes": len(stored.classes), "input_size": prepared}
    build = partial(registry.build, stored.arch, **size, **stored.arch_args)
    with torch.random.fork_rng(devices=[]):  # the initial weights are discarded
        # names, shapes and a pass, before memory is allocated; the user's code may read values, which meta lacks
        device = "cpu" if code.is_own(stored.arch) else "meta"
        with torch.device(device), torch.no_grad():
            draft = Classifier(build(), from_spec(stored.preprocess).to(device), **about).eval()
            shape = tuple(draft(torch.zeros(2, *stored.input_size, dtype=torch.uint8)).shape)
            if shape != (2, len(stored.classes)):
                raise ValueError(f"it gives {shape} for 2 images")
            draft.network.load_state_dict(stored.state_dict, assign=True)
        network = build()
        network.load_state_dict(stored.state_dict)
    network = network.to(memory_format=torch.channels_last)
    return Classifier(network, from_spec(stored.preprocess), **about).eval()


def load(path: Path) -> Classifier:
    """Read a checkpoint file into a `Classifier` in eval mode."""
    stored = checkpoint.load(path)
    if stored.training is not None:
        raise KdError(
            f"{path} is the state of a run, not a finished model",
            f"Use {path.with_name('student.pt')}, or finish it: {shell_command('train', {'resume': path.parent})}",
        )
    found = from_checkpoint(stored, str(path))
    found.path = path
    return found


def final_linear(network: nn.Module) -> nn.Linear | None:
    """The linear layer that gives the logits, by the attribute `head_name`; None if it has no bias.

    None also if another layer follows, as a ReLU in NIN.
    """
    name = getattr(network, "head_name", None)
    layer = None if name is None else cast(nn.Linear, network.get_submodule(name))
    return None if layer is None or layer.bias is None else layer


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
        samples: indices of the images; by default all.
    """
    device = None
    if isinstance(model, nn.Module):
        device = next((value.device for value in model.parameters()), None)
    count = len(images) if samples is None else len(samples)
    parts: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, count, batch_size):
            part = slice(start, start + batch_size)
            batch = torch.from_numpy(rows.take(images, part if samples is None else samples[part]))
            parts.append(model(batch if device is None else batch.to(device)).float().cpu())
            on_event(Progress(task, min(start + batch_size, count), count))
    return torch.cat(parts) if parts else torch.zeros(0, 0)
