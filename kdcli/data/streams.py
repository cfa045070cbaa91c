"""Streams under an archive: decompressed, forward only, with a cap on each read and on the whole."""

import bz2
import gzip
import io
import lzma
import os
import re
import tarfile
from pathlib import Path
from typing import IO, cast

from kdcli.base.errors import KdError

MAX_HEADER_BYTES = 64 << 10  # one long name or pax header
MAX_HEADERS_BYTES = 1 << 20  # all of them before one member
MAX_EXPANSION = 100  # of an archive, beyond a floor that any honest small one stays below
EXPANSION_FLOOR = 512 << 20
_DIGITS = re.compile(rb"[0-9]{300}")  # tarfile's patterns take quadratic time on them


def expansion_limit(path: Path) -> int:
    """Bytes that an archive may expand to."""
    return max(EXPANSION_FLOOR, MAX_EXPANSION * path.stat().st_size)


def expands_too_far(path: Path) -> KdError:
    """The error for an archive beyond `expansion_limit`."""
    return KdError(
        f"{path} expands to more than {expansion_limit(path):,} bytes", "It looks like a decompression bomb."
    )


def decompressed(raw: IO[bytes]) -> IO[bytes]:
    """The content of a gzip, xz or bzip2 stream, recognised by its first bytes; else the stream itself."""
    head = raw.read(6)
    raw.seek(0)
    if head.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.open(raw, "rb"))
    if head == b"\xfd7zXZ\0":
        return lzma.open(raw, "rb")
    if head.startswith(b"BZh"):
        return bz2.open(raw, "rb")
    return raw


class ForwardStream(io.RawIOBase):
    """A stream that only goes forward, with caps on each read, on the headers of one member, and on the whole.

    tarfile reads a long name or pax header in one call of the size that the header states, so without these a few
    compressed kilobytes could ask for gigabytes of memory.
    """

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        super().__init__()
        self._stream, self._path = stream, path
        self._offset, self._last = 0, b""
        self._limit = expansion_limit(path)
        self._headers_left = MAX_HEADERS_BYTES

    def tell(self) -> int:
        return self._offset

    def next_header(self) -> None:
        """Start the count of header bytes of the next member."""
        self._headers_left = MAX_HEADERS_BYTES

    def read(self, size: int | None = -1) -> bytes:
        """Part of a header."""
        if size is None or size < 0 or size > MAX_HEADER_BYTES or size > self._headers_left:
            raise KdError(f"{self._path} has an oversized header", "It is damaged or made to do harm.")
        self._headers_left -= size
        data = self.content(size)
        if size != tarfile.BLOCKSIZE and _DIGITS.search(data):
            raise tarfile.ReadError("a header holds no more than digits")
        self._last = data
        return data

    def content(self, size: int) -> bytes:
        """Up to `size` bytes of a member."""
        parts, missing = [], size
        while missing and (part := self._stream.read(min(missing, 1 << 20))):
            parts.append(part)
            missing -= len(part)
            self._offset += len(part)
            if self._offset > self._limit:
                raise expands_too_far(self._path)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def finish(self) -> None:
        """Check that the archive ended as archives do, and read on, so that a compressed one checks its sums.

        tarfile takes a damaged or truncated header for the end, without an error.

        Raises:
            ReadError: the last block read is not empty.
        """
        if len(self._last) != tarfile.BLOCKSIZE or self._last.strip(b"\0"):
            raise tarfile.ReadError("damaged or cut short")
        while self.content(1 << 20):
            pass

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET or offset < self._offset:
            raise tarfile.ReadError("a header points backwards")
        while self._offset < offset and self.content(min(1 << 20, offset - self._offset)):
            pass
        return self._offset
