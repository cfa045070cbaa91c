"""Registry of named data sets: one module of `kdcli.data.sets` for each, found when this module is imported.

A module registers a function that reads the files of a data set:

    @dataset("mine", label="Mine", input_size=(28, 28, 1), files=("mine/mine.npz",))
    def read_mine(paths: Mapping[str, Path]) -> Content: ...
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from kdcli.base.config import shell_command
from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent, Progress
from kdcli.base.files import sha256_file
from kdcli.base.text import reason
from kdcli.data import catalog, sets
from kdcli.data.decode import Pixels, resize, with_channels
from kdcli.data.images import ImageSet, Splits, fingerprint_of, overlap_of
from kdcli.data.pack import Cache, Selection
from kdcli.data.sources import FolderSource, reader_errors

EVENT_IMAGES = 2048


@dataclass(frozen=True)
class Request:
    """Arguments of `load`; `channels` is 1, 3, or None for those of the data."""

    spec: str
    data_dir: Path
    cache_dir: Path
    image_size: int | None
    channels: int | None
    on_event: OnEvent
    skip_broken: bool
    resize: int
    test_fraction: float


class LabelledImages(NamedTuple):
    """One split as its files hold it: uint8 images (N, H, W, C) and int64 labels (N,)."""

    images: Pixels
    labels: npt.NDArray[np.int64]


class Content(NamedTuple):
    train: LabelledImages
    test: LabelledImages
    classes: tuple[str, ...]


Read = Callable[[Mapping[str, Path]], Content]
AnyRead = TypeVar("AnyRead", bound=Read)


@dataclass(frozen=True)
class Dataset:
    """A named data set. Call it with a request to load it."""

    name: str  # value of --data and `kd download`
    label: str  # name in tables
    input_size: tuple[int, int, int]  # (H, W, C) of its images
    files: tuple[str, ...]  # paths below the data folder
    folder: str | None  # a folder in the data folder that may stand for the files: the one archive, unpacked
    members: tuple[str, ...]  # names of files that such a folder holds, by which it is known under any name
    read: Read  # from paths by their file names to the content; a KdError without a hint gets `hint`

    def hint(self, data_dir: Path) -> str:
        """Hint of an error about an absent or damaged file."""
        if self.name in catalog.DOWNLOADS:
            options = {} if data_dir == Path("data") else {"data_dir": data_dir}
            download = shell_command("download", options, Path(self.name))
            return f"Pass your own images, a folder or archive of class folders, or download it: {download}"
        return f"Put {', '.join(self.files)} into the data folder (--data-dir)."

    def locate(self, path: Path) -> dict[str, Path]:
        """Paths of its files by file name, at the path of its archive or of a folder with its files; else empty.

        Gzip'ed files may be unpacked.
        """
        if path.is_file():
            return {path.name: path} if [path.name] == [Path(file).name for file in self.files] else {}
        for folder in (path, path / (self.folder or self.name), path / "raw"):
            known = bool(self.members) and all((folder / name).is_file() for name in self.members)
            if self.folder is not None and folder.is_dir() and (known or folder.name == self.folder):
                return {self.folder: folder}
            names = [Path(file).name for file in self.files]
            variants = ((folder / name, folder / name.removesuffix(".gz")) for name in names)
            found = [next(filter(Path.is_file, pair), None) for pair in variants]
            if self.folder is None and found and None not in found:
                return {name: file for name, file in zip(names, found, strict=True) if file is not None}
        return {}

    def find(self, data_dir: Path) -> dict[str, Path]:
        """Paths of its files by file name; KdError if one is absent."""
        if self.folder is not None and (data_dir / self.folder).is_dir():
            return {self.folder: data_dir / self.folder}
        paths = [data_dir / file for file in self.files]
        absent = [path.name for path in paths if not path.is_file()]
        if absent:
            raise KdError(
                f"{self.label} not found in {paths[0].parent}: no {', '.join(absent)}", self.hint(data_dir)
            )
        return {path.name: path for path in paths}

    def __call__(self, request: Request, located: Mapping[str, Path] | None = None) -> Splits:
        """The data set, from its own place or the files `located`; read once, then from the cache."""
        height, width, own_channels = self.input_size
        own_size = request.image_size == height == width and not request.resize
        size = None if own_size else request.image_size
        channels = request.channels or own_channels
        if not self.files:
            return self._in_memory(request, size, channels)
        # 1. The content decides on the cache entry.
        paths = located or self.find(request.data_dir)
        try:
            keys = [
                FolderSource(file).key() if file.is_dir() else sha256_file(file) for file in paths.values()
            ]
        except OSError as error:
            raise KdError(f"cannot read {error.filename}: {reason(error)}") from error
        key = {
            "dataset": self.name,
            "content": keys,
            "image_size": size,
            "resize": request.resize,
            "channels": channels,
        }
        cache = Cache(request.cache_dir, key, request.on_event)
        if (packed := cache.load()) is not None:
            return packed.splits(request.spec)
        # 2. Read and pack.
        content = self._checked(paths, request.data_dir)
        official = {remote.sha256 for remote in catalog.DOWNLOADS.get(self.name, ())}
        notes = [
            f"{file.name} is not the official file: its SHA-256 differs."
            for (name, file), key in zip(paths.items(), keys, strict=True)
            if official and file.is_file() and key not in official and file.name == name  # not unpacked
        ]
        boundary = len(content.train.images)
        count = boundary + len(content.test.images)
        with cache.packer(size, channels, request.resize) as packer:
            for index, image in enumerate(chain(content.train.images, content.test.images)):
                packer.put(index, image)
                if index % EVENT_IMAGES == 0:
                    request.on_event(Progress("packing", index, count))
            selections = {
                "train": Selection(np.arange(boundary), content.train.labels),
                "test": Selection(np.arange(boundary, count), content.test.labels),
            }
            packed = cache.store(packer, selections, classes=content.classes, label=self.label, notes=notes)
        return packed.splits(request.spec)

    def _in_memory(self, request: Request, size: int | None, channels: int) -> Splits:
        """A data set without files, such as one that a library brings, is small and not cached."""
        train, test, classes = self._checked({}, request.data_dir)

        def prepared(part: LabelledImages) -> ImageSet:
            images = [with_channels(image, channels) for image in part.images]
            pixels = np.stack(
                [image if size is None else resize(image, size, request.resize) for image in images]
            )
            return ImageSet(pixels, part.labels, classes, fingerprint_of(pixels, part.labels, classes))

        splits = Splits(request.spec, self.label, prepared(train), prepared(test))
        return replace(splits, overlap=overlap_of(splits.train.images, splits.test.images))

    def _checked(self, paths: Mapping[str, Path], data_dir: Path) -> Content:
        """The content, if it is images of the right size with labels of the right classes."""
        try:
            with reader_errors(lambda detail: KdError(f"{self.label} cannot be read: {detail}")):
                content = self.read(paths)
        except KdError as error:
            raise KdError(error.message, error.hint or self.hint(data_dir)) from error
        count = len(content.classes)
        for name, (images, labels) in (("train", content.train), ("test", content.test)):
            problem = ""
            if images.dtype != np.uint8 or images.shape[1:] != self.input_size or not len(images):
                problem = f"images {images.dtype} {images.shape} instead of uint8 (N, *{self.input_size})"
            elif labels.dtype != np.int64 or labels.shape != images.shape[:1]:
                problem = f"labels {labels.dtype} {labels.shape} instead of int64 ({len(images)},)"
            elif labels.min() < 0 or labels.max() >= count:
                problem = f"labels {labels.min()} … {labels.max()} instead of 0 … {count - 1}"
            if problem:
                raise KdError(f"{self.label} has {name} {problem}", self.hint(data_dir))
        return content


DATASETS: dict[str, Dataset] = {}


def dataset(
    name: str,
    *,
    label: str,
    input_size: tuple[int, int, int],
    files: tuple[str, ...] | None = None,
    folder: str | None = None,
    members: tuple[str, ...] = (),
) -> Callable[[AnyRead], AnyRead]:
    """Register a function that reads the files of a data set; arguments as the attributes of `Dataset`.

    `files` are by default those of the entry `name` in `catalog.DOWNLOADS`; empty for a data set without files.
    """
    if files is None and name not in catalog.DOWNLOADS:
        raise ValueError(f"@dataset {name}: name its files, or add them to catalog.DOWNLOADS")
    if files is None:
        files = tuple(remote.name for remote in catalog.DOWNLOADS[name])

    def register(read: AnyRead) -> AnyRead:
        DATASETS[name] = Dataset(name, label, input_size, files, folder, members, read)
        return read

    return register


def discover() -> None:
    """Import every module of `kdcli.data.sets`, which registers the data sets."""
    for module in pkgutil.iter_modules(sets.__path__):
        importlib.import_module(f"{sets.__name__}.{module.name}")
