"""Resumable downloads of the catalogue's files. A file gets its final name only if its hash is right."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal

import httpx

from kdcli.base import files
from kdcli.base.errors import KdError
from kdcli.base.events import Note, OnEvent, Progress, ignore
from kdcli.base.text import reason
from kdcli.data.catalog import RemoteFile

ATTEMPTS = 4  # per mirror, without progress in between
BACK_OFF_S = 1.0  # then 2, 4
MAX_WAIT_S = 60.0  # upper bound of Retry-After
MAX_BYTES = 2 << 30  # of a file whose size the catalogue does not know
MAX_REDIRECTS = 5
LOOPBACK = ("localhost", "127.0.0.1", "::1")
TIMEOUT = httpx.Timeout(30.0, connect=15.0)  # without any data, not for the whole file
EVENT_SECONDS = 0.25
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)")


@dataclass(frozen=True)
class FetchResult:
    """A file that is in place and has the right hash."""

    path: Path
    status: Literal["present", "downloaded", "copied"]
    size_bytes: int


@dataclass(frozen=True)
class LocalState:
    """State of a file of the catalogue on this machine.

    Attributes:
        status: `other` is a file of that name with another hash.
        partial: path of the partial download.
        partial_bytes: its size; the next download resumes there.
    """

    status: Literal["present", "partial", "absent", "other"]
    partial: Path
    partial_bytes: int = 0


class TransientError(Exception):
    """A failure that may not recur; `retry_after_s` is how long the server asks to wait."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def fetch(
    remote: RemoteFile, target: Path, *, source: str | None = None, on_event: OnEvent = ignore
) -> FetchResult:
    """Put a file of the catalogue at `target`, from its mirrors or from `source`.

    An intact file is left alone; a file with another hash is replaced once the new one is verified. A lock makes
    other processes wait for the one that downloads. What has arrived is kept on any failure and resumed next time.

    Args:
        source: URL of another mirror, or path of a local file.

    Raises:
        KdError: unreachable, refused, too large, not writable, or the hash is wrong.
    """
    if target.is_dir():
        raise KdError(f"{target} is a folder", "Move it away.")
    try:
        if is_intact(remote, target):
            return FetchResult(target, "present", target.stat().st_size)
        with files.locked(
            target.with_name(f".{target.name}.lock"),
            lambda: on_event(Note(f"Another process is fetching {target}; waiting for it.")),
        ) as waited:
            if waited and is_intact(remote, target):
                return FetchResult(target, "present", target.stat().st_size)
            if target.exists():
                on_event(Note(f"{target} is not the expected file (its hash differs); it will be replaced."))
            if source is not None and not is_url(source):
                return _copy(remote, files.expand(source), target)
            return _download(remote, [source] if source else remote.urls, target, on_event)
    except OSError as error:
        raise KdError(
            f"cannot read or write {error.filename or target}: {reason(error)}",
            "Check permissions and free space; what has arrived is kept.",
        ) from error


def inspect(remote: RemoteFile, target: Path) -> LocalState:
    """State of a file on this machine; no server is asked."""
    partial = _partial_path(target)
    if is_intact(remote, target):
        return LocalState("present", partial)
    if size := _size_of(partial):
        return LocalState("partial", partial, size)
    return LocalState("other" if target.exists() else "absent", partial)


def is_url(source: str) -> bool:
    """Whether a --from value is a URL; a Windows drive letter is not one."""
    return "://" in source


def is_intact(remote: RemoteFile, path: Path) -> bool:
    """Whether there is a file at `path` with the catalogue's hash."""
    if not path.is_file():
        return False
    if remote.sha256 is not None:
        return files.sha256_file(path) == remote.sha256
    return files.git_blob_sha1_file(path) == remote.git_blob_sha1


def _partial_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def _size_of(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _copy(remote: RemoteFile, source: Path, target: Path) -> FetchResult:
    if not source.is_file():
        raise KdError(
            f"no such file: {source}", "--from takes a file on this machine or an https:// address."
        )
    with files.atomic_path(target) as temporary:
        _check_size(remote, source.stat().st_size, str(source))
        shutil.copyfile(source, temporary)
        if not is_intact(remote, temporary):
            raise _wrong_hash(remote, str(source))
    return FetchResult(target, "copied", target.stat().st_size)


def _download(remote: RemoteFile, urls: Sequence[str], target: Path, on_event: OnEvent) -> FetchResult:
    """Try one mirror after another; a later one resumes what an earlier one gave."""
    partial = _partial_path(target)
    complete = is_intact(remote, partial)  # the process ended just before the rename
    if not complete and remote.size_bytes and _size_of(partial) >= remote.size_bytes:
        partial.unlink()
    problem = KdError(f"no address is known for {remote.name}", _from_hint(remote))
    with _client() as client:
        for number, url in enumerate(() if complete else urls):
            if number:
                on_event(Note(f"{problem.message}; trying mirror {number + 1} of {len(urls)}."))
            try:
                _download_from(client, url, remote, partial, on_event)
            except KdError as error:
                problem = error
            else:
                complete = True
                break
    if not complete:
        if size := _size_of(partial):
            problem.hint = f"{size / 1e6:,.1f} MB are kept for the next attempt. {problem.hint}"
        raise problem
    with files.atomic_path(target) as temporary:
        partial.replace(temporary)
    return FetchResult(target, "downloaded", target.stat().st_size)


def _download_from(
    client: httpx.Client, url: str, remote: RemoteFile, partial: Path, on_event: OnEvent
) -> None:
    """Complete `partial` from one mirror, with retries; without progress their number is bounded.

    A resumed file whose hash is wrong is fetched once more from its first byte, since its two parts may be of
    different versions.

    Raises:
        KdError: this mirror failed; `partial` keeps what may be the beginning of the file.
        OSError: `partial` cannot be written.
    """
    failures, furthest, restarted = 0, _size_of(partial), False
    while True:
        try:
            resumed = _request(client, url, remote, partial, on_event)
        except TransientError as error:
            failures = 1 if _size_of(partial) > furthest else failures + 1
            furthest = max(furthest, _size_of(partial))
            if failures >= ATTEMPTS:
                raise KdError(
                    str(error), f"Check the network, proxy and certificates. {_from_hint(remote)}"
                ) from error
            wait = min(max(BACK_OFF_S * 2 ** (failures - 1), error.retry_after_s), MAX_WAIT_S)
            on_event(Note(f"{error}; trying again in {wait:.0f} s."))
            time.sleep(wait)
            continue
        if is_intact(remote, partial):
            return
        partial.unlink()
        if restarted or not resumed:
            raise _wrong_hash(remote, _without_credentials(url))
        restarted = True
        on_event(Note(f"{remote.name}: the resumed download has a wrong hash; fetching it from its start."))


def _request(client: httpx.Client, url: str, remote: RemoteFile, partial: Path, on_event: OnEvent) -> bool:
    """Append the missing bytes to `partial`, or replace it where the server sends the whole file.

    Returns:
        Whether the download was resumed.

    Raises:
        TransientError: cut off, silent, overloaded or unreachable.
        KdError: this address will not give the file.
    """
    origin, done = _without_credentials(url), _size_of(partial)
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={done}-"} if done else {})}
    with _response(client, url, headers) as response:
        # 1. Does the answer resume the part, replace it, or fail?
        resumed = done > 0 and response.status_code in (206, 416)
        length = response.headers.get("content-length", "")
        if resumed:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
            if match is None or int(match[1]) != done:
                partial.unlink()
                raise TransientError(f"{origin} does not resume at byte {done:,}; starting over")
            length = match[2]
        elif response.status_code == 200:
            done = 0
        else:
            message = f"{origin} answers {response.status_code} {response.reason_phrase}".rstrip()
            if response.status_code in (408, 429) or response.status_code >= 500:
                raise TransientError(message, _retry_after(response.headers.get("retry-after", "")))
            raise KdError(message, _from_hint(remote))
        # 2. Refuse by type and size before the part is touched.
        if response.headers.get("content-type", "").lower().startswith("text/html"):
            raise KdError(f"{origin} answers with a web page, not the file", _from_hint(remote))
        total = int(length) if length.isdecimal() else remote.size_bytes
        if total is not None:
            _check_size(remote, total, origin)
        # 3. Write. The raw body: a .gz that is declared as `Content-Encoding: gzip` stays as it is.
        with partial.open("ab" if resumed else "wb") as output:
            reported = 0.0
            for chunk in response.iter_raw():
                if time.monotonic() - reported >= EVENT_SECONDS:
                    reported = time.monotonic()
                    on_event(Progress(remote.name, done, total or 0, "bytes"))
                done += len(chunk)
                if done > (total or MAX_BYTES):
                    partial.unlink()
                    raise _wrong_size(remote, done, origin)
                output.write(chunk)
                output.flush()  # survives a kill of this process
    on_event(Progress(remote.name, done, total or done, "bytes"))
    if total is not None and done < total:
        raise TransientError(f"{origin} ended after {done:,} of {total:,} bytes")
    return resumed


@contextmanager
def _client() -> Iterator[httpx.Client]:
    """HTTP client with the proxies of the environment, except for plain http, which is loopback only."""
    try:
        client = httpx.Client(timeout=TIMEOUT, follow_redirects=False, mounts={"http://": None})
    except (ImportError, ValueError) as error:
        raise KdError(
            f"the proxy settings cannot be used: {error}",
            "Change HTTPS_PROXY and ALL_PROXY, or use --from FILE.",
        ) from error
    with client:
        yield client


@contextmanager
def _response(client: httpx.Client, url: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
    """The response after redirects, each of which is checked by `_allowed`."""
    origin = _without_credentials(url)
    try:
        address = _allowed(url)
        for _ in range(MAX_REDIRECTS + 1):
            with client.stream("GET", address, headers=headers) as response:
                if response.next_request is None:
                    yield response
                    return
                address = _allowed(str(response.next_request.url), address)
        raise KdError(f"{origin} redirects more than {MAX_REDIRECTS} times", "Is the address right?")
    except httpx.TransportError as error:
        raise TransientError(f"cannot fetch {origin}: {str(error) or type(error).__name__}") from error


def _allowed(url: str, previous: httpx.URL | None = None) -> httpx.URL:
    """Parse a URL; raise a KdError unless it is https, or http on loopback that https did not redirect to."""
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise KdError(f"not a URL: {url}: {error}", "Give an https:// address.") from error
    secure = previous is not None and previous.scheme == "https"
    local = address.scheme == "http" and address.host in LOOPBACK and not secure
    if local or (address.scheme == "https" and address.host):
        return address
    raise KdError(f"refuses {_without_credentials(url)}: not an https address", "Give an https:// address.")


def _without_credentials(url: str) -> str:
    return re.sub(r"(?<=://)[^/?#]*@", "", url)


def _retry_after(text: str) -> float:
    """Seconds of a Retry-After header, which is a number or a date; 0 if it is neither."""
    if text.isascii() and text.isdecimal():
        return float(text)
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _check_size(remote: RemoteFile, size: int, origin: str) -> None:
    """Raise a KdError for another size than the catalogue's, or more than `MAX_BYTES` where it has none."""
    if size != (remote.size_bytes or min(size, MAX_BYTES)):
        raise _wrong_size(remote, size, origin)


def _wrong_size(remote: RemoteFile, size: int, origin: str) -> KdError:
    expected = f"{remote.size_bytes:,}" if remote.size_bytes else f"at most {MAX_BYTES:,}"
    return KdError(
        f"{origin} is not {remote.name}: it has {size:,} bytes instead of {expected}", _from_hint(remote)
    )


def _wrong_hash(remote: RemoteFile, origin: str) -> KdError:
    expected = f"SHA-256 {remote.sha256}" if remote.sha256 else f"git blob SHA-1 {remote.git_blob_sha1}"
    return KdError(
        f"{origin} is not {remote.name}: its hash is not {expected}",
        f"The file there has changed or is damaged; it was not kept. {_from_hint(remote)}",
    )


def _from_hint(remote: RemoteFile) -> str:
    return f"If you can get {remote.name} elsewhere: kd download … --from FILE|URL."
