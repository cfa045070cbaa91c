"""SVHN, cropped digits: MATLAB 5 files with X (32, 32, 3, N) and y (N, 1), where 10 stands for the digit 0."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kdcli.base.errors import KdError
from kdcli.base.files import check_pointer
from kdcli.data.datasets import Content, LabelledImages, dataset
from kdcli.data.sources import reader_errors

MAX_FILE_BYTES = 2 << 30
MAX_IMAGES = 1_000_000
SIZE = (32, 32, 3)


def read_mat(path: Path) -> LabelledImages:
    """Images and labels of one file; shapes are checked before the arrays are read, which bounds their size."""
    from scipy.io import loadmat, whosmat

    if path.stat().st_size > MAX_FILE_BYTES:
        raise KdError(f"{path} is larger than {MAX_FILE_BYTES:,} bytes")
    with path.open("rb") as handle:
        check_pointer(handle.read(64), str(path))
    with reader_errors(lambda detail: KdError(f"cannot read {path}: {detail}")):
        shapes = {name: (shape, kind) for name, shape, kind in whosmat(path)}
        (shape, kind), (labels_shape, _) = (shapes.get(name, ((), "")) for name in ("X", "y"))
        count = shape[3] if len(shape) == 4 else 0
        if shape[:3] != SIZE or kind != "uint8" or labels_shape != (count, 1) or count > MAX_IMAGES:
            raise KdError(f"{path} holds no X uint8 (32, 32, 3, N) and y (N, 1)")
        held = loadmat(path, variable_names=["X", "y"])
    images, labels = held["X"], held["y"]
    if labels.dtype.kind not in "iuf" or not np.isin(labels, np.arange(1, 11)).all():
        raise KdError(f"{path} has labels that are not 1 to 10")
    return LabelledImages(
        np.ascontiguousarray(images.transpose(3, 0, 1, 2)), labels.reshape(-1).astype(np.int64) % 10
    )


@dataset("svhn", label="SVHN", input_size=SIZE)
def read_svhn(paths: Mapping[str, Path]) -> Content:
    train, test = (read_mat(paths[f"{name}_32x32.mat"]) for name in ("train", "test"))
    return Content(train, test, tuple("0123456789"))
