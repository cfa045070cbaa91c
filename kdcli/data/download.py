"""Resumable downloads of the catalogue's files. A file gets its final name only if its hash is right."""

import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import httpx

from kdcli.base import files
from kdcli.base.errors import KdError
from kdcli.base.events import Note, OnEvent, Progress, ignore
from kdcli.base.text import first_line, reason
from kdcli.data.catalog import RemoteFile

ATTEMPTS = 4  # per mirror, without progress in between
BACK_OFF_S = 1.0  # then 2, 4
MAX_WAIT_S = 60.0  # upper bound of Retry-After
MAX_BYTES = 2 << 30  # of a file whose size the catalogue does not know
LOOPBACK = ("localhost", "127.0.0.1", "::1")
TIMEOUT = httpx.Timeout(30.0, connect=15.0)  # without any data, not for the whole file
EVENT_SECONDS = 0.25


class TransientError(Exception):
    """A failure that may not recur; `retry_after_s` is how long the server asks to wait."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def fetch(
    remote: RemoteFile, target: Path, *, source: str | None = None, on_event: OnEvent = ignore
) -> Literal["present", "downloaded", "copied"]:
    """Put a file of the catalogue at `target`, from its mirrors or from `source`, another URL or a local file.

    An intact file is left alone; a file with another hash is replaced once the new one is verified. A lock makes
    other processes wait for the one that downloads. What has arrived is kept on any failure and resumed next time.
    """
    try:
        if is_intact(remote, target):
            return "present"
        with files.locked(
            target.with_name(f".{target.name}.lock"),
            lambda: on_event(Note(f"Another process is fetching {target}; waiting for it.")),
        ) as waited:
            if waited and is_intact(remote, target):
                return "present"
            if target.exists():
                on_event(Note(f"{target} is not the expected file (its hash differs); it will be replaced."))
            if source is not None and not is_url(source):
                _copy(remote, files.expand(source), target)
                return "copied"
            _download(remote, [source] if source else remote.urls, target, on_event)
            return "downloaded"
    except OSError as error:
        raise KdError(
            f"cannot read or write {error.filename or target}: {reason(error)}",
            "Check permissions and free space; what has arrived is kept.",
        ) from error


def inspect(remote: RemoteFile, target: Path) -> tuple[Literal["present", "partial", "absent", "other"], int]:
    """State of a file on this machine, and bytes of a partial download; without a request to a server.

    `other` is a file of that name with another hash.
    """
    if is_intact(remote, target):
        return "present", 0
    if size := _size_of(_partial_path(target)):
        return "partial", size
    return ("other" if target.exists() else "absent"), 0


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
    return path.stat().st_size if path.exists() else 0


def _copy(remote: RemoteFile, source: Path, target: Path) -> None:
    if not source.is_file():
        raise KdError(
            f"no such file: {source}", "--from takes a file on this machine or an https:// address."
        )
    with files.atomic_path(target) as temporary:
        _check_size(remote, source.stat().st_size, str(source))
        shutil.copyfile(source, temporary)
        if not is_intact(remote, temporary):
            raise _wrong_hash(remote, str(source))


def _download(remote: RemoteFile, urls: Sequence[str], target: Path, on_event: OnEvent) -> None:
    """Try one mirror after another; each resumes the part that the ones before it gave."""
    partial = _partial_path(target)
    for number, url in enumerate(urls, 1):
        try:
            _download_from(url, remote, partial, on_event)
            break
        except KdError as error:
            if number == len(urls):
                if size := _size_of(partial):
                    error.hint = f"{size / 1e6:,.1f} MB are kept for the next attempt. {error.hint}"
                raise
            on_event(Note(f"{error.message}; trying mirror {number + 1} of {len(urls)}."))
    with files.atomic_path(target) as temporary:
        partial.replace(temporary)


def _download_from(url: str, remote: RemoteFile, partial: Path, on_event: OnEvent) -> None:
    """Complete `partial` from one mirror; retries without progress are bounded. It keeps what has arrived."""
    if is_intact(remote, partial):  # the process ended just before the rename
        return
    failures, furthest = 0, _size_of(partial)
    with _client(url) as client:
        while True:
            try:
                _request(client, url, remote, partial, on_event)
                return
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


def _client(url: str) -> httpx.Client:
    """HTTP client for one mirror: https, also after redirects, or http from loopback to loopback.

    The proxies are those of the environment; http goes without.
    """

    def check(request: httpx.Request) -> None:
        address = request.url
        local = address.scheme == "http" and address.host in LOOPBACK and not url.lower().startswith("https:")
        if not local and not (address.scheme == "https" and address.host):
            shown = _without_credentials(str(address))
            raise KdError(f"refuses {shown}: not an https address", "Give an https:// address.")

    try:
        return httpx.Client(
            timeout=TIMEOUT,
            follow_redirects=True,
            max_redirects=5,
            mounts={"http://": None},
            event_hooks={"request": [check]},
        )
    except (ImportError, ValueError) as error:
        raise KdError(
            f"the proxy settings cannot be used: {error}",
            "Change HTTPS_PROXY and ALL_PROXY, or use --from FILE.",
        ) from error


def _request(client: httpx.Client, url: str, remote: RemoteFile, partial: Path, on_event: OnEvent) -> None:
    """Append the missing bytes to `partial`, or replace it where the server sends all, and check the hash.

    TransientError if another try may succeed, KdError if this address will not give the file.
    """
    origin, done = _without_credentials(url), _size_of(partial)
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={done}-"} if done else {})}
    try:
        with client.stream("GET", url, headers=headers) as response:
            resumed = _receive(response, origin, remote, partial, on_event)
    except (httpx.InvalidURL, httpx.TooManyRedirects) as error:
        raise KdError(f"cannot use {origin}: {first_line(error)}", "Give an https:// address.") from error
    except httpx.TransportError as error:
        raise TransientError(f"cannot fetch {origin}: {first_line(error)}") from error
    if not is_intact(remote, partial):
        partial.unlink()
        if resumed:  # its two parts may be of different versions
            raise TransientError(f"{remote.name}: the resumed download has a wrong hash; starting over")
        raise _wrong_hash(remote, origin)


def _receive(
    response: httpx.Response, origin: str, remote: RemoteFile, partial: Path, on_event: OnEvent
) -> bool:
    """Check a response and write its body; returns whether the download was resumed."""
    # 1. Does the answer resume the part, replace it, or fail?
    done = _size_of(partial)
    resumed = done > 0 and response.status_code == 206
    if done and response.status_code == 416:
        partial.unlink()
        raise TransientError(f"{origin} does not resume at byte {done:,}; starting over")
    if not resumed and response.status_code != 200:
        message = f"{origin} answers {response.status_code} {response.reason_phrase}".rstrip()
        if response.status_code in (408, 429) or response.status_code >= 500:
            seconds = response.headers.get("retry-after", "")
            raise TransientError(message, float(seconds) if seconds.isdecimal() else 0.0)
        raise KdError(message, _from_hint(remote))
    # 2. Refuse by type and size before the part is touched.
    if response.headers.get("content-type", "").lower().startswith("text/html"):
        raise KdError(f"{origin} answers with a web page, not the file", _from_hint(remote))
    total, length = remote.size_bytes, response.headers.get("content-length", "")
    if not resumed:
        done = 0
        if length.isdecimal():
            total = int(length)
            _check_size(remote, total, origin)
    # 3. Write. The raw body: a .gz that is declared as `Content-Encoding: gzip` stays as it is.
    with partial.open("ab" if resumed else "wb") as output:
        reported = 0.0
        for chunk in response.iter_raw():
            if time.monotonic() - reported >= EVENT_SECONDS:
                reported = time.monotonic()
                on_event(Progress(remote.name, done, total or 0, "bytes"))
            done += len(chunk)
            if done > (remote.size_bytes or MAX_BYTES):
                partial.unlink()
                _check_size(remote, done, origin)
            output.write(chunk)
            output.flush()  # survives a kill of this process
    on_event(Progress(remote.name, done, total or done, "bytes"))
    if total is not None and done < total:
        raise TransientError(f"{origin} ended after {done:,} of {total:,} bytes")
    return resumed


def _without_credentials(url: str) -> str:
    return re.sub(r"(?<=://)[^/?#]*@", "", url)


def _check_size(remote: RemoteFile, size: int, origin: str) -> None:
    """Raise a KdError for another size than the catalogue's, or more than `MAX_BYTES` where it has none."""
    if size != (remote.size_bytes or min(size, MAX_BYTES)):
        expected = f"{remote.size_bytes:,}" if remote.size_bytes else f"at most {MAX_BYTES:,}"
        raise KdError(
            f"{origin} is not {remote.name}: it has {size:,} bytes instead of {expected}", _from_hint(remote)
        )


def _wrong_hash(remote: RemoteFile, origin: str) -> KdError:
    expected = f"SHA-256 {remote.sha256}" if remote.sha256 else f"git blob SHA-1 {remote.git_blob_sha1}"
    return KdError(
        f"{origin} is not {remote.name}: its hash is not {expected}",
        f"The file there has changed or is damaged; it was not kept. {_from_hint(remote)}",
    )


def _from_hint(remote: RemoteFile) -> str:
    return f"If you have {remote.name} from elsewhere, pass it with --from FILE|URL."
