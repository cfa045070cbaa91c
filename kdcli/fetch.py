"""Downloads: a file gets its name only after its hash was checked."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import httpx

from kdcli import files
from kdcli.catalog import RemoteFile
from kdcli.errors import KdError
from kdcli.events import Note, OnEvent, Progress, ignore

MAX_BYTES = 2 << 30  # where the catalogue knows no size
MAX_REDIRECTS = 5
TIMEOUT = httpx.Timeout(30.0, connect=15.0)
CHUNK = 1 << 18
EVENT_SECONDS = 0.25


@dataclass(frozen=True)
class FetchResult:
    """A file that is in place and has the right hash."""

    path: Path
    status: Literal["present", "downloaded", "copied"]
    size_bytes: int


def fetch(
    remote: RemoteFile, target: Path, *, source: str | None = None, on_event: OnEvent = ignore
) -> FetchResult:
    """Put a file of the catalogue at `target`, from its mirrors or from `source`.

    A file already there with the right hash is left alone; one with another hash is replaced, once the new
    one is verified.

    Args:
        source: the URL of another mirror, or the path of a file on this machine.

    Raises:
        KdError: unreachable, refused, too large, or not the file it should be; nothing is left behind.
    """
    if target.is_dir():
        raise KdError(f"{target} is a folder", "Move it away.")
    try:
        if target.exists():
            if is_right(remote, target):
                return FetchResult(target, "present", target.stat().st_size)
            on_event(Note(f"{target} is not the expected file (its hash differs); it will be replaced."))
        if source is not None and not is_url(source):
            return _copy(remote, files.expand(source), target, on_event)
        return _download(remote, [source] if source else remote.urls, target, on_event)
    except OSError as error:
        raise KdError(
            f"cannot write {target}: {error.strerror or error}", "Check the folder and the free space."
        ) from error


def is_url(source: str) -> bool:
    """Whether a --from value is an address; a Windows drive letter is not one."""
    return "://" in source


def is_right(remote: RemoteFile, path: Path) -> bool:
    """Whether a file's hash is the catalogue's."""
    if remote.sha256 is not None:
        return files.sha256_file(path) == remote.sha256
    return remote.git_blob_sha1 is not None and files.git_blob_sha1_file(path) == remote.git_blob_sha1


def _limit(remote: RemoteFile) -> int:
    return remote.size_bytes if remote.size_bytes is not None else MAX_BYTES


def _from_hint(remote: RemoteFile) -> str:
    return f"If you can get {remote.name} elsewhere: kd download … --from FILE|URL."


def _check(remote: RemoteFile, path: Path, origin: str) -> None:
    if remote.sha256 is None and remote.git_blob_sha1 is None:
        raise KdError(f"no hash is known for {remote.name}", "Add it to the catalogue.")
    if not is_right(remote, path):
        wanted = f"SHA-256 {remote.sha256}" if remote.sha256 else f"git blob SHA-1 {remote.git_blob_sha1}"
        raise KdError(
            f"{origin} is not {remote.name}: its hash is not {wanted}",
            "The file there has changed, is damaged, or was swapped; it was not kept. " + _from_hint(remote),
        )


def _copy(remote: RemoteFile, source: Path, target: Path, on_event: OnEvent) -> FetchResult:
    if not source.is_file():
        raise KdError(
            f"no such file: {source}", "--from takes a file on this machine or an https:// address."
        )
    try:
        size = source.stat().st_size
        handle = source.open("rb")
    except OSError as error:
        raise KdError(f"cannot read {source}: {error.strerror or error}", "Check its permissions.") from error
    with handle:
        _check_size(remote, size, str(source))
        with files.atomic_path(target) as temporary, temporary.open("wb") as output:
            _write(remote, iter(lambda: handle.read(CHUNK), b""), output, size, on_event)
            output.flush()
            _check(remote, temporary, str(source))
    return FetchResult(target, "copied", target.stat().st_size)


def _download(remote: RemoteFile, urls: Sequence[str], target: Path, on_event: OnEvent) -> FetchResult:
    problem: KdError | None = None
    for number, url in enumerate(urls):
        if problem is not None:
            on_event(Note(f"{problem.message}; trying mirror {number + 1} of {len(urls)}."))
        try:
            with files.atomic_path(target) as temporary, temporary.open("wb") as output:
                with _response(remote, url) as response:
                    size = _stated_size(response)
                    _check_size(remote, size, url)
                    _write(remote, response.iter_bytes(CHUNK), output, size, on_event)
                output.flush()
                _check(remote, temporary, url)
        except KdError as error:
            problem = error
            continue
        return FetchResult(target, "downloaded", target.stat().st_size)
    if problem is None:
        raise KdError(f"no address is known for {remote.name}", _from_hint(remote))
    raise problem


def _write(
    remote: RemoteFile, chunks: Iterator[bytes], output: BinaryIO, size: int | None, on_event: OnEvent
) -> None:
    total = size or remote.size_bytes or 0
    done, told = 0, time.monotonic()
    for chunk in chunks:
        done += len(chunk)
        _check_size(remote, done, remote.name, partial=True)  # also when the stated size was a lie
        output.write(chunk)
        if time.monotonic() - told >= EVENT_SECONDS:
            told = time.monotonic()
            on_event(Progress(remote.name, done, total, "bytes"))
    on_event(Progress(remote.name, done, total or done, "bytes"))


def _check_size(remote: RemoteFile, size: int | None, origin: str, *, partial: bool = False) -> None:
    if size is not None and size > _limit(remote):
        raise KdError(f"{origin} is larger than the {_limit(remote):,} bytes it may have", _from_hint(remote))
    if not partial and size is not None and remote.size_bytes is not None and size != remote.size_bytes:
        raise KdError(
            f"{origin} is not {remote.name}: it has {size:,} bytes instead of {remote.size_bytes:,}",
            _from_hint(remote),
        )


def _stated_size(response: httpx.Response) -> int | None:
    """Content-Length, where it counts the bytes that will arrive."""
    text = response.headers.get("content-length", "")
    return int(text) if text.isdecimal() and "content-encoding" not in response.headers else None


@contextmanager
def _response(remote: RemoteFile, url: str) -> Iterator[httpx.Response]:
    """An open 200 response; redirects are followed by hand, so that each address is checked."""
    try:
        try:
            opened = httpx.Client(timeout=TIMEOUT, follow_redirects=False)
        except (ImportError, ValueError) as error:  # of *_proxy in the environment
            raise KdError(
                f"the proxy settings cannot be used: {error}",
                "Change HTTPS_PROXY and ALL_PROXY, or use --from FILE.",
            ) from error
        with opened as client:
            address = _address(url)
            for _ in range(MAX_REDIRECTS + 1):
                with client.stream("GET", address, headers={"Accept-Encoding": "identity"}) as response:
                    if response.next_request is not None:
                        address = _address(str(response.next_request.url), "is redirected to")
                        continue
                    if response.status_code != 200:
                        raise KdError(
                            f"{address} answers {response.status_code} {response.reason_phrase}",
                            _from_hint(remote),
                        )
                    yield response
                    return
            raise KdError(f"{url} redirects more than {MAX_REDIRECTS} times", _from_hint(remote))
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
        raise KdError(
            f"cannot fetch {url}: {error or type(error).__name__}",
            "Check the network and the proxy settings. " + _from_hint(remote),
        ) from error


def _address(url: str, how: str = "is") -> httpx.URL:
    """A URL that may be fetched: https, or http on this very machine."""
    address = httpx.URL(url)
    if address.scheme == "https" and address.host:
        return address
    if address.scheme == "http" and _is_loopback(address.host):
        return address
    raise KdError(f"refuses {url}: it {how} not an https address", "Give an https:// address.")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
