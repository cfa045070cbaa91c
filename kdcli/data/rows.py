"""Reading images out of an array that may be a memory map, larger than memory."""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

# Pages that were read stay in the process until memory is short, and count as its own. How many are mapped for one
# that is asked for is the kernel's choice, from 64 KiB to 2 MiB: what is resident is looked at, where it can be, and
# not reckoned from what was read.
_LET_GO_BYTES = 256 << 20
_LET_GO_READ_BYTES = 32 << 20  # where it cannot
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_STATM = Path("/proc/self/statm")


class _Residence:
    """What reading from maps has left in this process, and what was there before."""

    def __init__(self) -> None:
        self.before: int | None = None
        self.read_bytes = 0

    def grown(self, read_bytes: int) -> bool:
        """Whether it is time to let go, after reading so much more."""
        self.read_bytes += read_bytes
        resident = _resident_file_bytes()
        if resident is None:
            return self.read_bytes >= _LET_GO_READ_BYTES
        self.before = resident if self.before is None else min(self.before, resident)
        return resident - self.before >= _LET_GO_BYTES

    def let_go(self, array: npt.NDArray[Any]) -> None:
        let_go(array)
        self.read_bytes = 0


_residence = _Residence()


def _resident_file_bytes() -> int | None:
    """Bytes of files, libraries included, that are mapped and resident in this process; None if it cannot be told."""
    try:
        return int(_STATM.read_text().split()[2]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return None


class Joined:
    """Two arrays of images of one shape as one, without a copy; each may be a memory map, larger than memory."""

    def __init__(self, first: Images, second: Images) -> None:
        if first.shape[1:] != second.shape[1:]:
            raise ValueError(f"images of {first.shape[1:]} and {second.shape[1:]} cannot be joined")
        self.first, self.second = first, second

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, C)."""
        return (len(self), *self.first.shape[1:])

    @property
    def dtype(self) -> np.dtype[np.uint8]:
        return np.dtype(np.uint8)

    @property
    def nbytes(self) -> int:
        return self.first.nbytes + self.second.nbytes

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, chosen: slice | npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """A copy of the chosen images, uint8 (B, H, W, C), in the order asked for.

        Raises:
            IndexError: there is no such image; numbers from the end are none.
        """
        numbers = np.arange(*chosen.indices(len(self))) if isinstance(chosen, slice) else chosen
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"images {numbers.min()} to {numbers.max()} of {len(self)}")
        later = numbers >= len(self.first)
        found = np.empty((len(numbers), *self.shape[1:]), np.uint8)
        found[~later] = take(self.first, numbers[~later])
        found[later] = take(self.second, numbers[later] - len(self.first))
        return found


Images: TypeAlias = npt.NDArray[np.uint8] | Joined


def take(images: Images, chosen: slice | npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """A copy of the chosen images, uint8 (B, H, W, C), contiguous; what a memory map holds in memory is bounded."""
    if isinstance(images, Joined):
        return images[chosen]
    if not isinstance(images, np.memmap):
        return np.array(images[chosen], order="C")
    if _residence.before is None:
        _residence.grown(0)
        _in_small_pages(images)
    found = np.array(images[chosen], order="C")
    if _residence.grown(found.nbytes):
        _residence.let_go(images)
        _in_small_pages(images)
    return found


def let_go(array: npt.NDArray[Any]) -> None:
    """Drop a read-only memory map's pages from this process; they are read again when they are needed."""
    mapped = getattr(array, "_mmap", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") and not array.flags.writeable:
        mapped.madvise(mmap.MADV_DONTNEED)


def _in_small_pages(array: npt.NDArray[Any]) -> None:
    """Ask the kernel not to map 2 MiB of a file for an image of some kilobytes."""
    mapped = getattr(array, "_mmap", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            mapped.madvise(mmap.MADV_NOHUGEPAGE)
