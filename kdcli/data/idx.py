"""MNIST and Fashion-MNIST: gzip'ed IDX files, a header of big-endian sizes and then bytes."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdcli.base.errors import KdError
from kdcli.data import catalog
from kdcli.data.formats import Format, Part

MAX_BYTES = 256 << 20  # of one file's content; MNIST's largest has 47 million
UNSIGNED_BYTES = 0x08


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """The array of bytes in a gzip'ed IDX file.

    Raises:
        KdError: damaged, cut short, another kind of array, or larger than `MAX_BYTES`.
    """
    try:
        with gzip.open(path, "rb") as handle:
            head = handle.read(4 + 4 * dimensions)
            if head[:4] != bytes((0, 0, UNSIGNED_BYTES, dimensions)):
                raise KdError(f"{path} is no IDX file of bytes in {dimensions} dimensions")
            shape = struct.unpack(f">{dimensions}I", head[4:])
            size = math.prod(shape)
            if size > MAX_BYTES:
                raise KdError(f"{path} holds {size:,} bytes; at most {MAX_BYTES:,} are read")
            content = handle.read(size)
            if len(content) != size or handle.read(1):  # the last read checks gzip's own sum, too
                raise KdError(f"{path} is damaged: it does not hold the {size:,} bytes it states")
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise KdError(f"cannot read {path}: {error}") from error
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _part(paths: Mapping[str, Path], split: str) -> Part:
    images = read_idx(paths[f"{split}-images-idx3-ubyte.gz"], 3)
    labels = read_idx(paths[f"{split}-labels-idx1-ubyte.gz"], 1)
    return Part(images[..., None], labels.astype(np.int64))


def _format(name: str, label: str, classes: tuple[str, ...]) -> Format:
    def read(paths: Mapping[str, Path]) -> tuple[Part, Part, tuple[str, ...]]:
        return _part(paths, "train"), _part(paths, "t10k"), classes

    return Format(name, label, (28, 28, 1), read)


MNIST = _format("mnist", "MNIST", catalog.DIGITS)
FASHION_MNIST = _format("fashion-mnist", "Fashion-MNIST", catalog.FASHION_CLASSES)
