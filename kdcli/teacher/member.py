"""A model of a teacher: a frozen checkpoint or an ONNX file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdcli.base.errors import KdError
from kdcli.data import ImageSet, incompatibility
from kdcli.deploy.load import load_model
from kdcli.models import Classifier


def freeze(model: Classifier, dropout: float = 0.0) -> Classifier:
    """Put a classifier into eval mode without gradients.

    Args:
        dropout: above 0, the network's dropout layers stay on at this rate (Sau & Balasubramanian 2016).

    Raises:
        KdError: the network has no dropout layers.
    """
    model.eval().requires_grad_(False)
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    if dropout > 0 and not layers:
        raise KdError(
            "--teacher-dropout: this teacher has no dropout layers", "Leave it out, or set it to 0."
        )
    for layer in layers if dropout > 0 else ():
        layer.p = dropout
        layer.train()
    return model


@dataclass
class Member:
    """A model of a teacher; its file is read when the model is first used.

    Attributes:
        sha256: of the file, which holds weights and preprocessing.
        weight: of its logits in the teacher's mean; all weights sum to 1.
        device, threads: where it runs; threads are those of onnxruntime, 0: all cores.
        passes: how often it was run over a data set.
    """

    path: Path
    sha256: str
    weight: float
    device: torch.device
    threads: int
    passes: int = 0
    _model: Any = field(default=None, repr=False)

    @property
    def model(self) -> Any:
        """The frozen classifier on its device, or an ONNX model."""
        if self._model is None:
            loaded = load_model(self.path, self.threads)
            self._model = freeze(loaded).to(self.device) if isinstance(loaded, Classifier) else loaded
        return self._model

    def check(self, data: ImageSet) -> None:
        """Raise KdError unless the model takes these images and knows these classes."""
        model = self.model
        problem = incompatibility(model.classes, model.input_size, data)
        if problem is None:
            return
        flags = []
        if incompatibility(model.classes, data.input_size, data) is None:  # only the images' shape is wrong
            height, width, channels = model.input_size
            flags += ["--grey"] if (channels, data.input_size[2]) == (1, 3) else []
            resizable = height == width and (height, width) != data.input_size[:2]
            same_channels = bool(flags) or channels == data.input_size[2]
            flags += [f"--image-size {height}"] if resizable and same_channels else []
        raise KdError(
            f"teacher {self.path} {problem}",
            f"Try {' '.join(flags)}." if flags else "Teacher and data must belong together.",
        )
