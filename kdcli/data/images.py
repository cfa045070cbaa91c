"""The one form in which images reach the rest of the program."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from kdcli.data import rows

NO_LABEL = -1


@dataclass(frozen=True)
class ImageSet:
    """Images and labels of one split.

    Attributes:
        images: uint8 (N, H, W, C), RGB or grey, in memory or a read-only memory map, or two of these as one.
        labels: int64 (N,), in 0 … len(classes) − 1; `NO_LABEL` of an image without one.
        classes: class names in label order.
        fingerprint: SHA-256 of the content (see `fingerprint_of`).
    """

    images: rows.Images
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

    `notes` are things the user should know (images resized, folders skipped). `unlabelled` are further images to
    train on, without labels and classes.
    """

    spec: str
    label: str
    train: ImageSet
    test: ImageSet
    notes: tuple[str, ...] = field(default=())
    unlabelled: ImageSet | None = None

    @property
    def trained_on(self) -> ImageSet:
        """The images of `train`, and after them those without labels; nothing is copied."""
        train, more = self.train, self.unlabelled
        if more is None:
            return train
        digest = hashlib.sha256(f"{train.fingerprint} {more.fingerprint}".encode())
        return replace(
            train,
            images=rows.Joined(train.images, more.images),
            labels=np.concatenate([train.labels, more.labels]),
            fingerprint=digest.hexdigest(),
        )


def incompatibility(classes: tuple[str, ...], input_size: tuple[int, int, int], data: ImageSet) -> str | None:
    """Why a model and a data set do not belong together, as `it …, the data …`; None if they do.

    Names count, not only how many: the same number of other classes, or the same in another order, would give
    figures that mean nothing. A model whose classes are numbers (an ONNX file that does not say) fits any names.
    """
    if len(classes) != len(data.classes):
        return f"knows {len(classes)} classes, the data has {len(data.classes)}"
    numbers = tuple(str(number) for number in range(len(classes)))
    if numbers not in (classes, data.classes) and classes != data.classes:
        mine, theirs = next(pair for pair in zip(classes, data.classes, strict=True) if pair[0] != pair[1])
        return f"has a class {mine!r} where the data has {theirs!r}"
    if input_size != data.input_size:
        mine, theirs = ("×".join(map(str, size)) for size in (input_size, data.input_size))
        return f"takes {mine} images, the data has {theirs}"
    return None


def fingerprint_of(images: rows.Images, labels: npt.NDArray[np.int64], classes: tuple[str, ...]) -> str:
    """Hexadecimal SHA-256 over shape, class names, labels and pixels."""
    digest = hashlib.sha256()
    digest.update(repr((images.shape, classes)).encode())
    digest.update(np.ascontiguousarray(labels, dtype="<i8").tobytes())
    for start in range(0, len(images), 4096):
        digest.update(rows.take(images, slice(start, start + 4096)).data)
    return digest.hexdigest()
