"""MNIST and Fashion-MNIST: IDX files, gzip'ed or not, a header of big-endian sizes and then bytes."""

import gzip
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdcli.base.errors import KdError
from kdcli.base.files import check_pointer
from kdcli.data.datasets import Content, LabelledImages, dataset
from kdcli.data.sources import reader_errors

MAX_BYTES = 256 << 20  # of one file's content; MNIST's largest has 47 million
UNSIGNED_BYTES = 0x08
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """The array of bytes in an IDX file, which may be gzip'ed; KdError for any other or more than `MAX_BYTES`."""
    with reader_errors(lambda detail: KdError(f"cannot read {path}: {detail}")):
        with path.open("rb") as handle:
            start = handle.read(64)
        check_pointer(start, str(path))
        with path.open("rb") if start.startswith(b"\0\0") else gzip.open(path, "rb") as handle:
            head = handle.read(4 + 4 * dimensions)
            if head[:4] != bytes((0, 0, UNSIGNED_BYTES, dimensions)):
                raise KdError(f"{path} is not an IDX file of bytes in {dimensions} dimensions")
            shape = struct.unpack(f">{dimensions}I", head[4:])
            size = math.prod(shape)
            if size > MAX_BYTES:
                raise KdError(f"{path} holds {size:,} bytes; at most {MAX_BYTES:,} are read")
            content = handle.read(size)
            if len(content) != size or handle.read(1):  # the last read checks gzip's own sum, too
                raise KdError(f"{path} is damaged: it does not hold the {size:,} bytes it states")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


@dataset("mnist", label="MNIST", input_size=(28, 28, 1))
def read_mnist(paths: Mapping[str, Path], classes: tuple[str, ...] = tuple("0123456789")) -> Content:
    """Four files: images and labels of the splits `train` and `t10k`."""

    def split(name: str) -> LabelledImages:
        images = read_idx(paths[f"{name}-images-idx3-ubyte.gz"], 3)
        labels = read_idx(paths[f"{name}-labels-idx1-ubyte.gz"], 1)
        return LabelledImages(images[..., None], labels.astype(np.int64))

    return Content(split("train"), split("t10k"), classes)


@dataset("fashion-mnist", label="Fashion-MNIST", input_size=(28, 28, 1))
def read_fashion_mnist(paths: Mapping[str, Path]) -> Content:
    return read_mnist(paths, FASHION_CLASSES)
