"""Dropout and batch norm that give equal results for any division of a batch among processes, and after a resume."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from kdcli.base.errors import UsageError
from kdcli.base.runtime import sum_over_processes
from kdcli.data import augment

_GOLDEN, _FIRST, _SECOND = -1640531527, 0x21F0AAAD, 0x735A2D97  # odd constants; the first is 0x9E3779B9


@dataclass
class DropoutKeys:
    """Random keys of the current batch, shared by all dropout layers of a network."""

    seed: int
    stream: int = 0  # number of the network within a run (student, teacher)
    reseeds: bool = False  # torch's own generator too, for layers of other programs that draw from it
    keys: Tensor | None = None  # int32 (4, B), random bits of the batch's samples in this epoch

    def step(self, epoch: int, samples: npt.NDArray[np.int64], device: torch.device) -> None:
        """Set the keys of a batch: the same samples in the same epoch get the same masks."""
        random = augment.random_bits(self.seed, augment.DROPOUT, epoch, samples, block=self.stream)
        self.keys = torch.from_numpy(random.view(np.int32)).to(device)
        if self.reseeds:
            torch.manual_seed(int(random[0, 0]))


def _mix(x: Tensor) -> Tensor:
    """A bijection of int32 in which each input bit affects each output bit (C. Wellons' `lowbias32`)."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * _FIRST
    x = (x ^ ((x >> 15) & 0x1FFFF)) * _SECOND
    return x ^ ((x >> 15) & 0x1FFFF)


# Axes along which the mask of a layer varies, if not all; by name, as torchvision is imported only where it is used
_AXES = {"Dropout2d": 2, "StochasticDepth": 1}


class SampleDropout(nn.Dropout):
    """Dropout whose mask is a pure function of seed, epoch, sample, layer and element.

    torch's own dropout draws from a generator in the order of the batch: two processes with half a batch each would
    drop other values than one process with all of it, and a resumed run would have to restore the generator.
    """

    keys: DropoutKeys
    number: int  # of the layer in its network
    axes: int | None  # see `_AXES`

    def forward(self, values: Tensor) -> Tensor:
        """(B, …) → the same, each value 0 with probability p, else divided by 1 − p.

        Values of another first axis, as (positions, B, C) or windows of images, are drawn by the first sample's keys.
        """
        if not self.training or self.p == 0:
            return values
        keys = self.keys.keys
        if keys is None:
            raise RuntimeError("DropoutKeys.step was not called")
        keys = keys if keys.shape[1] == len(values) else keys[:, :1]
        shape = torch.Size([*values.shape[: self.axes], *[1] * values.dim()][: values.dim()])
        elements = shape.numel() // keys.shape[1]
        element = torch.arange(elements, dtype=torch.int32, device=values.device)  # (E,)
        first = _mix(keys[self.number % 4] + self.number // 4)[:, None]
        second = keys[(self.number + 1) % 4][:, None]
        noise = _mix(_mix(first + element * _GOLDEN) ^ second)  # (B, E), each int32 as likely
        kept = noise >= round(self.p * 2.0**32) - 2**31
        return values * (kept.reshape(shape).to(values.dtype) / (1 - self.p))


def use_sample_dropout(network: nn.Module, keys: DropoutKeys) -> None:
    """Turn each dropout layer of a network, and torchvision's stochastic depth, into a `SampleDropout`."""
    layers: list[Any] = [
        module
        for module in network.modules()
        if isinstance(module, nn.Dropout) or type(module).__name__ in _AXES
    ]
    for number, layer in enumerate(layers):
        layer.axes = _AXES.get(type(layer).__name__)
        layer.__class__ = SampleDropout
        layer.keys, layer.number = keys, number


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the parts of a batch that all processes hold; torch's `SyncBatchNorm` is for GPUs only."""

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, …) → the same, normalised by mean and variance over the samples and positions of all processes."""
        if not self.training:
            return super().forward(maps)
        values = maps.float()
        places = tuple(range(2, values.dim()))
        column = (-1, *(1 for _ in places))  # per-channel values, broadcast over positions
        exact = torch.float64  # so that the order of summation has no effect
        count = torch.tensor([values.numel() / values.shape[1]], dtype=exact, device=values.device)
        sums = sum_over_processes(torch.cat([values.sum(dim=(0, *places), dtype=exact), count]))
        total = sums[-1]
        mean = (sums[:-1] / total).float()
        centred = values - mean.reshape(column)
        squares = sum_over_processes(centred.square().sum(dim=(0, *places), dtype=exact))
        variance = (squares / total).float()
        if (
            self.running_mean is not None
            and self.running_var is not None
            and self.num_batches_tracked is not None
        ):
            self.num_batches_tracked.add_(1)
            momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * (total / (total - 1)).float(), momentum)
        normal: Tensor = centred * torch.rsqrt(variance + self.eps).reshape(column)
        if self.affine:
            normal = normal * self.weight.reshape(column) + self.bias.reshape(column)
        return normal.to(maps.dtype)

    def _check_input_dim(self, maps: Tensor) -> None:
        """Accept vectors and maps."""


def use_global_batch_norm(network: nn.Module) -> None:
    """Turn each `nn.BatchNorm1d` and `nn.BatchNorm2d` of a network into its global form, over all processes.

    A UsageError for another program's subclass of these, as in many networks of timm: it does more.
    """
    for module in network.modules():
        if not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            continue
        if type(module).__module__.startswith(("torch.", "kdcli.")):
            module.__class__ = GlobalBatchNorm  # type: ignore[assignment]
        else:
            raise UsageError(
                f"--devices: {type(module).__name__} of this network cannot be synchronised over processes",
                "Use --devices 1.",
            )
