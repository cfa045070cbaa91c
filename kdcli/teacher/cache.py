"""Logits on disk: a file for each view, written in parts from which a killed pass continues."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock
from torch import Tensor

from kdcli.base.errors import KdError
from kdcli.base.files import atomic_path, read_document, sha256_file, write_json
from kdcli.base.text import reason

PART = 4096  # images: at most so many are run again after a kill
_CHUNK = 1 << 16  # images of which logits are in memory at once
_FLOAT16_END = 65520  # from here on float16 rounds to infinity


@dataclass(frozen=True)
class CachedLogits:
    """A teacher's logits for one view: the weighted mean over its models.

    Attributes:
        stored: for each model float16 or float32 (N, classes), or a structured array (N,) of the largest logits, see
            `top_k_of`; in memory or a read-only memory map.
    """

    stored: tuple[npt.NDArray[Any], ...]
    weights: tuple[float, ...]  # of each model
    classes: int  # number of logits

    def logits(self, samples: npt.NDArray[np.int64] | slice = slice(None)) -> Tensor:
        """Logits float32 (B, classes) of the given samples."""
        return weighted_mean([self._dense(values[samples]) for values in self.stored], self.weights)

    def chunks(self, samples: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.float64]]:
        """Logits float64 (≤ 65,536, classes) of the given samples, piece by piece."""
        for start in range(0, len(samples), _CHUNK):
            yield self.logits(samples[start : start + _CHUNK]).numpy().astype(np.float64)

    def _dense(self, values: npt.NDArray[Any]) -> Tensor:
        """Logits float32 (B, classes); those that are not stored share the rest of the probability equally."""
        rows = np.array(values)
        if rows.dtype.names is None:
            return torch.from_numpy(rows.astype(np.float32))
        top, classes = rows["value"].astype(np.float32), rows["class"].astype(np.int64)  # (B, K)
        each = rows["rest"] - np.log(self.classes - top.shape[1])
        dense = np.repeat(each.astype(np.float32)[:, None], self.classes, axis=1)
        np.put_along_axis(dense, classes, top, axis=1)
        return torch.from_numpy(dense)


def weighted_mean(parts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ weight · part, in order."""
    first, *others = (weight * part for part, weight in zip(parts, weights, strict=True))
    return sum(others, first)


def top_k_of(logits: npt.NDArray[np.float32], count: int, dtype: type[Any] = np.float16) -> npt.NDArray[Any]:
    """The `count` < classes largest logits of (N, classes), their classes, and the log-sum-exp of the rest.

    Returns a structured array (N,): `value` (K,) of this type, `class` (K,), `rest` float32.
    """
    classes = logits.shape[1]
    top = np.argpartition(-logits, count - 1, axis=1)[:, :count]
    # of equal ones the first class first
    order = np.lexsort((top, -np.take_along_axis(logits, top, axis=1)), axis=1)
    top = np.take_along_axis(top, order, axis=1)
    rest = logits.astype(np.float64)
    np.put_along_axis(rest, top, -np.inf, axis=1)
    highest = rest.max(axis=1)
    kept = np.empty(
        len(logits),
        dtype=[
            ("value", dtype, (count,)),
            ("class", np.uint16 if classes <= 1 << 16 else np.uint32, (count,)),
            ("rest", np.float32),
        ],
    )
    kept["value"], kept["class"] = np.take_along_axis(logits, top, axis=1), top
    kept["rest"] = highest + np.log(np.exp(rest - highest[:, None]).sum(axis=1))
    return kept


@dataclass
class LogitCache:
    """The views of one model on one data set under one augmentation and seed."""

    folder: Path  # `cache/teacher/<fingerprint>`
    key: dict[str, Any]  # all that the logits depend on; the fingerprint is its hash
    count: int  # images in a view
    classes: int  # number of logits
    exact: bool = False  # keep float32
    top_k: int = 0  # keep only so many logits; 0: all

    def find(self, view: int) -> npt.NDArray[Any] | None:
        """A complete, undamaged view as a memory map: its SHA-256 is the one in the manifest."""
        path = self.path(view)
        try:
            if sha256_file(path) != self._manifest()["views"].get(path.name):
                return None
        except OSError:
            return None
        stored = _load(path)
        if stored is None or len(stored) != self.count or stored.shape[1:] not in ((), (self.classes,)):
            return None
        return stored

    def lock(self, view: int) -> FileLock:
        """Lock for computing a view. The kernel frees it when its holder dies, however it dies."""
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / f"view-{view:04d}.lock", timeout=0)

    def missing_parts(self, view: int) -> list[int]:
        """Numbers of the parts still to be computed; a part appears at once and synced, see `atomic_path`."""
        return [number for number, path in enumerate(self._parts(view)) if _load(path) is None]

    def write_part(self, view: int, number: int, logits: npt.NDArray[np.float32]) -> None:
        """Store the logits of images `number` · PART … in their final form."""
        dtype = np.float32 if self.exact or np.abs(logits).max() >= _FLOAT16_END else np.float16
        stored = top_k_of(logits, self.top_k, dtype) if self.top_k else logits.astype(dtype)
        with (
            self._writing(),
            atomic_path(self._parts(view)[number]) as temporary,
            temporary.open("wb") as handle,
        ):
            np.save(handle, stored, allow_pickle=False)

    def finish(self, view: int, made_by: dict[str, Any]) -> None:
        """Join the parts of a view to one file, list it with its engine in the manifest, and remove the parts."""
        path, parts = self.path(view), [np.load(part, mmap_mode="r") for part in self._parts(view)]
        widest = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize)
        about = {
            "descr": np.lib.format.dtype_to_descr(widest),
            "fortran_order": False,
            "shape": (self.count, *parts[0].shape[1:]),
        }
        with self._writing():
            # written, not mapped: a full disk would be a bus error there
            with atomic_path(path) as temporary, temporary.open("wb") as handle:
                np.lib.format.write_array_header_2_0(handle, about)
                for part in parts:
                    handle.write(part.astype(widest).tobytes())
            with FileLock(self.folder / "manifest.lock"):  # another run may be adding a view
                manifest = self._manifest()
                manifest["views"][path.name] = sha256_file(path)
                manifest["made_by"][path.name] = made_by
                write_json(self.folder / "manifest.json", manifest)
        shutil.rmtree(self._parts(view)[0].parent, ignore_errors=True)

    def _manifest(self) -> dict[str, Any]:
        manifest: dict[str, Any] = {"recipe": self.key, "views": {}, "made_by": {}}
        with suppress(KdError):
            stored = read_document(self.folder / "manifest.json")
            manifest |= {name: value for name, value in stored.items() if isinstance(value, dict)}
        return manifest

    def path(self, view: int) -> Path:
        return self.folder / f"view-{view:04d}.npy"

    def _parts(self, view: int) -> list[Path]:
        """Paths of all parts, existing or not."""
        folder = self.folder / f"view-{view:04d}.parts"
        return [folder / f"part-{number:05d}.npy" for number in range(-(-self.count // PART))]

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Translate a failure to write to a KdError."""
        try:
            yield
        except OSError as error:
            raise KdError(
                f"cannot keep the teacher's outputs in {self.folder}: {reason(error)}",
                "Free some space, or choose another --cache-dir.",
            ) from error


def _load(path: Path) -> npt.NDArray[Any] | None:
    """An array as a read-only memory map; None if the file is missing, cut short or not an array."""
    try:
        stored: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return stored if stored.ndim else None
