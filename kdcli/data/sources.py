"""Where image files come from: a folder, a tar archive (plain, gz, xz, bz2) or a zip file.

Archives are read member by member and never extracted; only regular files count. A tar archive is read in one
pass, whatever its compression.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol, cast

from kdcli.errors import KdError
from kdcli.files import sha256_file

MAX_MEMBER_BYTES = 256 << 20
MAX_HEADER_BYTES = 16 << 20  # one read of tarfile itself: a long name or a pax header
MAX_EXPANSION = 200  # of an archive, beyond a floor that any honest small one stays below
EXPANSION_FLOOR = 4 << 30

Wanted = Callable[[str], bool]


@dataclass
class Skipped:
    """What a source left out, for the notes."""

    links: int = 0


@dataclass(frozen=True)
class Position:
    """How far a source has been read."""

    done: int
    total: int
    unit: str


class Source(Protocol):
    """Files by name, read once from front to back."""

    path: Path
    skipped: Skipped

    def key(self) -> str:
        """SHA-256 that changes when the content does."""
        ...

    def read(self, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
        """Name (parts joined by "/") and bytes of each regular file whose name is wanted."""
        ...

    def position(self) -> Position:
        """How far `read` has come."""
        ...


def open_source(path: Path) -> Source:
    """The source for a folder or archive; archives are told by content, not by suffix.

    Raises:
        KdError: neither a folder nor an archive.
    """
    if path.is_dir():
        return FolderSource(path)
    if not path.is_file():
        raise KdError(f"{path} is neither a folder nor a file", "Give a folder or an archive of images.")
    try:
        with path.open("rb") as handle:
            head = handle.read(512)
    except OSError as error:
        raise KdError(f"cannot read {path}: {error.strerror or error}") from error
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return ZipSource(path)
    if head.startswith((b"\x1f\x8b", b"\xfd7zXZ\0", b"BZh")) or head[257:262] == b"ustar":
        return TarSource(path)
    raise not_an_archive(path)


def not_an_archive(path: Path, reason: str = "") -> KdError:
    """The error for a file that is no readable archive."""
    return KdError(
        f"{path} is not an archive that can be read" + (f": {reason}" if reason else ""),
        "Give a folder, .tar, .tar.gz, .tar.xz or .zip with train/<class>/* and test/<class>/*.",
    )


def _clean_name(name: str, path: Path) -> str:
    """A member's name without "." parts.

    Raises:
        KdError: absolute, or climbs with "..".
    """
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or (parts and parts[0][1:2] == ":"):
        raise KdError(
            f"{path} holds an unsafe name: {name!r}",
            "Repack it with names relative to its own top folder.",
        )
    return "/".join(parts)


def _too_large(path: Path, name: str, size: int) -> KdError:
    return KdError(
        f"{name} in {path} is {size:,} bytes; at most {MAX_MEMBER_BYTES:,} are read",
        "Remove it from the archive.",
    )


def _expansion_limit(path: Path) -> int:
    return max(EXPANSION_FLOOR, MAX_EXPANSION * path.stat().st_size)


def _expands_too_far(path: Path) -> KdError:
    return KdError(
        f"{path} expands to more than {_expansion_limit(path):,} bytes", "It looks like a decompression bomb."
    )


@dataclass
class FolderSource:
    """A folder tree; links to files and folders are followed, each folder once."""

    path: Path
    skipped: Skipped = field(default_factory=Skipped)
    _files: list[tuple[str, int, int]] | None = None  # name, size, mtime_ns; sorted
    _done: int = 0
    _total: int = 0

    def _listing(self) -> list[tuple[str, int, int]]:
        if self._files is None:
            found: list[tuple[str, int, int]] = []
            try:
                self._walk(self.path, "", found, set())
            except OSError as error:
                raise KdError(
                    f"cannot read {error.filename or self.path}: {error.strerror or error}"
                ) from error
            self._files = sorted(found)
        return self._files

    def _walk(
        self, folder: Path, prefix: str, found: list[tuple[str, int, int]], seen: set[tuple[int, int]]
    ) -> None:
        status = folder.stat()
        if (status.st_dev, status.st_ino) in seen:  # a link back up
            self.skipped.links += 1
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                try:
                    info = entry.stat()
                except FileNotFoundError:  # a dangling link
                    self.skipped.links += 1
                    continue
                if stat.S_ISDIR(info.st_mode):
                    self._walk(Path(entry.path), f"{prefix}{entry.name}/", found, seen)
                elif stat.S_ISREG(info.st_mode):
                    found.append((prefix + entry.name, info.st_size, max(info.st_mtime_ns, info.st_ctime_ns)))

    def key(self) -> str:
        """SHA-256 of the folder's place and its files' names, sizes and change times."""
        digest = hashlib.sha256(str(self.path.resolve()).encode("utf-8", "surrogateescape"))
        for name, size, mtime_ns in self._listing():
            digest.update(f"{name}\0{size}\0{mtime_ns}\0".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def read(self, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
        """Files in the order of their names."""
        chosen = [(name, size) for name, size, _ in self._listing() if wanted(name)]
        self._done, self._total = 0, len(chosen)
        for name, size in chosen:
            if size > MAX_MEMBER_BYTES:
                raise _too_large(self.path, name, size)
            try:
                data = (self.path / name).read_bytes()
            except OSError as error:
                raise KdError(f"cannot read {self.path / name}: {error.strerror or error}") from error
            yield name, data
            self._done += 1

    def position(self) -> Position:
        """In files."""
        return Position(self._done, self._total, "images")


@dataclass
class ZipSource:
    """A zip file."""

    path: Path
    skipped: Skipped = field(default_factory=Skipped)
    _done: int = 0
    _total: int = 0

    def key(self) -> str:
        """SHA-256 of the file."""
        return sha256_file(self.path)

    def read(self, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
        """Members in the order of the archive."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                yield from self._members(archive, wanted)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError) as error:
            raise not_an_archive(self.path, str(error)) from error
        except (
            RuntimeError
        ) as error:  # zipfile's own, of an encrypted member or a compression it does not know
            raise KdError(
                f"cannot read {self.path}: {error}", "Repack it by zip -r, without a password."
            ) from error

    def _members(self, archive: zipfile.ZipFile, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
        chosen: list[tuple[str, zipfile.ZipInfo]] = []
        for info in archive.infolist():
            if info.is_dir():
                continue
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                self.skipped.links += 1
                continue
            name = _clean_name(info.filename.replace("\\", "/"), self.path)
            if wanted(name):
                chosen.append((name, info))
        self._done, self._total = 0, len(chosen)
        expanded = 0
        for name, info in chosen:
            if info.file_size > MAX_MEMBER_BYTES:
                raise _too_large(self.path, name, info.file_size)
            with archive.open(info) as member:
                data = member.read(MAX_MEMBER_BYTES + 1)
            if len(data) > MAX_MEMBER_BYTES:  # a header that understates the size
                raise _too_large(self.path, name, len(data))
            expanded += len(data)
            if expanded > _expansion_limit(self.path):
                raise _expands_too_far(self.path)
            yield name, data
            self._done += 1

    def position(self) -> Position:
        """In files."""
        return Position(self._done, self._total, "images")


class _Forward(io.RawIOBase):
    """A decompressed stream that only goes forward, with a cap on each read and on the whole.

    tarfile reads a long name or pax header in one call of the size that the header states, so without the
    first cap a few compressed kilobytes could ask for gigabytes of memory.
    """

    def __init__(self, stream: IO[bytes], path: Path) -> None:
        super().__init__()
        self._stream = stream
        self._path = path
        self._offset = 0
        self._last = b""
        self._limit = _expansion_limit(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0 or size > max(MAX_HEADER_BYTES, MAX_MEMBER_BYTES):
            raise KdError(f"{self._path} has an oversized header", "It is damaged or made to do harm.")
        data = self._stream.read(size)
        self._advance(len(data))
        self._last = data
        return data

    def finish(self) -> None:
        """Check that the archive ended as archives do, and read on, so that a compressed one checks its sums.

        tarfile takes a damaged or truncated header for the end, without a word.

        Raises:
            ReadError: the last thing read was no empty block.
        """
        if len(self._last) != tarfile.BLOCKSIZE or self._last.strip(b"\0"):
            raise tarfile.ReadError("damaged or cut short")
        while self.read(1 << 20):
            pass

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET or offset < self._offset:
            raise tarfile.ReadError("a header points backwards")
        while self._offset < offset:
            skipped = len(self._stream.read(min(1 << 20, offset - self._offset)))
            if not skipped:
                break
            self._advance(skipped)
        return self._offset

    def _advance(self, count: int) -> None:
        self._offset += count
        if self._offset > self._limit:
            raise _expands_too_far(self._path)


@dataclass
class TarSource:
    """A tar archive, plain or compressed, read in one pass."""

    path: Path
    skipped: Skipped = field(default_factory=Skipped)
    _raw: IO[bytes] | None = None
    _done: int = 0

    def key(self) -> str:
        """SHA-256 of the file."""
        return sha256_file(self.path)

    def read(self, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
        """Members in the order of the archive."""
        try:
            with self.path.open("rb") as raw:
                self._raw = raw
                stream = _Forward(_decompressed(raw), self.path)
                with tarfile.open(fileobj=stream, mode="r:") as archive:
                    yield from self._members(archive, wanted)
                stream.finish()
        except (
            tarfile.TarError,
            lzma.LZMAError,
            zlib.error,
            EOFError,
            OSError,
            ValueError,
            RecursionError,
        ) as error:
            raise not_an_archive(self.path, str(error)) from error
        finally:
            self._raw = None

    def _members(self, archive: tarfile.TarFile, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # else it keeps every header it has passed
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                self.skipped.links += 1
                continue
            name = _clean_name(member.name, self.path)
            if not wanted(name):
                continue
            if member.size > MAX_MEMBER_BYTES:
                raise _too_large(self.path, name, member.size)
            content = archive.extractfile(member)
            data = content.read(member.size) if content else b""
            if len(data) != member.size:
                raise tarfile.ReadError(f"ends within {name}")
            yield name, data

    def position(self) -> Position:
        """In bytes of the archive: the number of members is not known before its end."""
        if self._raw is not None:
            self._done = self._raw.tell()
        return Position(self._done, self.path.stat().st_size, "bytes")


def _decompressed(raw: IO[bytes]) -> IO[bytes]:
    head = raw.read(6)
    raw.seek(0)
    if head.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.open(raw, "rb"))
    if head == b"\xfd7zXZ\0":
        return lzma.open(raw, "rb")
    if head.startswith(b"BZh"):
        return bz2.open(raw, "rb")
    return raw
