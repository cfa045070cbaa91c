"""Image sets and splits: the form in which all other packages receive data."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcli.base.text import dims
from kdcli.data import rows

NO_LABEL = -1
_CHUNK = 1024  # images hashed at a time
_MOST_OVERLAP = 0.01  # of the test images, without a warning


@dataclass(frozen=True)
class ImageSet:
    """Images and labels of one split.

    Attributes:
        images: uint8 (N, H, W, C), RGB or grey: an array, a read-only memory map, or two of these joined.
    """

    images: rows.Images = field(repr=False)
    labels: npt.NDArray[np.int64] = field(repr=False)  # int64 (N,), in 0 … len(classes) − 1, or `NO_LABEL`
    classes: tuple[str, ...]
    fingerprint: str  # SHA-256 of the content (see `fingerprint_of`)
    validation: int = 0  # number of its last images, which are the data's own validation split
    resize: int = 0  # pixels of the shorter side before the centre crop, see `decode.resize`; 0: no crop
    # UTF-8 of `names`, each with a NUL
    name_bytes: npt.NDArray[np.uint8] | None = field(default=None, repr=False)
    other_names: npt.NDArray[np.uint8] | None = field(default=None, repr=False)  # of the other split

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        _, height, width, channels = self.images.shape
        return height, width, channels

    @property
    def names(self) -> list[str]:
        """Path of each image's file below the data's folder; empty where images are no files."""
        content = b"" if self.name_bytes is None else self.name_bytes.tobytes()
        return content.decode("utf-8", "surrogateescape").split("\0")[:-1]


@dataclass(frozen=True)
class Splits:
    """A data set: value of --data, name in tables, images, and notes for the user.

    Attributes:
        test_fraction: share of the images that are test images, where a split was made; None for data with one.
    """

    spec: str
    label: str
    train: ImageSet
    test: ImageSet
    notes: tuple[str, ...] = field(default=())
    unlabelled: ImageSet | None = None  # further images to train on, without labels and classes
    overlap: int = 0  # number of test images that are training images too, see `overlap_of`
    test_fraction: float | None = None
    settings: Mapping[str, Any] = field(default_factory=dict, repr=False)  # of kd train, where they are known

    @property
    def trained_on(self) -> ImageSet:
        """The images of `train` followed by the unlabelled ones, without a copy."""
        train, unlabelled = self.train, self.unlabelled
        if unlabelled is None:
            return train
        digest = hashlib.sha256(f"{train.fingerprint} {unlabelled.fingerprint}".encode())
        names = [part.name_bytes for part in (train, unlabelled) if part.name_bytes is not None]
        return replace(
            train,
            images=rows.Joined(train.images, unlabelled.images),
            labels=np.concatenate([train.labels, unlabelled.labels]),
            fingerprint=digest.hexdigest(),
            validation=0,
            name_bytes=np.concatenate(names) if len(names) == 2 else None,
        )


def pixel_hashes(images: rows.Images) -> Iterator[bytes]:
    """A hash of each image's pixels, in order."""
    for start in range(0, len(images), _CHUNK):
        for image in rows.take(images, slice(start, start + _CHUNK)):
            yield hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def overlap_of(train: rows.Images, test: rows.Images) -> int:
    """Number of test images that equal a training image, pixel by pixel."""
    known = set(pixel_hashes(train))
    return sum(digest in known for digest in pixel_hashes(test))


def overlap_warning(overlap: int, count: int) -> str | None:
    """Warning beside an accuracy on `count` test images; None where at most 1 % of them are training images."""
    if overlap <= count * _MOST_OVERLAP:
        return None
    return (
        f"{overlap:,} of {count:,} test images are also training images: "
        "the accuracy overestimates that on new images"
    )


def changed_test_images(provenance: Mapping[str, Any], test: ImageSet) -> str | None:
    """Note where other test images are recorded, in an untrusted provenance; else None."""
    recorded = provenance.get("data")
    known = recorded.get("fingerprint_test") if isinstance(recorded, Mapping) else None
    if known in (None, test.fingerprint):
        return None
    return "These are not the test images that were measured when the run ended."


def knows_names(model: Any) -> bool:
    """Whether a model's class names are known: mere numbers are if they come from data or from a list of names."""
    numbers = tuple(str(number) for number in range(len(model.classes)))
    return model.classes != numbers or not {"data", "class_names"}.isdisjoint(model.provenance)


def other_classes(model: Any, data: ImageSet) -> str | None:
    """Difference of a model's classes from those of a data set, as `has 10 classes, the data has 3`; None without.

    Class names and their order count, not only their number: with other classes the figures would mean nothing.
    A model whose names are not known fits any names.
    """
    mine, theirs = model.classes, data.classes
    if len(mine) != len(theirs):
        return f"has {len(mine)} classes, the data has {len(theirs)}"
    if mine == theirs or not knows_names(model):
        return None
    own, other = next(pair for pair in zip(mine, theirs, strict=True) if pair[0] != pair[1])
    return f"has a class {own!r} where the data has {other!r}"


def incompatibility(model: Any, data: ImageSet) -> str | None:
    """Reason why a model does not fit a data set; None if it fits. See `other_classes`.

    A model of any size takes grey images as RGB.
    """
    size, given = model.input_size, data.input_size
    fits = given[2] in (1, size[2]) if model.any_size else given == size
    problem = None if fits else f"takes {dims(size)} images, the data has {dims(given)}"
    return other_classes(model, data) or problem


def fingerprint_of(images: rows.Images, labels: npt.NDArray[np.int64], classes: tuple[str, ...]) -> str:
    """Hexadecimal SHA-256 over shape, class names, labels and pixels."""
    digest = hashlib.sha256()
    digest.update(repr((images.shape, classes)).encode())
    digest.update(np.ascontiguousarray(labels, dtype="<i8").tobytes())
    for start in range(0, len(images), 4096):
        digest.update(rows.take(images, slice(start, start + 4096)).data)
    return digest.hexdigest()
