"""scikit-learn's 1,797 handwritten digits, 8×8, grey: no download, for demos and tests."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kdcli.data.datasets import Content, LabelledImages, dataset

TRAIN_IMAGES = 1437  # the split is contiguous, so that writers mostly do not overlap


@dataset("digits", label="digits", input_size=(8, 8, 1), files=())
def read_digits(paths: Mapping[str, Path]) -> Content:
    """Pixels 0–16 become 0–255."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # (1797, 8, 8, 1)
    labels = bunch.target.astype(np.int64)
    train, test = slice(None, TRAIN_IMAGES), slice(TRAIN_IMAGES, None)
    return Content(
        LabelledImages(images[train], labels[train]),
        LabelledImages(images[test], labels[test]),
        tuple("0123456789"),
    )
