"""Sources of image files: a folder, a tar archive (plain, gz, xz, bz2) or a zip file.

Archives are read member by member and never extracted; only regular files count. A tar archive is read in one
pass, whatever its compression.
"""

import hashlib
import os
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kdcli.base.errors import KdError
from kdcli.base.files import sha256_file
from kdcli.base.text import first_line, reason
from kdcli.data.streams import ForwardStream, decompressed, expands_too_far, expansion_limit

MAX_MEMBER_BYTES = 256 << 20
MAX_FILES = 2_000_000  # names in one source
MAX_GLOBAL_HEADERS = 1_000
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2)  # LZMA's header may ask for 4 GiB

Wanted = Callable[[str], bool]


@dataclass
class Source:
    """Files by name, read once from front to back.

    Attributes:
        skipped: links and special files passed over so far.
        done: how far `read` has come, of `total`, in `unit`.
    """

    path: Path
    skipped: int = 0
    done: int = 0
    total: int = 0
    unit: str = "images"

    def key(self) -> str:
        """SHA-256 that changes when the content does."""
        return sha256_file(self.path)

    def read(self, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
        """Name (parts joined by "/") and bytes of each regular file whose name is wanted."""
        raise NotImplementedError


def open_source(path: Path) -> Source:
    """The source for a folder or archive; archives are recognised by content, not by suffix.

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
        raise KdError(f"cannot read {path}: {reason(error)}") from error
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return ZipSource(path)
    if head.startswith((b"\x1f\x8b", b"\xfd7zXZ\0", b"BZh")) or head[257:262] == b"ustar":
        return TarSource(path, unit="bytes")
    raise _unreadable(path)


def _unreadable(path: Path, detail: str = "") -> KdError:
    return KdError(
        f"{path} is not an archive that can be read" + (f": {detail}" if detail else ""),
        "Give a folder, .tar, .tar.gz, .tar.xz or .zip with train/<class>/* and test/<class>/*.",
    )


@contextmanager
def _archive_errors(path: Path) -> Iterator[None]:
    """Turn what the readers of tar and zip raise on damaged or hostile files into a KdError."""
    try:
        yield
    except KdError:
        raise
    except Exception as error:  # what the readers raise on hostile bytes is not a closed set
        raise _unreadable(path, first_line(error)) from error


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


def _check_size(size: int, name: str, path: Path) -> None:
    if not 0 <= size <= MAX_MEMBER_BYTES:
        raise KdError(
            f"{name} in {path} is {size:,} bytes; at most {MAX_MEMBER_BYTES:,} are read", "Remove it."
        )


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
                self.skipped += 1
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    count += 1
                    _check_count(count, self.path)
                    try:
                        info = entry.stat()
                    except OSError:  # a dangling link
                        self.skipped += 1
                        continue
                    if stat.S_ISDIR(info.st_mode):
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
            try:
                with (self.path / name).open("rb") as handle:
                    _check_size(os.fstat(handle.fileno()).st_size, name, self.path)
                    data = handle.read(MAX_MEMBER_BYTES + 1)
            except OSError as error:
                raise KdError(f"cannot read {self.path / name}: {reason(error)}") from error
            yield name, data
            self.done += 1


@dataclass
class ZipSource(Source):
    """A zip file."""

    def read(self, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
        """Members in the order of the archive."""
        with _archive_errors(self.path), zipfile.ZipFile(self.path) as archive:
            chosen = [(name, info) for name, info in self._members(archive) if wanted(name)]
            self.done, self.total, expanded = 0, len(chosen), 0
            for name, info in chosen:
                data = self._content(archive, name, info)
                expanded += len(data)
                if expanded > expansion_limit(self.path):
                    raise expands_too_far(self.path)
                yield name, data
                self.done += 1

    def _members(self, archive: zipfile.ZipFile) -> Iterator[tuple[str, zipfile.ZipInfo]]:
        """Regular members with clean names."""
        _check_count(len(archive.infolist()), self.path)
        for info in archive.infolist():
            if info.filename.endswith("/"):  # is_dir() fails on an empty name
                continue
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):
                self.skipped += 1
                continue
            yield _clean_name(info.filename.replace("\\", "/"), self.path), info

    def _content(self, archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo) -> bytes:
        _check_size(info.file_size, name, self.path)
        if info.flag_bits & 1:
            raise KdError(f"{name} in {self.path} is encrypted", "Repack it by zip -r, without a password.")
        if info.compress_type not in ZIP_METHODS:
            raise KdError(
                f"{name} in {self.path} is compressed by method {info.compress_type}", "Repack it by zip -r."
            )
        with archive.open(info) as member:
            data = member.read(MAX_MEMBER_BYTES + 1)
        if len(data) != info.file_size:
            raise zipfile.BadZipFile(f"{name} has another length than its header states")
        return data


@dataclass
class TarSource(Source):
    """A tar archive, plain or compressed, read in one pass; its position is in bytes of the archive."""

    def read(self, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
        """Members in the order of the archive."""
        self.total = self.path.stat().st_size
        with _archive_errors(self.path), self.path.open("rb") as raw:
            stream = ForwardStream(decompressed(raw), self.path)
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                for name, data in self._members(archive, stream, wanted):
                    self.done = raw.tell()
                    yield name, data
            stream.finish()

    def _members(
        self, archive: tarfile.TarFile, stream: ForwardStream, wanted: Wanted
    ) -> Iterator[tuple[str, bytes]]:
        count = 0
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # else it keeps every header it has passed
            count += 1
            _check_count(count, self.path)
            if len(archive.pax_headers) > MAX_GLOBAL_HEADERS:
                raise tarfile.ReadError("too many global headers")
            stream.next_header()
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                self.skipped += 1
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
