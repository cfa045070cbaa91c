"""The part of a file that has arrived, and a note beside it on where it came from.

The note is JSON and not trusted: what cannot be read, or belongs to another file, counts as absent, and then the
part does too. No note can make a wrong file pass, since the hash of the whole decides.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from kdcli.base import files
from kdcli.data.catalog import RemoteFile

NOTE_BYTES = 16 << 10
STRONG_DATE_S = 60  # a file changed so shortly before it was sent may change again within the same second
_ETAG = re.compile(r'(W/)?"[\x21\x23-\x7e]{0,200}"')


@dataclass(frozen=True)
class Origin:
    """What a server said of the file a part comes from.

    Attributes:
        url: the address asked, without user and password.
        etag: the entity tag as sent, weak ones too.
        last_modified: an HTTP date; only without an entity tag, and only if it is a strong validator.
        total: bytes of the whole file.
    """

    url: str
    etag: str | None = None
    last_modified: str | None = None
    total: int | None = None

    @property
    def if_range(self) -> str | None:
        """The value of `If-Range`; None where a server gave no strong validator."""
        if self.etag is not None:
            return None if self.etag.startswith("W/") else self.etag
        return self.last_modified


def origin_of(url: str, headers: Mapping[str, str], total: int | None) -> Origin:
    """What the headers of an answer say."""
    etag = headers.get("etag", "").strip()
    if _ETAG.fullmatch(etag):
        return Origin(url, etag=etag, total=total)
    modified = headers.get("last-modified", "").strip()
    return Origin(url, last_modified=modified if _is_strong(modified, headers) else None, total=total)


def _is_strong(modified: str, headers: Mapping[str, str]) -> bool:
    try:
        age = parsedate_to_datetime(headers.get("date", "")) - parsedate_to_datetime(modified)
    except (ValueError, TypeError, OverflowError):
        return False
    return age.total_seconds() >= STRONG_DATE_S


class Partial:
    """`.<name>.partial` and its note `.<name>.partial.json`, beside the file they are to become."""

    def __init__(self, remote: RemoteFile, target: Path) -> None:
        self.path = target.with_name(f".{target.name}.partial")
        self.note = target.with_name(f".{target.name}.partial.json")
        self._wanted = f"sha256:{remote.sha256}" if remote.sha256 else f"git-blob-sha1:{remote.git_blob_sha1}"

    @property
    def size(self) -> int:
        """Bytes that are there."""
        with suppress(OSError):
            if self.path.is_file() and not self.path.is_symlink():
                return self.path.stat().st_size
        return 0

    def origin(self) -> Origin | None:
        """The note; None if the part cannot be gone on with."""
        if not self.size:
            return None
        try:
            with self.note.open("rb") as handle:
                about = json.loads(handle.read(NOTE_BYTES))
            return _checked(about) if about["wanted"] == self._wanted else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def describe(self, origin: Origin) -> None:
        """Write the note."""
        files.write_json(self.note, {"wanted": self._wanted, **asdict(origin)})

    def drop(self) -> None:
        """Remove both."""
        self.note.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def become(self, target: Path) -> None:
        """Give the verified file its name, for good."""
        with self.path.open("rb+") as handle:
            os.fsync(handle.fileno())
        self.path.replace(target)
        files.fsync_directory(target.parent)
        self.note.unlink(missing_ok=True)


def _checked(about: Mapping[str, Any]) -> Origin:
    """The note as an `Origin`.

    Raises:
        ValueError: not what `describe` writes.
    """
    url, etag, modified, total = (about[name] for name in ("url", "etag", "last_modified", "total"))
    if not isinstance(url, str) or not (etag is None or (isinstance(etag, str) and _ETAG.fullmatch(etag))):
        raise ValueError("no url or etag")
    if modified is not None:
        if not isinstance(modified, str) or not modified.isascii() or not modified.isprintable():
            raise ValueError("no date")
        parsedate_to_datetime(modified)
    if total is not None and (type(total) is not int or total <= 0):
        raise ValueError("no size")
    return Origin(url, etag, modified, total)
