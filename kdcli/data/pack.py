"""Cache of decoded data sets: per part an .npy file of pixels and one of labels; meta.json has their SHA-256."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from joblib import cpu_count

from kdcli.base import files
from kdcli.base.errors import KdError
from kdcli.base.events import Note, OnEvent, Progress, ignore
from kdcli.base.text import printable, reason
from kdcli.data import rows
from kdcli.data.decode import Pixels, resize, with_channels
from kdcli.data.images import ImageSet, Splits, fingerprint_of, overlap_of

FORMAT_VERSION = 6  # raise it when packing gives other pixels, or images other splits
FALLBACK_SIZE = 32
_BLOCK = 64 << 20  # bytes of pixels with a SHA-256 of their own
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_verified: set[tuple[object, ...]] = set()  # entries, by place and state of their files


class Selection(NamedTuple):
    """One part of a data set: indices (N,) of packed images, their labels (N,), and paths of their files, if any."""

    indices: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    names: Sequence[str] = ()


@dataclass(frozen=True)
class Packed:
    """A cache entry: its parts by name, the label for tables, notes for the user, and values of its `Splits`."""

    parts: dict[str, ImageSet]
    label: str
    notes: tuple[str, ...]
    overlap: int
    test_fraction: float | None

    def splits(self, spec: str) -> Splits:
        """The parts `train` and `test` as a data set."""
        train, test = self.parts["train"], self.parts["test"]
        return Splits(
            spec, self.label, train, test, self.notes, overlap=self.overlap, test_fraction=self.test_fraction
        )


class Packer:
    """Decoded images by index, in a scratch file; all of one shape.

    Without a `size` the shape of the first image holds until one differs. Then all images are resized to
    `FALLBACK_SIZE`, so that the outcome does not depend on their order. `resized`: whether any image had to be.
    """

    def __init__(self, folder: Path, size: int | None, channels: int, full: int = 0) -> None:
        self.folder, self.resized = folder, full > 0
        self._size, self._channels, self._full = size, channels, full
        self._shape: tuple[int, int, int] | None = None
        self._written: list[int] = []
        self._lock = threading.Lock()
        self._handle = (folder / "pixels-0").open("w+b")

    def put(self, index: int, pixels: Pixels) -> None:
        """Store the pixels (H, W, C) of image `index`; thread-safe."""
        pixels = with_channels(pixels, self._channels)
        if self._size is not None:
            self.resized = self.resized or pixels.shape[:2] != (self._size, self._size)
            pixels = resize(pixels, self._size, self._full)
        with self._lock:
            shape = (pixels.shape[0], pixels.shape[1], self._channels)
            if self._shape is None:
                self._shape = shape
            elif shape != self._shape:
                if self._size is None:
                    self._resize_all()
                pixels = resize(pixels, FALLBACK_SIZE)
            self._write(index, pixels)
            self._written.append(index)

    def _write(self, index: int, pixels: Pixels) -> None:
        self._handle.seek(index * pixels.nbytes)
        self._handle.write(np.ascontiguousarray(pixels).tobytes())

    def _resize_all(self) -> None:
        before = self.images()
        self._handle.close()
        self._handle = (self.folder / "pixels-1").open("w+b")
        for index in self._written:
            self._write(index, resize(before[index], FALLBACK_SIZE))
        self._size, self.resized = FALLBACK_SIZE, True
        self._shape = (FALLBACK_SIZE, FALLBACK_SIZE, self._channels)
        (self.folder / "pixels-0").unlink()

    def images(self) -> Pixels:
        """All images (N, H, W, C) by index, as a memory map."""
        assert self._shape is not None
        self._handle.flush()
        count = max(self._written) + 1
        return np.memmap(self._handle, dtype=np.uint8, mode="r", shape=(count, *self._shape))

    def close(self) -> None:
        self._handle.close()


class Cache:
    """The entry of one data set below `cache_dir`, named by its key: all that its content depends on."""

    def __init__(self, cache_dir: Path, key: Mapping[str, Any], on_event: OnEvent = ignore) -> None:
        self.folder = files.cache_folder(cache_dir, "data", {"format": FORMAT_VERSION, **key})
        self._on_event = on_event

    def load(self) -> Packed | None:
        """The entry, memory-mapped; None if there is none. A damaged one is removed, with a note.

        The content is compared with its SHA-256 once a process, and again if a file has changed.
        """
        try:
            meta = files.read_document(self.folder / "meta.json")
            sums, classes, parts = meta.pop("sha256"), tuple(meta["classes"]), {}
            for name, fingerprint in meta["fingerprints"].items():
                images = np.load(self.folder / f"{name}-images.npy", mmap_mode="r", allow_pickle=False)
                labels = np.load(self.folder / f"{name}-labels.npy", allow_pickle=False)
                validation = meta["validation"] if name == "train" else 0
                parts[name] = ImageSet(images, labels, classes, fingerprint, validation)
                if (names := self.folder / f"{name}-names.npy").is_file():
                    name_bytes = np.load(names, mmap_mode="r", allow_pickle=False)
                    parts[name] = replace(parts[name], name_bytes=name_bytes)
            state = (self.folder.resolve(), *map(_state, sorted(self.folder.iterdir())))
            if state not in _verified and sums != _sums(self.folder, meta, self._on_event):
                raise ValueError("other content")
            _verified.add(state)
            return Packed(
                parts, meta["label"], tuple(meta["notes"]), meta["overlap"], meta.get("test_fraction")
            )
        except (KdError, OSError, ValueError, KeyError, TypeError, AttributeError, EOFError) as error:
            cause = error.__cause__ or error
            if isinstance(cause, OSError) and not isinstance(cause, _ABSENT):  # such as too many open files
                raise KdError(
                    f"cannot read {self.folder}: {reason(cause)}", "Choose another place with --cache-dir."
                ) from error
            if self.folder.exists():
                self._on_event(Note(f"the packed images in {self.folder} are damaged and are packed anew"))
                shutil.rmtree(self.folder, ignore_errors=True)
            return None

    @contextmanager
    def packer(self, size: int | None, channels: int, full: int = 0) -> Iterator[Packer]:
        """A packer to `size` pixels per side, in a scratch folder that is removed at the end."""
        parent = self.folder.parent
        try:
            workspace = files.scratch_folder(parent)
            try:
                with closing(Packer(workspace, size, channels, full)) as packer:
                    yield packer
            finally:
                shutil.rmtree(workspace, ignore_errors=True)
        except OSError as error:
            raise KdError(
                f"cannot write to {parent}: {reason(error)}", "Choose another place with --cache-dir."
            ) from error

    def store(
        self,
        packer: Packer,
        selections: Mapping[str, Selection],
        *,
        classes: tuple[str, ...],
        label: str,
        notes: list[str],
        test_fraction: float | None = None,
        validation: int = 0,
    ) -> Packed:
        """Write the selected parts of what was packed as this entry; KdError if it cannot be read back."""
        workspace, images = packer.folder, packer.images()
        fingerprints, written = {}, {}
        for name, (indices, labels, names) in selections.items():
            path = workspace / f"{name}-images.npy"
            shape = (len(indices), *images.shape[1:])
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            with path.open("wb") as handle:  # not through a map, where a full disk is a bus error
                np.lib.format.write_array_header_1_0(handle, header)
                for start in range(0, len(indices), 1024):
                    handle.write(rows.take(images, indices[start : start + 1024]).data)
            np.save(workspace / f"{name}-labels.npy", labels, allow_pickle=False)
            if names:
                content = "".join(f"{each}\0" for each in names).encode("utf-8", "surrogateescape")
                np.save(workspace / f"{name}-names.npy", np.frombuffer(content, np.uint8), allow_pickle=False)
            written[name] = np.load(path, mmap_mode="r", allow_pickle=False)
            fingerprints[name] = fingerprint_of(written[name], labels, classes)
        for scratch in workspace.glob("pixels-*"):
            scratch.unlink()
        meta = {
            "label": printable(label),
            "classes": classes,
            "notes": [*map(printable, notes)],  # names of folders may not be UTF-8
            "test_fraction": test_fraction,
            "validation": validation,
            "fingerprints": fingerprints,
            "overlap": overlap_of(written["train"], written["test"]) if "test" in written else 0,
        }
        files.write_json(workspace / "meta.json", {**meta, "sha256": _sums(workspace, meta)})
        if self.load() is None:  # else another process was quicker, and wrote the same
            with suppress(OSError):
                files.publish(workspace, self.folder)
        packed = self.load()
        if packed is None:
            raise KdError(
                f"cannot read back {self.folder}", "Free some space, or choose another --cache-dir."
            )
        return packed


def _sums(folder: Path, meta: Mapping[str, Any], on_event: OnEvent = ignore) -> list[str]:
    """SHA-256 of an entry's values, and of each block of its other files, several at a time."""
    contents = [np.memmap(path, np.uint8, "r") for path in sorted(folder.glob("*.npy"))]
    blocks = [
        content[start : start + _BLOCK] for content in contents for start in range(0, content.size, _BLOCK)
    ]
    sums = [hashlib.sha256(json.dumps(meta).encode()).hexdigest()]
    with ThreadPoolExecutor(min(8, cpu_count()), thread_name_prefix="verify") as pool:
        for done, digest in enumerate(pool.map(lambda block: hashlib.sha256(block).hexdigest(), blocks), 1):
            sums.append(digest)
            if done % 16 == 0:
                on_event(Progress("verifying packed images", done * _BLOCK, len(blocks) * _BLOCK, "bytes"))
    return sums


def _state(path: Path) -> tuple[object, ...]:
    status = path.stat()
    return path.name, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
