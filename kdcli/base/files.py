"""Reading of untrusted files, atomic files, hashes, locks, scratch folders and folders of the cache."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import stat
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

from kdcli.base.errors import KdError
from kdcli.base.text import first_line, reason

MAX_JSON_BYTES = 64 << 20
MAX_TOML_BYTES = 1 << 20
MAX_RECORDED_BYTES = 4 << 30  # of a model that a file names
_MAX_DEPTH = 64  # of a document
_MAX_DOTS = 100  # in a line of TOML: keys a.b.c… take quadratic time
_FOREIGN_AGE_S = 24 * 3600  # scratch files of another host, whose processes cannot be looked up


def open_regular(path: Path) -> BufferedReader:
    """Open a file; as `open`, and OSError also for a device or pipe, since reading it may not end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.open("rb")


def read_bytes(path: Path, most: int, hint: str = "Check the path.") -> bytes:
    """The bytes of a regular file; a KdError if it has more than `most` or cannot be read."""
    try:
        with open_regular(path) as handle:
            size = os.fstat(handle.fileno()).st_size
            if size <= most:
                return handle.read(size)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        why = reason(error) if isinstance(error, OSError) else first_line(error)
        raise KdError(f"cannot read {path}: {why}", hint) from error
    raise KdError(f"cannot read {path}: it has {size:,} bytes, more than the {most:,} that are read", hint)


def read_document(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or the table of a TOML file, by its suffix; else a KdError."""
    toml, hint = path.suffix == ".toml", "Restore the file, or remove it."
    content = read_bytes(path, MAX_TOML_BYTES if toml else MAX_JSON_BYTES, hint)
    try:
        document = parse_document(content.decode(), toml=toml)
    except ValueError as error:
        raise KdError(f"cannot read {path}: {first_line(error)}", hint) from error
    if not isinstance(document, dict):
        raise KdError(f"cannot read {path}: it holds no settings", hint)
    return document


def parse_document(text: str, *, toml: bool = False) -> Any:
    """The value of a JSON text, or the table of a TOML text; ValueError also where it is nested very deeply."""
    too_deep = f"nested more than {_MAX_DEPTH} deep"
    if toml and any(line.count(".") > _MAX_DOTS for line in text.splitlines()):
        raise ValueError(too_deep)
    try:
        document = tomllib.loads(text) if toml else json.loads(text)
    except RecursionError as error:
        raise ValueError(too_deep) from error
    level = [document]
    for _ in range(_MAX_DEPTH):
        parts = [
            part.values() if isinstance(part, dict) else part
            for part in level
            if isinstance(part, dict | list)
        ]
        level = [item for part in parts for item in part]
        if not level:
            return document
    raise ValueError(too_deep)


def regular_size(path: Path) -> int:
    """Bytes of a regular file; −1 for anything else, and for a path that cannot be followed."""
    try:
        status = path.stat()
    except OSError:
        return -1
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def is_unchanged(path: Path, sha256: str) -> bool:
    """Whether a path that a file names is a regular file of at most 4 GiB with this SHA-256; nothing else is read."""
    try:
        return 0 < regular_size(path) <= MAX_RECORDED_BYTES and sha256_file(path) == sha256
    except OSError:
        return False


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of the bytes of a regular file."""
    with open_regular(path) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_pointer(head: bytes, name: str) -> None:
    """Raise KdError if a file that begins so is a Git LFS pointer, which stands for the file itself."""
    if head.startswith(b"version https://git-lfs"):
        raise KdError(f"{name} is a Git LFS pointer, not the file itself", "Fetch the file: git lfs pull")


def git_blob_sha1_file(path: Path) -> str:
    """Hexadecimal git blob id of a file: SHA-1 of `blob <size>\\0` and the bytes."""
    header = f"blob {path.stat().st_size}\0".encode()
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.sha1(header, usedforsecurity=False)).hexdigest()


def cache_folder(cache_dir: Path, kind: str, key: Mapping[str, Any]) -> Path:
    """`<cache_dir>/<kind>/<128 bits of SHA-256>` by all that the content depends on; not created."""
    text = json.dumps(key, sort_keys=True)
    return cache_dir / kind / hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path that, synced, replaces `target` if the block ends without an error; else it is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}."
    _clear_abandoned(target.parent, prefix)
    temporary = target.with_name(f"{prefix}{_owner()}{secrets.token_hex(4)}.tmp")
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        fsync_file(temporary)
        temporary.replace(target)
        fsync_directory(target.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[bool]:
    """Hold a lock between processes; yields whether it had to wait.

    The lock file stays; the kernel releases the lock when its holder ends. `on_wait` is called once before waiting
    for another process; it raises an error to not wait.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock, waited = FileLock(path), False
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_wait()
        waited = True
        lock.acquire(poll_interval=0.2)
    try:
        yield waited
    finally:
        lock.release()


def scratch_folder(parent: Path) -> Path:
    """A new hidden folder in `parent` (created if missing), for the caller to rename or remove."""
    parent.mkdir(parents=True, exist_ok=True)
    _clear_abandoned(parent, ".")
    folder = parent / f".{_owner()}{secrets.token_hex(4)}"
    folder.mkdir()
    return folder


def _clear_abandoned(parent: Path, prefix: str) -> None:
    """Remove scratch files and folders `<prefix><host>.<process>.*` of processes that no longer run."""
    import psutil

    for path in parent.iterdir():
        host, _, rest = path.name.removeprefix(prefix).partition(".")
        process = rest.partition(".")[0]
        if not path.name.startswith(prefix + "kd-") or not re.fullmatch(r"[1-9][0-9]{0,9}", process):
            continue
        with suppress(OSError):  # another process may remove them at the same time
            alive = (
                psutil.pid_exists(int(process))
                if host == host_name()
                else time.time() - path.lstat().st_mtime < _FOREIGN_AGE_S
            )
            if not alive and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif not alive:
                path.unlink()


def _owner() -> str:
    return f"{host_name()}.{os.getpid()}."


def host_name() -> str:
    """Identifier of the process-number space: host and, on Linux, PID namespace (containers)."""
    namespace = 0
    with suppress(OSError):
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    return f"kd-{re.sub(r'[^A-Za-z0-9]', '-', socket.gethostname())[:40]}-{namespace}"


def expand(path: str) -> Path:
    """The path with a leading ~ expanded, unless there is no such user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  as it is for an unknown user


def recorded_path(path: Path, file: Path) -> Path:
    """A path that a file names: below the nearest of the folders the file is in, else below the working folder.

    The same place is spelled as the file does.
    """
    for folder in (*file.parents, Path()):
        found = folder / path
        if os.path.exists(found):  # noqa: PTH110  False for a name that is too long
            return path if os.path.exists(path) and found.samefile(path) else found  # noqa: PTH110
    return path


def publish(scratch: Path, target: Path) -> None:
    """Sync a scratch folder and rename it, so that its name never stands for files that a power cut loses."""
    for path in scratch.iterdir():
        fsync_file(path)
    fsync_directory(scratch)
    scratch.rename(target)
    fsync_directory(target.parent)


def fsync_file(path: Path) -> None:
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def fsync_directory(directory: Path) -> None:
    """Make a rename durable, where the platform supports it."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, keys in the order given, a list of plain values in one line."""
    text = json.dumps(value, indent=2, ensure_ascii=False)  # a line break in a string is escaped
    text = re.sub(r"(?<=\[)\n\s+([^][{}]*?)\n\s*(?=\])", lambda found: re.sub(r"\n *", " ", found[1]), text)
    write_text(path, text + "\n")
