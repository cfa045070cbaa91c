"""Split of the training images into training and validation samples, and of unsplit images into train and test."""

import re
from bisect import bisect
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
}  # fmt: skip
_BESIDE = {"", "data", "image", "images", "img", "imgs", "seg", "set", "split"}  # other words of such a name


def split_of(name: str) -> str | None:
    """The split by a usual name of one, in any case, also as in `seg_train` or `Test-Set`; None for other names."""
    words = set(re.split("[-_ ]", name.lower())) - _BESIDE
    return SPLIT_NAMES.get(words.pop()) if len(words) == 1 else None


def split_validation(labels: Int64, fraction: float, own: int = 0) -> tuple[Int64, Int64]:
    """Indices of the training and of the validation samples: the last `own`, or else a share stratified by class.

    Every seed and method gets the same split, so that runs can be compared. Of each class at least one is a training
    sample, and of each class of two or more one is a validation sample, unless the fraction is 0.
    """
    from kdcli.data import augment

    if own:
        return np.arange(len(labels) - own), np.arange(len(labels) - own, len(labels))
    least = 1 if fraction > 0 else 0
    samples = np.arange(len(labels))
    shuffled = augment.order(0, augment.SPLIT_EPOCH, samples)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.unique(labels, return_counts=True)[1]
    starts = np.cumsum(counts) - counts
    validation = [
        by_class[start : start + min(max(round(fraction * count), least), count - 1)]
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True)
    ]
    chosen = np.sort(np.concatenate(validation)) if validation else samples[:0]
    return np.setdiff1d(samples, chosen), chosen


def digests_of_test_images(digests: Iterable[bytes], fraction: float) -> set[bytes]:
    """Those of a class's images, by SHA-256, that are test images: below `fraction` of the range of the values.

    So further images move none, and copies of an image are on its side. One exception: where this puts all of two or
    more different images on one side, the smallest is a test image, or the largest a training image, as long as the
    class has no other there.
    """
    ordered = sorted(set(digests))
    count = bisect(ordered, int(fraction * 2**64).to_bytes(8, "big"))
    return set(ordered[: min(max(count, 1), len(ordered) - 1)])
