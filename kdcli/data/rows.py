"""Batches of images from an array that may be a read-only memory map, larger than memory."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt


class Joined:
    """Two arrays of images of one shape as one, without a copy."""

    def __init__(self, first: Images, second: Images) -> None:
        self.first, self.second = first, second

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""
        return (len(self), *self.first.shape[1:])

    @property
    def nbytes(self) -> int:
        return self.first.nbytes + self.second.nbytes

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, chosen: slice | npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """A copy of the chosen images, uint8 (B, H, W, C), in the given order."""
        indices = np.arange(*chosen.indices(len(self))) if isinstance(chosen, slice) else chosen
        in_second = indices >= len(self.first)
        found = np.empty((len(indices), *self.shape[1:]), np.uint8)
        found[~in_second] = take(self.first, indices[~in_second])
        found[in_second] = take(self.second, indices[in_second] - len(self.first))
        return found


Images: TypeAlias = npt.NDArray[np.uint8] | Joined


def take(images: Images, chosen: slice | npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """A contiguous, writable copy of the chosen images, uint8 (B, H, W, C)."""
    return images[chosen] if isinstance(images, Joined) else np.array(images[chosen], order="C")
