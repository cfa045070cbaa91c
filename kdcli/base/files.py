"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHUNK = 1 << 20
_FOREIGN_AGE_S = 24 * 3600  # scratch of another host, whose processes cannot be asked after


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def git_blob_sha1_file(path: Path) -> str:
    """Hexadecimal SHA-1 that git gives a file's content: SHA-1 of `blob <size>\\0` and the bytes."""
    digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as handle:
        while chunk := handle.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`; it takes the target's name only if the block ends without an error.

    temp → (caller writes, and may re-read to verify) → flush and fsync → `os.replace` → fsync of the directory.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}."
    clear_abandoned(target.parent, prefix)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=prefix + _owner(), suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes 0600; the result is an ordinary file
        temporary.replace(target)
        fsync_directory(target.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def locked(path: Path, on_wait: Callable[[], None]) -> Iterator[bool]:
    """Hold a lock between processes; `path` is made and stays, empty.

    The lock is the kernel's: it is free as soon as its holder is dead, so there is nothing to clear away.

    Args:
        on_wait: called once if another process holds it; then this one waits.

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
    """A new hidden folder in `parent`, which is made if need be. The caller removes it or renames it."""
    parent.mkdir(parents=True, exist_ok=True)
    clear_abandoned(parent, ".")
    return Path(tempfile.mkdtemp(dir=parent, prefix="." + _owner()))


def clear_abandoned(parent: Path, prefix: str) -> None:
    """Remove scratch files and folders `<prefix><host>.<process>.*` whose process was killed."""
    import psutil

    for path in parent.iterdir():
        host, _, rest = path.name.removeprefix(prefix).partition(".")
        process = rest.partition(".")[0]
        if not path.name.startswith(prefix + "kd-") or not re.fullmatch(r"[1-9][0-9]{0,9}", process):
            continue
        with suppress(OSError):  # another process may be clearing too
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
    """Where process numbers mean the same: the host, and on Linux its process namespace (containers)."""
    namespace = 0
    with suppress(OSError):
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    return f"kd-{re.sub(r'[^A-Za-z0-9]', '-', socket.gethostname())[:40]}-{namespace}"


def expand(path: str) -> Path:
    """The path with a leading ~ replaced, where there is such a user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def fsync_directory(directory: Path) -> None:
    """Make a rename durable (where the platform can)."""
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
