"""Scaling of the student's output to the teacher's units, for the regression of logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kdcli import models
from kdcli.teacher import CachedLogits


@dataclass(frozen=True)
class OutputScale:
    """logits = shift + scale · network(x), with the mean and spread of the teacher's logits.

    Regression has to reach the teacher's values, and a network starts near 0 with steps made for logits of a few
    units: a Caffe NIN's logits lie around 19 ± 9. Ba & Caruana (NIPS 2014, section 3) subtract the mean and divide
    by the standard deviation of the targets; this is the same written on the student's side, so that the loss stays
    ½‖s − t‖² in the teacher's units. It is folded into the last layer at the end and leaves no trace in the file.

    Attributes:
        shift: (C,), the mean of each class's logit over the training images.
        scale: standard deviation around these means, over all classes.
    """

    shift: Tensor
    scale: float

    @classmethod
    def of(cls, outputs: CachedLogits, samples: npt.NDArray[np.int64], device: torch.device) -> OutputScale:
        """From the teacher's logits for the training images."""
        total = sum(chunk.sum(axis=0) for chunk in outputs.chunks(samples))
        mean = np.asarray(total / len(samples))  # (C,)
        squares = sum(float(((chunk - mean) ** 2).sum()) for chunk in outputs.chunks(samples))
        spread = float(np.sqrt(squares / (len(samples) * len(mean))))
        shift = torch.from_numpy(mean.astype(np.float32)).to(device)
        return cls(shift, spread if spread > 0 else 1.0)

    def __call__(self, outputs: Tensor) -> Tensor:
        """The network's outputs (B, C) → logits (B, C)."""
        return self.shift + self.scale * outputs

    def fold(self, network: nn.Module) -> None:
        """Make the network itself give the logits. Its last layer must be linear (`models.final_linear`)."""
        head = _head(network)
        with torch.no_grad():
            head.weight.mul_(self.scale)
            head.bias.mul_(self.scale).add_(self.shift)

    def unfold(self, network: nn.Module) -> None:
        """The reverse of `fold`, for a network that already gives logits."""
        head = _head(network)
        with torch.no_grad():
            head.weight.div_(self.scale)
            head.bias.sub_(self.shift).div_(self.scale)


def _head(network: nn.Module) -> nn.Linear:
    head = models.final_linear(network)
    if head is None:
        raise RuntimeError("only a network that ends in a linear layer can be given an output scale")
    return head
