"""Batches for student and teacher, on the training device."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdcli.data import ImageSet, augment, rows

Int64 = npt.NDArray[np.int64]
_RESIDENT_SHARE = 0.25  # of a GPU's free memory that images may take for good


@dataclass(frozen=True)
class Minibatch:
    """A process's part of a batch.

    Attributes:
        samples: numbers of the images, (B,).
        weight: of its mean loss, see `runtime.World.share`.
        count: images in the whole batch, over all processes.
        images: uint8 (B, H, W, C).
        labels: int64 (B,).
        other_labels, shares: of mixup, (B,); None without.
    """

    samples: Int64
    weight: float
    count: int
    images: Tensor
    labels: Tensor
    other_labels: Tensor | None = None
    shares: Tensor | None = None


class Feed:
    """Makes batches from an image set; on a GPU one batch ahead, in a thread of its own.

    Args:
        pool: samples that an augmentation may mix in.
    """

    def __init__(
        self, data: ImageSet, augment_name: str, seed: int, pool: Int64, device: torch.device
    ) -> None:
        self.data = data
        self.augment_name = augment_name
        self.seed = seed
        self.pool = pool
        self.device = device
        self.labels = torch.tensor(data.labels).to(device)
        self.resident: Tensor | None = None
        if (
            device.type == "cuda"
            and data.images.nbytes < _RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
        ):
            self.resident = torch.from_numpy(rows.take(data.images, slice(None))).to(device)

    def batches(self, view: int, parts: Sequence[tuple[Int64, float, int]]) -> Iterator[Minibatch]:
        """The batches of one epoch in order; each part is samples, weight and count of `Minibatch`."""
        if self.device.type == "cpu":  # all cores work in the step: no work could overlap
            yield from (self.make(view, *part) for part in parts)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="feed") as thread:
            waiting = [thread.submit(self.make, view, *part) for part in parts[:1]]
            for number in range(len(parts)):
                ready = waiting.pop().result()
                if number + 1 < len(parts):
                    waiting.append(thread.submit(self.make, view, *parts[number + 1]))
                yield ready

    def make(self, view: int, samples: Int64, weight: float, count: int) -> Minibatch:
        """One batch."""
        images = augment.make_view(self.augment_name, self._take, self.seed, view, samples, self.pool)
        labels = self.labels[torch.from_numpy(samples).to(self.device)]
        mixed = augment.mixing(self.augment_name, self.seed, view, samples, self.pool)
        if mixed is None:
            return Minibatch(samples, weight, count, images, labels)
        others = self.labels[torch.from_numpy(mixed.partners).to(self.device)]
        shares = torch.from_numpy(mixed.shares).to(self.device)
        return Minibatch(samples, weight, count, images, labels, others, shares)

    def _take(self, samples: Int64) -> Tensor:
        """Raw images uint8 (B, H, W, C), copied out of what may be a memory map."""
        if self.resident is not None:
            return self.resident[torch.from_numpy(samples).to(self.device)]
        images = torch.from_numpy(rows.take(self.data.images, samples))
        if self.device.type != "cuda":
            return images.to(self.device)
        return images.pin_memory().to(self.device, non_blocking=True)
