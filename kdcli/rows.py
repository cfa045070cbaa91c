"""Reading images out of an array that may be a memory map, larger than memory."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt

# Pages that were read stay in the process until memory is short, and count as its own. The kernel maps up to
# 64 KiB around each one it is asked for, so the memory held is at most some five times this for images of 12 KiB.
_LET_GO_BYTES = 32 << 20
_read_bytes = 0


def take(images: npt.NDArray[np.uint8], chosen: slice | npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """A copy of the chosen images, uint8 (B, H, W, C), contiguous; what a memory map holds in memory is bounded."""
    global _read_bytes  # noqa: PLW0603 — of the whole process, as the memory is
    found: npt.NDArray[np.uint8] = np.array(images[chosen], order="C")
    if isinstance(images, np.memmap):
        _read_bytes += found.nbytes
        if _read_bytes >= _LET_GO_BYTES:
            _read_bytes = 0
            let_go(images)
    return found


def let_go(array: npt.NDArray[Any]) -> None:
    """Drop a read-only memory map's pages from this process; they are read again when they are needed."""
    mapped = getattr(array, "_mmap", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") and not array.flags.writeable:
        mapped.madvise(mmap.MADV_DONTNEED)
