"""Sources of image files: a folder, a tar archive (plain, gz, xz, bz2) or a zip file.

Archives are read member by member and never extracted; only regular files count. A tar archive is read in one
pass, whatever its compression.
"""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import re
import stat
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import IO, cast

from kdcli.base.errors import KdError
from kdcli.base.files import check_pointer, read_bytes, sha256_file
from kdcli.base.text import first_line, reason

MAX_MEMBER_BYTES = 256 << 20
MAX_FILES = 2_000_000  # names in one source
MAX_GLOBAL_HEADERS = 1_000
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)  # LZMA's header may ask for 4 GiB

MAX_HEADER_BYTES = 64 << 10  # one long name or pax header
MAX_HEADERS_BYTES = 1 << 20  # all of them before one member
MAX_EXPANSION = 100  # of an archive, beyond a floor that any honest small one stays below
EXPANSION_FLOOR = 512 << 20
_WRITTEN = ("cache", "comparisons", "exports", "runs")  # by kd, in the working folder
_DIGITS = re.compile(rb"[0-9]{300}")  # tarfile's patterns take quadratic time on them
LAYOUT_HINT = (
    "It must hold class folders: train/<class>/*, test/<class>/* and perhaps val/<class>/*, which also stands in for "
    "test, or <class>/* without a split."
)

Wanted = Callable[[str], bool]


@dataclass
class Source(ABC):
    """Files by name, read from front to back."""

    path: Path
    skipped: list[str] = field(default_factory=list)  # links and special files passed over so far
    folders: list[str] = field(default_factory=list)  # of a folder tree, "" for its own
    layout_hint: str = LAYOUT_HINT
    classes: Sequence[str] = ()  # in the order that the source states, if it does
    done: int = 0  # how far `read` has come, of `total`, in `unit`
    total: int = 0
    unit: str = "images"

    def key(self) -> str:
        """SHA-256 that changes when the content does."""
        return sha256_file(self.path)

    @abstractmethod
    def read(self, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
        """Name (parts joined by "/") and bytes of each regular file whose name is wanted."""


def open_source(path: Path) -> Source:
    """The source for a folder or archive, recognised by content, not by suffix; a KdError for other files."""
    if path.is_dir():
        return FolderSource(path)
    if not path.is_file():
        raise KdError(f"{path} is neither a folder nor a file", "Give a folder or an archive of images.")
    try:
        with path.open("rb") as handle:
            head = handle.read(512)
    except OSError as error:
        raise KdError(f"cannot read {path}: {reason(error)}") from error
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return ZipSource(path)
    if head.startswith((b"\x1f\x8b", b"\xfd7zXZ\0", b"BZh")) or head[257:262] == b"ustar":
        return TarSource(path, unit="bytes")
    check_pointer(head, str(path))
    raise _unreadable(path)


def _unreadable(path: Path, detail: str = "") -> KdError:
    return KdError(
        f"{path} is not an archive that can be read" + (f": {detail}" if detail else ""),
        "Give a folder, .tar, .tar.gz, .tar.xz or .zip file of images.",
    )


@contextmanager
def reader_errors(as_error: Callable[[str], KdError]) -> Iterator[None]:
    """Turn exceptions of a file reader into `as_error(detail)`: on hostile bytes their types are not a closed set."""
    try:
        yield
    except KdError:
        raise
    except Exception as error:
        detail = "not enough memory" if isinstance(error, MemoryError) else first_line(error)
        raise as_error(detail) from error


def _clean_name(name: str, path: Path) -> str:
    """A member's name without "." parts; a KdError if it is absolute, or climbs with ".."."""
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")  # two stay two
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or (parts and parts[0][1:2] == ":"):
        raise KdError(
            f"{path} holds an unsafe name: {name!r}",
            "Repack it with names relative to its own top folder.",
        )
    return "/".join(parts)


def _check_size(size: int, name: str, path: Path) -> None:
    if not 0 <= size <= MAX_MEMBER_BYTES:
        raise KdError(
            f"{name} in {path} is {size:,} bytes; at most {MAX_MEMBER_BYTES:,} are read", "Remove it."
        )


def _check_expansion(count: int, path: Path) -> None:
    limit = max(EXPANSION_FLOOR, MAX_EXPANSION * path.stat().st_size)
    if count > limit:
        raise KdError(f"{path} expands to more than {limit:,} bytes", "It looks like a decompression bomb.")


def _check_count(count: int, path: Path) -> None:
    if count > MAX_FILES:
        raise KdError(f"{path} holds more than {MAX_FILES:,} files", "Split it.")


@dataclass
class FolderSource(Source):
    """A folder tree; links to files and folders are followed, each folder once."""

    @cached_property
    def _files(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of each file, sorted."""
        try:
            return sorted(self._walk())
        except OSError as error:
            raise KdError(f"cannot read {error.filename or self.path}: {reason(error)}") from error

    def _walk(self) -> Iterator[tuple[str, int, int]]:
        pending, count = [(self.path, "")], 0
        seen: set[tuple[int, int]] = set()
        while pending:
            folder, prefix = pending.pop()
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:  # a link back up, or to the same folder
                self.skipped.append(prefix.rstrip("/"))
                continue
            seen.add((status.st_dev, status.st_ino))
            self.folders.append(prefix.rstrip("/"))
            with os.scandir(folder) as entries:
                for entry in entries:
                    count += 1
                    _check_count(count, self.path)
                    try:
                        info = entry.stat()
                    except OSError:  # a dangling link
                        self.skipped.append(prefix + entry.name)
                        continue
                    if stat.S_ISDIR(info.st_mode):
                        if entry.name in _WRITTEN and folder.samefile(Path()):
                            continue
                        pending.append((Path(entry.path), f"{prefix}{entry.name}/"))
                    elif stat.S_ISREG(info.st_mode):
                        yield prefix + entry.name, info.st_size, max(info.st_mtime_ns, info.st_ctime_ns)

    def key(self) -> str:
        """SHA-256 of the folder's path and its files' names, sizes and change times."""
        digest = hashlib.sha256(str(self.path.resolve()).encode("utf-8", "surrogateescape"))
        for name, size, changed_ns in self._files:
            digest.update(f"{name}\0{size}\0{changed_ns}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def read(self, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
        """Files in the order of their names."""
        chosen = [name for name, _, _ in self._files if wanted(name)]
        self.done, self.total = 0, len(chosen)
        for name in chosen:
            yield name, read_bytes(self.path / name, MAX_MEMBER_BYTES, "Leave it out.")
            self.done += 1


@dataclass
class ZipSource(Source):
    """A zip file."""

    def read(self, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
        """Members in the order of the archive."""
        self.skipped.clear()
        with reader_errors(partial(_unreadable, self.path)), zipfile.ZipFile(self.path) as archive:
            _check_count(len(archive.infolist()), self.path)
            chosen = [(name, info) for name, info in self._members(archive) if wanted(name)]
            _check_expansion(sum(info.file_size for _, info in chosen), self.path)
            self.done, self.total = 0, len(chosen)
            for name, info in chosen:
                _check_size(info.file_size, name, self.path)
                if info.compress_type not in ZIP_METHODS:
                    raise zipfile.BadZipFile(f"{name} is not stored, deflated or compressed by bzip2")
                with archive.open(info) as member:
                    data = member.read(MAX_MEMBER_BYTES + 1)
                if len(data) != info.file_size:
                    raise zipfile.BadZipFile(f"{name} has another length than its header states")
                yield name, data
                self.done += 1

    def _members(self, archive: zipfile.ZipFile) -> Iterator[tuple[str, zipfile.ZipInfo]]:
        """Regular members with clean names."""
        for info in archive.infolist():
            if info.filename.endswith("/"):  # is_dir() fails on an empty name
                continue
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
                self.skipped.append(info.filename)
                continue
            yield _clean_name(info.filename.replace("\\", "/"), self.path), info


@dataclass
class TarSource(Source):
    """A tar archive, plain or compressed, read in one pass; its position is in bytes of the archive."""

    def read(self, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
        """Members in the order of the archive."""
        self.skipped.clear()
        self.total = self.path.stat().st_size
        with reader_errors(partial(_unreadable, self.path)), self.path.open("rb") as raw:
            stream = _ForwardStream(_decompressed(raw), self.path)
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for name, data in self._members(archive, stream, wanted):
                    self.done = raw.tell()
                    yield name, data
            stream.finish()

    def _members(
        self, archive: tarfile.TarFile, stream: "_ForwardStream", wanted: Wanted
    ) -> Iterator[tuple[str, bytes]]:
        for count, member in enumerate(iter(archive.next, None), 1):
            archive.members.clear()  # type: ignore[attr-defined]  # else it keeps every header it has passed
            _check_count(count, self.path)
            if len(archive.pax_headers) > MAX_GLOBAL_HEADERS:
                raise tarfile.ReadError("too many global headers")
            stream.headers_left = MAX_HEADERS_BYTES
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                self.skipped.append(member.name)
                continue
            name = _clean_name(member.name, self.path)
            if not wanted(name):
                continue
            _check_size(member.size, name, self.path)
            stream.seek(member.offset_data)
            data = stream.content(member.size)
            if len(data) != member.size:
                raise tarfile.ReadError(f"ends within {name}")
            yield name, data


def _decompressed(raw: IO[bytes]) -> IO[bytes]:
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


class _ForwardStream(io.RawIOBase):
    """A stream that only goes forward, with caps on each read, on the headers of one member, and on the whole.

    tarfile reads a long name or pax header in one call of the size that the header states, so without these a few
    compressed kilobytes could ask for gigabytes of memory.
    """

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        super().__init__()
        self._stream, self._path = stream, path
        self._offset, self._last = 0, b""
        self.headers_left = MAX_HEADERS_BYTES  # bytes, until the next member

    def tell(self) -> int:
        return self._offset

    def read(self, size: int | None = -1) -> bytes:
        """Part of a header."""
        if size is None or size < 0 or size > MAX_HEADER_BYTES or size > self.headers_left:
            raise KdError(f"{self._path} has an oversized header", "The file is damaged or malicious.")
        self.headers_left -= size
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
            _check_expansion(self._offset, self._path)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def finish(self) -> None:
        """Raise ReadError unless the last block read is empty; read on, so that a compressed archive checks its sums.

        tarfile takes a damaged or truncated header for the end, without an error.
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
