"""The database of a study: its address, opening it, and errors without secrets."""

from __future__ import annotations

import importlib.util
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kdcli.base.errors import KdError, UsageError
from kdcli.base.text import first_line, reason

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from sqlalchemy import URL

HEARTBEAT_S, GRACE_S = 15, 120  # interval of heartbeats; age at which a trial counts as stale
RETRIES = 2  # of a trial whose process died
_LOCK_TIMEOUT_S = 60  # SQLite: how long another process may hold the write lock
_SECRET = re.compile(r"pass|pwd|secret|token|key", re.IGNORECASE)


def require() -> None:
    """Raise UsageError if Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise UsageError("kd tune needs Optuna, which is not installed", "pip install 'kdcli[tune]'")


def read_url(text: str, default: Path) -> URL:
    """The address of the storage; an empty text stands for the SQLite file `default`.

    Raises:
        UsageError: not a database URL, or an SQLite database in memory.
    """
    from sqlalchemy import URL, make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(text) if text else URL.create("sqlite", database=default.as_posix())
    except (ArgumentError, ValueError):  # the text may hold a password, so the message leaves it out
        raise UsageError(
            "--storage: not a database URL",
            "Write sqlite:///FILE.db, postgresql://USER:PASSWORD@HOST/NAME or mysql+pymysql://…",
        ) from None
    in_memory = not url.database or url.database == ":memory:" or url.database.startswith("file:")
    if is_sqlite(url) and in_memory:
        raise UsageError(
            f"--storage {redacted(url)}: a study needs a plain file or a database server",
            "Write sqlite:///FILE.db, with one more / for an absolute path.",
        )
    return url


def redacted(url: URL) -> str:
    """The address without its secrets."""
    query = {key: "hidden" if _SECRET.search(key) else value for key, value in url.query.items()}
    return url.set(query=query).render_as_string(hide_password=True)


def is_sqlite(url: URL) -> bool:
    """Whether the database is an SQLite file."""
    return url.get_backend_name() == "sqlite"


def connect(url: URL) -> RDBStorage:
    """Open the database, and create Optuna's tables in an empty one.

    Trials send heartbeats; the values of a stale one are queued again, at most `RETRIES` times.
    """
    from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
    from sqlalchemy.exc import SQLAlchemyError

    # Optuna substitutes {…} in an address
    address = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    last_attempt = is_sqlite(url)
    while True:
        try:
            return RDBStorage(
                address,
                engine_kwargs={"connect_args": {"timeout": _LOCK_TIMEOUT_S}} if is_sqlite(url) else {},
                heartbeat_interval=HEARTBEAT_S,
                grace_period=GRACE_S,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
            )
        except SQLAlchemyError:
            if last_attempt:
                raise
            last_attempt = True
            time.sleep(1)  # another machine may be creating the same tables


@contextmanager
def readable_errors(url: URL, folder: Path) -> Iterator[None]:
    """Turn errors of the database, and of files in `folder`, into one line without secrets."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

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
