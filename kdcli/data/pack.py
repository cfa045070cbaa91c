"""Packed datasets: two .npy files of pixels, two of labels, and a meta.json that is written last."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdcli.base import files
from kdcli.base.errors import KdError
from kdcli.base.text import reason
from kdcli.data import rows
from kdcli.data.decode import Pixels, fit, with_channels
from kdcli.data.images import NO_LABEL, ImageSet, Splits, fingerprint_of

FORMAT_VERSION = 2  # raise it when packing or decoding gives other pixels
FALLBACK_SIZE = 32
SPLITS = ("train", "test")


class Spool:
    """Pixels of images as they are decoded, by number, in a scratch file; all of one shape.

    With no `size` the shape of the first image holds until one differs; then what was written is resized to
    `FALLBACK_SIZE` and so is all that follows. The outcome does not depend on the order of arrival.

    Attributes:
        resized: whether any image had to be.
    """

    def __init__(self, folder: Path, size: int | None, channels: int) -> None:
        self._folder = folder
        self._size = size
        self._channels = channels
        self._shape: tuple[int, int, int] | None = None
        self._written: list[int] = []
        self._lock = threading.Lock()
        self._path = folder / "spool-0"
        self._handle = self._path.open("w+b")
        self.resized = False

    def put(self, index: int, pixels: Pixels) -> None:
        """Keep the pixels (H, W, C) of image `index`; called from any thread."""
        pixels = with_channels(pixels, self._channels)
        if self._size is not None:
            self.resized = self.resized or pixels.shape[:2] != (self._size, self._size)
            pixels = fit(pixels, self._size)
        with self._lock:
            shape = (pixels.shape[0], pixels.shape[1], self._channels)
            if self._shape is None:
                self._shape = shape
            elif shape != self._shape:
                if self._size is None:
                    self._shrink()
                pixels = fit(pixels, FALLBACK_SIZE)
            self._write(index, pixels)
            self._written.append(index)

    def _write(self, index: int, pixels: Pixels) -> None:
        self._handle.seek(index * pixels.nbytes)
        self._handle.write(np.ascontiguousarray(pixels).tobytes())

    def _shrink(self) -> None:
        before = self.view()
        self._handle.close()
        old = self._path
        self._path = self._folder / "spool-1"
        self._handle = self._path.open("w+b")
        for index in self._written:
            self._write(index, fit(before[index], FALLBACK_SIZE))
        self._size, self.resized = FALLBACK_SIZE, True
        self._shape = (FALLBACK_SIZE, FALLBACK_SIZE, self._channels)
        del before
        old.unlink()

    def view(self) -> Pixels:
        """All images (N, H, W, C), by number."""
        assert self._shape is not None
        self._handle.flush()
        count = max(self._written) + 1
        return np.memmap(self._path, dtype=np.uint8, mode="r", shape=(count, *self._shape))

    def close(self) -> None:
        """Let go of the scratch file."""
        self._handle.close()


def _unwritable(folder: Path, error: OSError) -> KdError:
    return KdError(f"cannot write to {folder}: {reason(error)}", "Choose another place with --cache-dir.")


@dataclass(frozen=True)
class Selection:
    """One split: `order` picks rows of the pixels; `labels` (N,) goes with them."""

    order: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]


class Cache:
    """The packed form of one dataset below `cache_dir`."""

    def __init__(self, cache_dir: Path, key: str) -> None:
        self.folder = cache_dir / "data" / key

    def load(self, spec: str) -> Splits | None:
        """The dataset as packed before; None if it is not there, half-written or damaged."""
        found = self.parts(SPLITS)
        if found is None:
            return None
        (train, test), label, notes = found
        return Splits(spec=spec, label=label, train=train, test=test, notes=notes)

    def parts(self, names: Sequence[str]) -> tuple[list[ImageSet], str, tuple[str, ...]] | None:
        """The named parts as packed before, label and notes; None as for `load`."""
        try:
            meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            if meta["format_version"] != FORMAT_VERSION:
                return None
            classes = tuple(str(name) for name in meta["classes"])
            found = [self._load_split(name, meta["splits"][name], classes) for name in names]
            return found, str(meta["label"]), tuple(str(note) for note in meta["notes"])
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            return None

    def _load_split(self, split: str, meta: dict[str, Any], classes: tuple[str, ...]) -> ImageSet:
        pixels_path, labels_path = self.folder / f"{split}-images.npy", self.folder / f"{split}-labels.npy"
        if [pixels_path.stat().st_size, labels_path.stat().st_size] != meta["file_sizes"]:
            raise ValueError("sizes differ")
        images = np.load(pixels_path, mmap_mode="r", allow_pickle=False)
        labels = np.load(labels_path, allow_pickle=False)
        if images.dtype != np.uint8 or list(images.shape) != meta["shape"] or labels.dtype != np.int64:
            raise ValueError("not what was written")
        least = 0 if classes else NO_LABEL
        if labels.shape != (len(images),) or labels.min() < least or labels.max() >= len(classes):
            raise ValueError("labels damaged")
        return ImageSet(images, labels, classes, str(meta["fingerprint"]))

    def workspace(self) -> Path:
        """A fresh scratch folder beside the entry; `store` moves it into place.

        Raises:
            KdError: the cache folder cannot be written.
        """
        try:
            return files.scratch_folder(self.folder.parent)
        except OSError as error:
            raise _unwritable(self.folder.parent, error) from error

    @contextmanager
    def packing(self, image_size: int | None, channels: int) -> Iterator[tuple[Path, Spool]]:
        """A scratch folder for `store` and a spool in it; what is left of them is gone at the end.

        Raises:
            KdError: the cache folder cannot be written.
        """
        workspace = self.workspace()
        try:
            spool = Spool(workspace, image_size, channels)
            try:
                yield workspace, spool
            finally:
                spool.close()
        except OSError as error:
            raise _unwritable(workspace.parent, error) from error
        finally:
            shutil.rmtree(workspace, ignore_errors=True)

    def stored(self, spec: str) -> Splits:
        """The dataset that `store` has just written.

        Raises:
            KdError: it is not there.
        """
        packed = self.load(spec)
        if packed is None:
            raise self.unreadable()
        return packed

    def unreadable(self) -> KdError:
        """The error for an entry that has just been written and is not there."""
        return KdError(
            f"cannot read back {self.folder}", "Is the disk full? Choose another with --cache-dir."
        )

    def store(
        self,
        workspace: Path,
        pixels: Pixels,
        selections: Sequence[Selection],
        *,
        classes: tuple[str, ...],
        label: str,
        notes: Sequence[str],
        names: Sequence[str] = SPLITS,
    ) -> None:
        """Write the entry in `workspace` and give it its name. `selections` are its parts."""
        split_meta: dict[str, Any] = {}
        for split, chosen in zip(names, selections, strict=True):
            pixels_path, labels_path = workspace / f"{split}-images.npy", workspace / f"{split}-labels.npy"
            shape = (len(chosen.order), *pixels.shape[1:])
            with pixels_path.open("wb") as handle:  # not through a map, where a full disk is a bus error
                about = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(handle, about)
                for start in range(0, len(chosen.order), 1024):
                    handle.write(rows.take(pixels, chosen.order[start : start + 1024]).data)
            packed = np.load(pixels_path, mmap_mode="r", allow_pickle=False)
            np.save(labels_path, chosen.labels, allow_pickle=False)
            split_meta[split] = {
                "shape": list(shape),
                "file_sizes": [pixels_path.stat().st_size, labels_path.stat().st_size],
                "fingerprint": fingerprint_of(packed, chosen.labels, classes),
            }
            del packed
        for scratch in workspace.glob("spool-*"):
            scratch.unlink()
        meta = {
            "format_version": FORMAT_VERSION,
            "label": label,
            "classes": list(classes),
            "notes": list(notes),
            "splits": split_meta,
        }
        files.write_json(workspace / "meta.json", meta)
        workspace.chmod(0o755)
        try:
            workspace.rename(self.folder)
        except OSError:
            if self.parts(names) is not None:  # another process was quicker, and wrote the same
                return
            shutil.rmtree(self.folder, ignore_errors=True)  # damaged
            with suppress(OSError):
                workspace.rename(self.folder)
        files.fsync_directory(self.folder.parent)
