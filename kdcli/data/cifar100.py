"""CIFAR-100 in its official python form: two pickled batches and names, in a tarball or an unpacked folder.

The fine labels are its 100 classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kdcli.base.errors import KdError
from kdcli.data.cifar import text_of, unpickled
from kdcli.data.formats import Format, Part
from kdcli.data.sources import open_source

FOLDER = "cifar-100-python"
MEMBERS = ("train", "test", "meta")
CLASSES = 100


def _read(paths: Mapping[str, Path]) -> tuple[Part, Part, tuple[str, ...]]:
    [path] = paths.values()
    held: dict[str, dict[str, object]] = {}
    for name, data in open_source(path).read(lambda name: name.split("/")[-1] in MEMBERS):
        held[name.split("/")[-1]] = unpickled(data, name)
    absent = [name for name in MEMBERS if name not in held]
    if absent:
        raise KdError(f"{path} lacks {', '.join(absent)}")
    names = held["meta"].get("fine_label_names")
    if (
        not isinstance(names, list)
        or len(names) != CLASSES
        or not all(isinstance(name, str | bytes) for name in names)
    ):
        raise KdError(f"{path} has no {CLASSES} fine_label_names")
    return _part(held["train"], "train"), _part(held["test"], "test"), tuple(map(text_of, names))


def _part(batch: Mapping[str, object], name: str) -> Part:
    """One batch, which stores its pixels (N, 3072) as planes R, G, B."""
    data, labels = batch.get("data"), batch.get("fine_labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise KdError(f"{name} is no CIFAR-100 batch: data is not uint8 (N, 3072)")
    if not isinstance(labels, list) or not all(
        type(label) is int and 0 <= label < CLASSES for label in labels
    ):
        raise KdError(f"{name} is no CIFAR-100 batch: fine_labels are not numbers 0-{CLASSES - 1}")
    images = np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Part(images, np.array(labels, dtype=np.int64))


CIFAR100 = Format("cifar100", "CIFAR-100", (32, 32, 3), _read, unpacked=FOLDER)
