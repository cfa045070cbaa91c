"""One request for a file, or for the rest of one: which addresses are asked, and which answers are believed."""

from __future__ import annotations

import ipaddress
import re
import shutil
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from kdcli.base.errors import KdError
from kdcli.base.events import OnEvent, Progress
from kdcli.data.catalog import RemoteFile
from kdcli.data.fetch.partial import Origin, Partial, origin_of

MAX_BYTES = 2 << 30  # where the catalogue knows no size
MAX_REDIRECTS = 5
TIMEOUT = httpx.Timeout(30.0, connect=15.0)  # of silence, not of the whole
EVENT_SECONDS = 0.25
SPARE_BYTES = 16 << 20  # a disk is not filled to its last byte
_CONTENT_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)")


class TransientError(Exception):
    """What may go better next time.

    Attributes:
        retry_after_s: how long the server asks to be left alone.
        unreachable: there was no connection at all.
    """

    def __init__(self, message: str, *, retry_after_s: float = 0.0, unreachable: bool = False) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.unreachable = unreachable


class StartOverError(Exception):
    """The server cannot go on where the part ends, or its answer is not to be believed."""


@dataclass(frozen=True)
class Job:
    """A file of the catalogue on its way."""

    remote: RemoteFile
    partial: Partial
    client: httpx.Client
    on_event: OnEvent


@contextmanager
def connected() -> Iterator[httpx.Client]:
    """A client that takes its proxies from the environment; what is plain http (loopback only) goes to none.

    Raises:
        KdError: the environment names a proxy that cannot be used.
    """
    try:
        client = httpx.Client(timeout=TIMEOUT, follow_redirects=False, mounts={"http://": None})
    except (ImportError, ValueError) as error:  # of *_proxy in the environment
        raise KdError(
            f"the proxy settings cannot be used: {error}",
            "Change HTTPS_PROXY and ALL_PROXY, or use --from FILE.",
        ) from error
    with client:
        yield client


def transfer(job: Job, url: str, *, ranges: bool) -> bool:
    """Get what is missing of a file into its partial.

    A part from this very address is gone on with if its validator still holds (`If-Range`); a part from another
    mirror, or without a strong validator, if the whole has the size it should have. The caller checks the hash.

    Args:
        ranges: whether a part may be gone on with; else the file is asked for from its first byte.

    Returns:
        Whether a part was gone on with.

    Raises:
        TransientError: cut, silent, overloaded or unreachable; what arrived is kept.
        StartOverError: see there; what arrived before is worth nothing here.
        KdError: this address will not give the file.
        OSError: it cannot be written.
    """
    partial = job.partial
    known = partial.origin() if ranges else None
    offset = partial.size if known is not None else 0
    other_mirror = known is not None and known.url != shown(url)
    headers = {"Accept-Encoding": "identity"}
    if known is not None:
        headers["Range"] = f"bytes={offset}-"
        if not other_mirror and known.if_range is not None:
            headers["If-Range"] = known.if_range
    with _answer(job.client, url, headers) as response:
        if response.status_code == 206 and known is not None:
            start, end, total = _range(job.remote, response, known, offset, other_mirror=other_mirror)
            if other_mirror:
                partial.describe(origin_of(shown(url), response.headers, total))
            _receive(job, response.iter_raw(), start, end + 1, total)
            return True
        if response.status_code == 416 and known is not None:
            raise StartOverError(f"{shown(url)} has no byte {offset:,}")
        if response.status_code != 200:
            raise _refusal(job.remote, response, url)
        _whole(job, response, url)
    return False


def _whole(job: Job, response: httpx.Response, url: str) -> None:
    """Take an answer that begins with the first byte; what was there before goes."""
    text = response.headers.get("content-length", "")
    size = int(text) if text.isdecimal() else None
    if response.headers.get("content-type", "").lower().startswith("text/html"):
        raise KdError(f"{shown(url)} answers with a web page, not the file", from_hint(job.remote))
    coding = response.headers.get("content-encoding", "identity").lower()
    if coding == "identity" or (size is not None and size == job.remote.size_bytes):
        # a .gz that is called compressed, but has the right length, is the file as it should be
        chunks, origin = response.iter_raw(), origin_of(shown(url), response.headers, size)
    else:  # compressed on the way although we asked for it plain: such a part cannot be gone on with
        size, chunks, origin = None, response.iter_bytes(), None
    check_size(job.remote, size, shown(url))
    check_space(job.remote, job.partial.path.parent, size, job.partial.size)
    job.partial.drop()  # not before: a wrong answer of one mirror must not cost what another gave
    if origin is not None:
        job.partial.describe(origin)
    _receive(job, chunks, 0, size, size)


def _receive(job: Job, chunks: Iterator[bytes], start: int, end: int | None, total: int | None) -> None:
    """Append what arrives, bytes `start` to `end` (exclusive; None: to the end of the answer)."""
    remote = job.remote
    total = total or remote.size_bytes
    done, told = start, time.monotonic()
    job.on_event(Progress(remote.name, done, total or 0, "bytes"))
    with job.partial.path.open("ab") as output:
        for chunk in chunks:
            done += len(chunk)
            if end is not None and done > end:
                raise StartOverError(f"more arrived than the {end - start:,} bytes announced")
            if done > limit(remote):
                output.close()
                job.partial.drop()
                raise _too_large(remote, remote.name)
            output.write(chunk)
            output.flush()  # so that it outlives this process
            if time.monotonic() - told >= EVENT_SECONDS:
                told = time.monotonic()
                job.on_event(Progress(remote.name, done, total or 0, "bytes"))
    job.on_event(Progress(remote.name, done, total or done, "bytes"))
    if total is not None and done < total:
        raise TransientError(f"the answer ended after {done:,} of {total:,} bytes")


def _range(
    remote: RemoteFile, response: httpx.Response, known: Origin, offset: int, *, other_mirror: bool
) -> tuple[int, int, int | None]:
    """First and last byte and size of the whole, of an answer that goes on with a part.

    Raises:
        StartOverError: they are not those of the file that the part is of.
    """
    match = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
    if match is None:
        raise StartOverError("206 without a Content-Range that can be read")
    start, end = int(match[1]), int(match[2])
    total = None if match[3] == "*" else int(match[3])
    if start != offset or end < start or (total is not None and end >= total):
        raise StartOverError(f"asked for byte {offset:,} on, got {match[0]}")
    expected = remote.size_bytes or known.total
    if total != expected and (other_mirror or None not in (total, expected)):
        raise StartOverError(f"{match[0]} is not of a file of {expected or 0:,} bytes")
    text = response.headers.get("content-length", "")
    if text.isdecimal() and int(text) != end - start + 1:
        raise StartOverError(f"{match[0]}, but {text} bytes long")
    here = origin_of(known.url, response.headers, total)
    if not other_mirror and None not in (here.etag, known.etag) and here.etag != known.etag:
        raise StartOverError("the file there has changed")
    return start, end, total


def _refusal(remote: RemoteFile, response: httpx.Response, url: str) -> Exception:
    status = response.status_code
    message = f"{shown(url)} answers {status} {response.reason_phrase}".rstrip()
    if status in (408, 429) or status >= 500:
        return TransientError(message, retry_after_s=_retry_after(response.headers))
    return KdError(message, from_hint(remote))


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks for, by number or date."""
    text = headers.get("retry-after", "").strip()
    if text.isdecimal():
        return float(text[:9])
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0


@contextmanager
def _answer(client: httpx.Client, url: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
    """An answer that is no redirect; those are followed by hand, so that each address is checked."""
    try:
        address = allowed(url)
        for _ in range(MAX_REDIRECTS + 1):
            with client.stream("GET", address, headers=headers) as response:
                if response.next_request is None:
                    yield response
                    return
                address = allowed(str(response.next_request.url), address)
        raise KdError(f"{shown(url)} redirects more than {MAX_REDIRECTS} times", "Is the address right?")
    except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.StreamError, httpx.DecodingError) as error:
        raise KdError(f"cannot fetch {shown(url)}: {error}", "Is the address right?") from error
    except httpx.TransportError as error:
        message = f"cannot fetch {shown(url)}: {_reason(error)}"
        if _is_untrusted(error):
            raise KdError(message, "Its certificate is not one this machine trusts.") from error
        unreachable = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError)
        raise TransientError(message, unreachable=unreachable) from error


def _reason(error: httpx.TransportError) -> str:
    if isinstance(error, httpx.ReadTimeout):
        return f"nothing arrived for {TIMEOUT.read:g} s"
    return str(error) or type(error).__name__


def _is_untrusted(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def allowed(url: str, before: httpx.URL | None = None) -> httpx.URL:
    """An address that may be asked: https; or http on this very machine, if the way there was never https.

    Raises:
        KdError: any other.
    """
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise KdError(f"no address: {url}: {error}", "Give an https:// address.") from error
    if address.scheme == "https" and address.host:
        return address
    secure = before is not None and before.scheme == "https"
    if address.scheme == "http" and _is_loopback(address.host) and not secure:
        return address
    how = "is" if before is None else "is redirected to"
    raise KdError(f"refuses {shown(url)}: it {how} not an https address", "Give an https:// address.")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def shown(url: str) -> str:
    """An address for messages and notes: without user and password."""
    return re.sub(r"(?<=://)[^/?#]*@", "", url)


def limit(remote: RemoteFile) -> int:
    """Bytes a file may have."""
    return remote.size_bytes if remote.size_bytes is not None else MAX_BYTES


def check_size(remote: RemoteFile, size: int | None, origin: str) -> None:
    """Refuse what cannot be the file by its size.

    Raises:
        KdError: too large, or not the size that the catalogue knows.
    """
    if size is not None and size > limit(remote):
        raise _too_large(remote, origin)
    if size is not None and remote.size_bytes is not None and size != remote.size_bytes:
        raise KdError(
            f"{origin} is not {remote.name}: it has {size:,} bytes instead of {remote.size_bytes:,}",
            from_hint(remote),
        )


def check_space(remote: RemoteFile, folder: Path, size: int | None, there: int = 0) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        size: bytes, where the catalogue knows none; None: nobody knows.
        there: bytes that are on the disk already, or go first.

    Raises:
        OutOfSpaceError: too little is free.
    """
    size = remote.size_bytes or size
    free = shutil.disk_usage(folder).free
    if size is None or size <= there or free >= size - there + SPARE_BYTES:
        return
    raise OutOfSpaceError(
        f"not enough space in {folder}: {remote.name} needs {(size - there) / 1e6:,.1f} MB more and "
        f"{SPARE_BYTES / 1e6:,.1f} MB to spare, {free / 1e6:,.1f} MB are free",
        "Free some space, or choose another folder.",
    )


class OutOfSpaceError(KdError):
    """The disk is too small: another mirror would not help."""


def _too_large(remote: RemoteFile, origin: str) -> KdError:
    return KdError(f"{origin} is larger than the {limit(remote):,} bytes it may have", from_hint(remote))


def from_hint(remote: RemoteFile) -> str:
    """What to do where no mirror works."""
    return f"If you can get {remote.name} elsewhere: kd download … --from FILE|URL."
