"""Data sets that `kd download` puts in place in formats of their own: from their files to the packed form."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent, Progress
from kdcli.base.files import sha256_file
from kdcli.base.text import reason
from kdcli.data import catalog
from kdcli.data.decode import Pixels
from kdcli.data.images import Splits
from kdcli.data.pack import FORMAT_VERSION, Cache, Selection
from kdcli.data.sources import open_source

EVENT_IMAGES = 2048


@dataclass(frozen=True)
class Part:
    """One split as its files hold it: uint8 images (N, H, W, C) and int64 labels (N,)."""

    images: Pixels
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Format:
    """How a data set is found and read.

    Attributes:
        name: after --data and `kd download`; its files, below the data folder, are those of the catalogue.
        label: what tables print.
        input_size: (H, W, C) of its images.
        read: from paths by the last part of their name to train, test and classes.
        unpacked: a folder that stands for the one archive.
    """

    name: str
    label: str
    input_size: tuple[int, int, int]
    read: Callable[[Mapping[str, Path]], tuple[Part, Part, tuple[str, ...]]]
    unpacked: str | None = None

    @property
    def hint(self) -> str:
        """What to do where a file is absent or damaged."""
        return f"Run kd download {self.name}; it fetches what is absent or damaged."

    def find(self, data_dir: Path) -> dict[str, Path]:
        """Its files, by the last part of their name.

        Raises:
            KdError: one is not there.
        """
        if self.unpacked is not None and (data_dir / self.unpacked).is_dir():
            return {self.unpacked: data_dir / self.unpacked}
        paths = [data_dir / remote.name for remote in catalog.DOWNLOADS[self.name]]
        absent = [path.name for path in paths if not path.is_file()]
        if absent:
            raise KdError(f"{self.label} is not in {paths[0].parent}: no {', '.join(absent)}", self.hint)
        return {path.name: path for path in paths}


def load_format(
    kind: Format,
    spec: str,
    *,
    data_dir: Path,
    cache_dir: Path,
    image_size: int | None,
    channels: int | None,
    on_event: OnEvent,
) -> Splits:
    """A data set of `kind`; read once, then from the cache.

    Raises:
        KdError: absent, damaged, or not what it should be.
    """
    paths = kind.find(data_dir)
    try:
        keys = [open_source(path).key() if path.is_dir() else sha256_file(path) for path in paths.values()]
    except OSError as error:
        raise KdError(f"cannot read {error.filename or data_dir}: {reason(error)}") from error
    height, width, own_channels = kind.input_size
    image_size = None if image_size == height == width else image_size
    channels = channels or own_channels
    words = f"{kind.name} {FORMAT_VERSION} {' '.join(keys)} {image_size} {channels}"
    cache = Cache(cache_dir, hashlib.sha256(words.encode()).hexdigest()[:32])
    if (known := cache.load(spec)) is not None:
        return known
    train, test, classes = _checked(kind, paths)
    official = {remote.sha256 for remote in catalog.DOWNLOADS[kind.name]}
    notes = [
        f"{path.name} is not the official file: its SHA-256 differs."
        for path, key in zip(paths.values(), keys, strict=True)
        if path.is_file() and key not in official
    ]
    starts = ((train, 0), (test, len(train.images)))
    count = len(train.images) + len(test.images)
    with cache.packing(image_size, channels) as (workspace, spool):
        for part, start in starts:
            for number, image in enumerate(part.images, start):
                spool.put(number, image)
                if number % EVENT_IMAGES == 0:
                    on_event(Progress("packing", number, count))
        selections = [
            Selection(np.arange(start, start + len(part.labels)), part.labels) for part, start in starts
        ]
        cache.store(workspace, spool.view(), selections, classes=classes, label=kind.label, notes=notes)
    return cache.stored(spec)


def _checked(kind: Format, paths: Mapping[str, Path]) -> tuple[Part, Part, tuple[str, ...]]:
    """What `kind.read` gives, if it is images of the right size with labels of the right classes."""
    try:
        train, test, classes = kind.read(paths)
    except KdError as error:
        raise KdError(error.message, error.hint or kind.hint) from error
    for part, name in ((train, "train"), (test, "test")):
        images, labels = part.images, part.labels
        if images.dtype != np.uint8 or images.shape[1:] != kind.input_size or not len(images):
            raise KdError(
                f"{kind.label} has {name} images {images.dtype} {images.shape} instead of uint8 "
                f"(N, {', '.join(map(str, kind.input_size))})",
                kind.hint,
            )
        if labels.shape != (len(images),) or labels.min() < 0 or labels.max() >= len(classes):
            raise KdError(
                f"{kind.label} has {name} labels that are not {len(images)} numbers of "
                f"{len(classes)} classes",
                kind.hint,
            )
    return train, test, classes
