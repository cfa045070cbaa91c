"""The address of a study's database, and its errors without secrets."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from optuna.exceptions import StorageInternalError
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from kdcli.base.errors import KdError, UsageError
from kdcli.base.text import first_line, reason

_SECRET = re.compile(r"pass|pwd|secret|token|key", re.IGNORECASE)


def read_url(text: str, default: Path) -> URL:
    """The address of the storage; an empty text stands for the SQLite file `default`.

    Raises:
        UsageError: not a database URL, or an SQLite database in memory.
    """
    try:
        url = make_url(text) if text else URL.create("sqlite", database=default.as_posix())
    except (ArgumentError, ValueError):  # the text may hold a password, so the message leaves it out
        raise UsageError(
            "--storage: not a database URL",
            "Write sqlite:///FILE.db, postgresql://USER:PASSWORD@HOST/NAME or mysql+pymysql://…",
        ) from None
    in_memory = not url.database or url.database == ":memory:" or url.database.startswith("file:")
    if url.get_backend_name() == "sqlite" and in_memory:
        raise UsageError(
            f"--storage {redacted(url)}: a study needs a plain file or a database server",
            "Write sqlite:///FILE.db, with one more / for an absolute path.",
        )
    return url


def redacted(url: URL) -> str:
    """The address without its secrets."""
    query = {key: "hidden" if _SECRET.search(key) else value for key, value in url.query.items()}
    return url.set(query=query).render_as_string(hide_password=True)


@contextmanager
def readable_errors(url: URL, folder: Path) -> Iterator[None]:
    """Turn errors of the database, and of files in `folder`, into one line without secrets."""
    try:
        yield
    except ImportError as error:
        raise UsageError(
            f"storage {redacted(url)}: its driver is not installed ({_line(error.__cause__ or error, url)})",
            "Install the driver that the URL names.",
        ) from error
    except (SQLAlchemyError, StorageInternalError) as error:
        inner = error if isinstance(error, SQLAlchemyError) else (error.__cause__ or error)
        raise KdError(
            f"storage {redacted(url)}: {_line(getattr(inner, 'orig', None) or inner, url)}",
            "Check --storage, and that the database can be reached and written.",
        ) from error
    except OSError as error:
        raise KdError(
            f"{error.filename or folder}: {reason(error)}", "Check the path, its permissions and free space."
        ) from error


def _line(error: BaseException, url: URL) -> str:
    text = first_line(error)
    secrets = [url.password, *(value for key, value in url.query.items() if _SECRET.search(key))]
    for secret in secrets:
        if isinstance(secret, str) and secret:
            text = text.replace(secret, "***")
    return text
