"""The one form in which images reach the rest of the program."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ImageSet:
    """Images and labels of one split.

    Attributes:
        images: uint8 (N, H, W, C), RGB or grey, in memory or a read-only memory map.
        labels: int64 (N,), in 0 … len(classes) − 1.
        classes: class names in label order.
        fingerprint: SHA-256 of the content (see `fingerprint_of`).
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        _, height, width, channels = self.images.shape
        return height, width, channels


@dataclass(frozen=True)
class Splits:
    """A dataset: `spec` as the user gave it, `label` as tables print it, and its two splits.

    `notes` are things the user should know (images resized, folders skipped).
    """

    spec: str
    label: str
    train: ImageSet
    test: ImageSet
    notes: tuple[str, ...] = field(default=())


def fingerprint_of(
    images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64], classes: tuple[str, ...]
) -> str:
    """Hexadecimal SHA-256 over shape, class names, labels and pixels."""
    digest = hashlib.sha256()
    digest.update(repr((images.shape, classes)).encode())
    digest.update(np.ascontiguousarray(labels, dtype="<i8").tobytes())
    for start in range(0, len(images), 4096):
        digest.update(np.ascontiguousarray(images[start : start + 4096]).tobytes())
    return digest.hexdigest()
