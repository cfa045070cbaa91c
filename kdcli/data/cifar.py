"""CIFAR-10 in its official python form: pickled batches in a tarball or an unpacked folder."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from kdcli.base import pickles
from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent, Progress
from kdcli.data import catalog
from kdcli.data.decode import Pixels
from kdcli.data.images import Splits
from kdcli.data.pack import FORMAT_VERSION, Cache, Selection
from kdcli.data.sources import open_source

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
SIZE = 32
TRAIN_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
BATCHES = (*TRAIN_BATCHES, "test_batch")
DOWNLOAD_HINT = (
    "Run kd download cifar10, or give your own images: --data with a folder or archive that holds "
    "train/<class>/* and test/<class>/*."
)


def is_cifar10(path: Path) -> bool:
    """Whether a path is the official archive (by name) or its unpacked folder (by content)."""
    if path.is_dir():
        return (path / BATCHES[0]).is_file() or (path / FOLDER / BATCHES[0]).is_file()
    return path.name == ARCHIVE


def find_cifar10(data_dir: Path) -> Path:
    """The archive or unpacked folder in `data_dir`.

    Raises:
        KdError: neither is there.
    """
    for candidate in (data_dir / FOLDER, data_dir / ARCHIVE):
        if (candidate.is_dir() and is_cifar10(candidate)) or candidate.is_file():
            return candidate
    raise KdError(f"CIFAR-10 is not in {data_dir}", DOWNLOAD_HINT)


def load_cifar10(
    path: Path, spec: str, *, cache_dir: Path, image_size: int | None, channels: int, on_event: OnEvent
) -> Splits:
    """CIFAR-10 from its archive or folder; unpickled (safely) once, then read from the cache.

    Raises:
        KdError: a batch is missing, damaged, or holds anything but arrays and lists.
    """
    source = open_source(path)
    content = source.key()
    image_size = None if image_size == SIZE else image_size
    words = f"cifar10 {FORMAT_VERSION} {content} {image_size}" + (" grey" if channels == 1 else "")
    digest = hashlib.sha256(words.encode())
    cache = Cache(cache_dir, digest.hexdigest()[:32])
    if (known := cache.load(spec)) is not None:
        return known
    parts: dict[str, tuple[Pixels, npt.NDArray[np.int64]]] = {}
    classes: tuple[str, ...] = catalog.CIFAR10_CLASSES
    for name, data in source.read(lambda name: name.split("/")[-1] in (*BATCHES, "batches.meta")):
        base = name.split("/")[-1]
        if base == "batches.meta":
            classes = _class_names(unpickled(data, name, DOWNLOAD_HINT), name)
        else:
            parts[base] = _batch(unpickled(data, name, DOWNLOAD_HINT), name)
            on_event(Progress("reading", len(parts), len(BATCHES), "batches"))
    missing = [name for name in BATCHES if name not in parts]
    if missing:
        raise KdError(f"{path} lacks {', '.join(missing)}", DOWNLOAD_HINT)
    labels = np.concatenate([parts[name][1] for name in BATCHES])
    if labels.max() >= len(classes):
        raise KdError(f"{path} has labels beyond its {len(classes)} classes", DOWNLOAD_HINT)
    train_count = len(labels) - len(parts["test_batch"][1])
    rows = np.arange(len(labels))
    selections = [
        Selection(rows[part], labels[part]) for part in (slice(train_count), slice(train_count, None))
    ]
    notes = []
    if path.is_file() and catalog.KNOWN_ARCHIVES.get(content) != "CIFAR-10":
        notes.append(f"{path.name} is not the official archive: its SHA-256 differs.")
    with cache.packing(image_size, channels) as (workspace, spool):  # resized images need not fit into memory
        images = (image for name in BATCHES for image in parts[name][0])
        for number, image in enumerate(images):
            spool.put(number, image)
        cache.store(workspace, spool.view(), selections, classes=classes, label="CIFAR-10", notes=notes)
    return cache.stored(spec)


def unpickled(data: bytes, name: str, hint: str = "") -> dict[str, object]:
    """Return the dictionary in one file of CIFAR-10 or CIFAR-100.

    Raises:
        KdError: it holds none; names the file.
    """
    try:
        value = pickles.load_pickle(data)
    except KdError as error:
        raise KdError(f"{name}: {error.message}", error.hint or hint) from error
    return {text_of(key): content for key, content in value.items()}


def text_of(value: object) -> str:
    """A name as text: Python 2 wrote bytes."""
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _batch(batch: dict[str, object], name: str) -> tuple[Pixels, npt.NDArray[np.int64]]:
    """Pixels (N, 32, 32, 3) and labels (N,) of one batch, which stores (N, 3072) with planes R, G, B."""
    data, labels = batch.get("data"), batch.get("labels")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise KdError(f"{name} is no CIFAR-10 batch: data is not uint8 (N, 3072)", DOWNLOAD_HINT)
    if (
        not isinstance(labels, list)
        or len(labels) != len(data)
        or not len(data)
        or not all(type(label) is int and 0 <= label < 10 for label in labels)
    ):
        raise KdError(f"{name} is no CIFAR-10 batch: labels are not {len(data)} numbers 0-9", DOWNLOAD_HINT)
    pixels = cast(Pixels, data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return np.ascontiguousarray(pixels), np.array(labels, dtype=np.int64)


def _class_names(meta: dict[str, object], name: str) -> tuple[str, ...]:
    names = meta.get("label_names")
    if not isinstance(names, list) or len(names) != 10 or not all(isinstance(n, str | bytes) for n in names):
        raise KdError(f"{name}: no ten label_names", DOWNLOAD_HINT)
    return tuple(text_of(n) for n in names)
