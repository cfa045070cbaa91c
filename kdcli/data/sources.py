"""Where image files come from: a folder, a tar archive (plain, gz, xz, bz2) or a zip file.

Archives are read member by member and never extracted; only regular files count. A tar archive is read in one
pass, whatever its compression.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

from kdcli.base.errors import KdError
from kdcli.base.files import sha256_file
from kdcli.data.streams import Forward, decompressed, expands_too_far, expansion_limit

MAX_MEMBER_BYTES = 256 << 20
MAX_FILES = 2_000_000  # names in one source
MAX_DIRECTORY_BYTES = 256 << 20  # of a zip file
MAX_GLOBAL_HEADERS = 1_000
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)  # LZMA's header may ask for 4 GiB

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
    if head.startswith((b"\x1f\x8b", b"\xfd7zXZ\0", b"BZh")) or head[257:262] == b"ustar" or _is_header(head):
        return TarSource(path)
    raise not_an_archive(path)


def _is_header(block: bytes) -> bool:
    """Whether these are a tar member's 512 bytes by their checksum: the oldest form of tar has no other mark."""
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return True


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


def _needs_memory(path: Path) -> KdError:
    return KdError(f"{path} needs more memory than there is", "Give its images as a folder.")


def _too_many(path: Path) -> KdError:
    return KdError(f"{path} holds more than {MAX_FILES:,} files", "Split it.")


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
            try:
                self._files = sorted(self._walk())
            except OSError as error:
                raise KdError(
                    f"cannot read {error.filename or self.path}: {error.strerror or error}"
                ) from error
        return self._files

    def _walk(self) -> Iterator[tuple[str, int, int]]:
        pending = [(self.path, "")]
        seen: set[tuple[int, int]] = set()
        count = 0
        while pending:
            folder, prefix = pending.pop()
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:  # a link back up, or to the same folder
                self.skipped.links += 1
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    count += 1
                    if count > MAX_FILES:
                        raise _too_many(self.path)
                    try:
                        info = entry.stat()
                    except OSError:
                        if not entry.is_symlink():
                            raise
                        self.skipped.links += 1  # it leads nowhere, or to itself
                        continue
                    if stat.S_ISDIR(info.st_mode):
                        pending.append((Path(entry.path), f"{prefix}{entry.name}/"))
                    elif stat.S_ISREG(info.st_mode):
                        yield prefix + entry.name, info.st_size, max(info.st_mtime_ns, info.st_ctime_ns)

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
                with (self.path / name).open("rb") as handle:
                    data = handle.read(MAX_MEMBER_BYTES + 1)
                if len(data) > MAX_MEMBER_BYTES:  # it has grown, or its file system does not know its size
                    raise _too_large(self.path, name, len(data))
            except OSError as error:
                raise KdError(f"cannot read {self.path / name}: {error.strerror or error}") from error
            yield name, data
            self._done += 1

    def position(self) -> Position:
        """In files."""
        return Position(self._done, self._total, "images")


class _Directory(io.BufferedReader):
    """A file whose reads are capped: zipfile reads the whole directory, as long as the file says it is, in one."""

    def __init__(self, raw: IO[bytes], path: Path) -> None:
        super().__init__(raw)  # type: ignore[arg-type]
        self._path = path

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > max(MAX_DIRECTORY_BYTES, MAX_MEMBER_BYTES + 1):
            raise _too_many(self._path)
        return super().read(size)


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
            with self.path.open("rb") as raw, zipfile.ZipFile(_Directory(raw, self.path)) as archive:
                yield from self._members(archive, wanted)
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, struct.error) as error:
            raise not_an_archive(self.path, str(error)) from error
        except RuntimeError as error:  # zipfile's own, of a feature it does not know
            raise KdError(f"cannot read {self.path}: {error}", "Repack it by zip -r.") from error
        except MemoryError as error:
            raise _needs_memory(self.path) from error

    def _members(self, archive: zipfile.ZipFile, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
        chosen: list[tuple[str, zipfile.ZipInfo]] = []
        if len(archive.infolist()) > MAX_FILES:
            raise _too_many(self.path)
        for info in archive.infolist():
            if info.filename.endswith("/"):  # is_dir() fails on a name that is empty
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
            if info.flag_bits & 1:
                raise KdError(
                    f"{name} in {self.path} is encrypted", "Repack it by zip -r, without a password."
                )
            if info.compress_type not in ZIP_METHODS:
                raise KdError(
                    f"{name} in {self.path} is compressed by method {info.compress_type}",
                    "Repack it by zip -r.",
                )
            with archive.open(info) as member:
                data = member.read(MAX_MEMBER_BYTES + 1)
            if len(data) > MAX_MEMBER_BYTES:  # a header that understates the size
                raise _too_large(self.path, name, len(data))
            if len(data) != info.file_size:
                raise zipfile.BadZipFile(f"{name} is not as long as it says")
            expanded += len(data)
            if expanded > expansion_limit(self.path):
                raise expands_too_far(self.path)
            yield name, data
            self._done += 1

    def position(self) -> Position:
        """In files."""
        return Position(self._done, self._total, "images")


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
                stream = Forward(decompressed(raw), self.path)
                with tarfile.open(fileobj=stream, mode="r:") as archive:
                    yield from self._members(archive, stream, wanted)
                stream.finish()
        except (
            tarfile.TarError,
            lzma.LZMAError,
            zlib.error,
            EOFError,
            OSError,
            ValueError,
            OverflowError,
            RecursionError,
        ) as error:
            raise not_an_archive(self.path, str(error)) from error
        except MemoryError as error:
            raise _needs_memory(self.path) from error
        finally:
            self._raw = None

    def _members(
        self, archive: tarfile.TarFile, stream: Forward, wanted: Wanted
    ) -> Iterator[tuple[str, bytes]]:
        count = 0
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # else it keeps every header it has passed
            count += 1
            if count > MAX_FILES:
                raise _too_many(self.path)
            if len(archive.pax_headers) > MAX_GLOBAL_HEADERS:
                raise tarfile.ReadError("too many global headers")
            stream.next_header()
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                self.skipped.links += 1
                continue
            name = _clean_name(member.name, self.path)
            if not wanted(name):
                continue
            if not 0 <= member.size <= MAX_MEMBER_BYTES:
                raise _too_large(self.path, name, member.size)
            stream.seek(member.offset_data)
            data = stream.content(member.size)
            if len(data) != member.size:
                raise tarfile.ReadError(f"ends within {name}")
            yield name, data

    def position(self) -> Position:
        """In bytes of the archive: the number of members is not known before its end."""
        if self._raw is not None:
            self._done = self._raw.tell()
        return Position(self._done, self.path.stat().st_size, "bytes")
