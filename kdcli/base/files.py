"""Atomic files, hashes, locks, scratch folders and folders of the cache."""

import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_FOREIGN_AGE_S = 24 * 3600  # scratch files of another host, whose processes cannot be looked up


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def git_blob_sha1_file(path: Path) -> str:
    """Hexadecimal git blob id of a file: SHA-1 of `blob <size>\\0` and the bytes."""
    header = f"blob {path.stat().st_size}\0".encode()
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.sha1(header, usedforsecurity=False)).hexdigest()


def cache_folder(cache_dir: Path, kind: str, recipe: Mapping[str, Any]) -> Path:
    """`<cache_dir>/<kind>/<128 bits of SHA-256>` by all that the content depends on; not created."""
    text = json.dumps(recipe, sort_keys=True)
    return cache_dir / kind / hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside `target` that replaces it if the block ends without an error.

    The file is synced before the rename and the directory after it. On an error the temporary file is removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}."
    _clear_abandoned(target.parent, prefix)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=prefix + _owner(), suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        fsync_file(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 is for temporary files
        temporary.replace(target)
        fsync_directory(target.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[bool]:
    """Hold a lock between processes. The lock file is created and stays, empty.

    The kernel releases the lock when its holder ends, so no stale lock can remain.

    Args:
        on_wait: called once if another process holds the lock, before waiting for it.

    Yields:
        Whether it had to wait.
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
    return Path(tempfile.mkdtemp(dir=parent, prefix="." + _owner()))


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
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def publish(scratch: Path, target: Path) -> None:
    """Sync the files of a scratch folder, and rename it; its name never stands for files that a power cut loses.

    Raises:
        OSError: it cannot be written, or `target` is a folder that holds anything.
    """
    for path in scratch.iterdir():
        fsync_file(path)
    fsync_directory(scratch)
    scratch.chmod(0o755)
    scratch.rename(target)
    fsync_directory(target.parent)


def fsync_file(path: Path) -> None:
    """Write a file's content to the disk."""
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
    """Write a whole UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
