"""Downloads that survive: cuts, stalls, kills and wrong answers. A file gets its name only if its hash is right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from kdcli.base import files
from kdcli.base.errors import KdError
from kdcli.base.events import Note, OnEvent, Progress, ignore
from kdcli.base.text import reason
from kdcli.data.catalog import RemoteFile
from kdcli.data.fetch import retry
from kdcli.data.fetch.partial import Partial
from kdcli.data.fetch.transfer import Job, OutOfSpaceError, check_size, check_space, connected, from_hint

__all__ = ["FetchResult", "State", "fetch", "is_right", "is_url", "look"]

CHUNK = 1 << 18


@dataclass(frozen=True)
class FetchResult:
    """A file that is in place and has the right hash."""

    path: Path
    status: Literal["present", "downloaded", "copied"]
    size_bytes: int


@dataclass(frozen=True)
class State:
    """What is there of a file.

    Attributes:
        status: `other`: a file of that name with another hash.
        kept: the file that holds the part.
        kept_bytes: of a download that was cut off and will be gone on with.
    """

    status: Literal["present", "partial", "absent", "other"]
    kept: Path
    kept_bytes: int = 0


def fetch(
    remote: RemoteFile, target: Path, *, source: str | None = None, on_event: OnEvent = ignore
) -> FetchResult:
    """Put a file of the catalogue at `target`, from its mirrors or from `source`.

    A file already there with the right hash is left alone; one with another hash is replaced, once the new
    one is verified. Of several processes one works, the others wait and find the file. What has arrived is kept
    whatever ends the process, and gone on with next time.

    Args:
        source: the URL of another mirror, or the path of a file on this machine.

    Raises:
        KdError: unreachable, refused, too large, no space, or not the file it should be.
    """
    if target.is_dir():
        raise KdError(f"{target} is a folder", "Move it away.")
    if remote.sha256 is None and remote.git_blob_sha1 is None:
        raise KdError(f"no hash is known for {remote.name}", "Add it to the catalogue.")
    try:
        if target.exists():
            if is_right(remote, target):
                return FetchResult(target, "present", target.stat().st_size)
            on_event(Note(f"{target} is not the expected file (its hash differs); it will be replaced."))
        with files.locked(
            target.with_name(f".{target.name}.lock"),
            lambda: on_event(Note(f"Another process is fetching {target}; waiting for it.")),
        ) as waited:
            if waited and target.is_file() and is_right(remote, target):
                return FetchResult(target, "present", target.stat().st_size)
            if source is not None and not is_url(source):
                return _copy(remote, files.expand(source), target, on_event)
            return _download(remote, [source] if source else remote.urls, target, on_event)
    except OSError as error:
        raise KdError(
            f"cannot write {target}: {reason(error)}",
            "Check the folder and the free space; what has arrived is kept.",
        ) from error


def look(remote: RemoteFile, target: Path) -> State:
    """What is there, without asking any server."""
    partial = Partial(remote, target)
    try:
        if target.is_file() and is_right(remote, target):
            return State("present", partial.path)
    except OSError as error:
        raise KdError(f"cannot read {target}: {reason(error)}", "Check its permissions.") from error
    if partial.origin() is not None:
        return State("partial", partial.path, partial.size)
    return State("other" if target.exists() else "absent", partial.path)


def is_url(source: str) -> bool:
    """Whether a --from value is an address; a Windows drive letter is not one."""
    return "://" in source


def is_right(remote: RemoteFile, path: Path) -> bool:
    """Whether a file's hash is the catalogue's."""
    if remote.sha256 is not None:
        return files.sha256_file(path) == remote.sha256
    return remote.git_blob_sha1 is not None and files.git_blob_sha1_file(path) == remote.git_blob_sha1


def _download(remote: RemoteFile, urls: Sequence[str], target: Path, on_event: OnEvent) -> FetchResult:
    partial = Partial(remote, target)

    def is_whole() -> bool:
        return partial.path.is_file() and is_right(remote, partial.path)

    def done() -> FetchResult:
        partial.become(target)
        return FetchResult(target, "downloaded", target.stat().st_size)

    if partial.size and partial.origin() is None:
        partial.drop()
    if partial.size and partial.size >= (
        remote.size_bytes or partial.size + 1
    ):  # killed before its last step
        if is_whole():
            return done()
        partial.drop()
    with connected() as client:
        job = Job(remote, partial, client, on_event)
        check_space(remote, target.parent, remote.size_bytes, partial.size)
        problem: KdError | None = None
        for number, url in enumerate(urls):
            if problem is not None:
                on_event(Note(f"{problem.message}; trying mirror {number + 1} of {len(urls)}."))
            try:
                retry.get(job, url, is_whole)
            except OutOfSpaceError:
                raise
            except KdError as error:
                problem = error
                continue
            return done()
    if problem is None:
        raise KdError(f"no address is known for {remote.name}", from_hint(remote))
    if partial.origin() is None:
        partial.drop()
    else:
        problem.hint = f"{partial.size / 1e6:,.1f} MB are kept and gone on with next time. {problem.hint}"
    raise problem


def _copy(remote: RemoteFile, source: Path, target: Path, on_event: OnEvent) -> FetchResult:
    if not source.is_file():
        raise KdError(
            f"no such file: {source}", "--from takes a file on this machine or an https:// address."
        )
    try:
        size = source.stat().st_size
        handle = source.open("rb")
    except OSError as error:
        raise KdError(f"cannot read {source}: {reason(error)}", "Check its permissions.") from error
    with handle:
        check_size(remote, size, str(source))
        check_space(remote, target.parent, size)
        with files.atomic_path(target) as temporary:
            with temporary.open("wb") as output:
                _write(remote, iter(lambda: handle.read(CHUNK), b""), output, size, on_event)
            if not is_right(remote, temporary):
                raise retry.wrong(remote, str(source))
    return FetchResult(target, "copied", target.stat().st_size)


def _write(
    remote: RemoteFile, chunks: Iterator[bytes], output: BinaryIO, size: int, on_event: OnEvent
) -> None:
    done = 0
    for chunk in chunks:
        done += len(chunk)
        output.write(chunk)
        on_event(Progress(remote.name, done, size, "bytes"))
