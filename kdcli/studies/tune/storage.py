"""The database of a study: opening it, and what may be said of it."""

from __future__ import annotations

import importlib.util
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdcli.base.errors import KdError, UsageError

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from sqlalchemy import URL

HEARTBEAT_S, GRACE_S = 15, 120  # of a process elsewhere: how often it is heard of, and when it is given up
_LOCKED_S = 60  # SQLite: how long another's write is waited for
_SECRET = re.compile(r"pass|pwd|secret|token|key", re.IGNORECASE)


def require() -> None:
    """Raise UsageError if Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise UsageError("kd tune needs Optuna, which is not installed", "pip install 'kdcli[tune]'")


def read_url(text: str, default: Path) -> URL:
    """The storage's address; that of an SQLite file where none is given.

    Raises:
        UsageError: it is no address of a database, or of one that ends with its process.
    """
    from sqlalchemy import URL, make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(text) if text else URL.create("sqlite", database=default.as_posix())
    except (ArgumentError, ValueError):  # its text may hold a password, so it is not shown
        raise UsageError(
            "--storage: that is no database URL",
            "Write sqlite:///FILE.db, postgresql://USER:PASSWORD@HOST/NAME or mysql+pymysql://…",
        ) from None
    if url.get_backend_name() == "sqlite":
        if make_url(url.render_as_string()).database != url.database:
            raise UsageError(f"SQLite cannot be given the path {url.database}", "Choose another --runs-dir.")
        if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
            raise UsageError(
                f"--storage {shown(url)}: a study is kept in a plain file or on a server",
                "Write sqlite:///FILE.db, with one more / for an absolute path.",
            )
    return url


def shown(url: URL) -> str:
    """The address without its secrets."""
    query = {key: "hidden" if _SECRET.search(key) else value for key, value in url.query.items()}
    return url.set(query=query).render_as_string(hide_password=True)


def database_file(url: URL) -> Path | None:
    """The file of an SQLite database."""
    return Path(url.database) if url.get_backend_name() == "sqlite" and url.database else None


def connect(url: URL, on_stale: Callable[[Any, Any], None]) -> RDBStorage:
    """Open the database, and make Optuna's tables in an empty one.

    Args:
        on_stale: called with study and trial when a trial was given up because nothing is heard of its process.
    """
    from optuna.storages import RDBStorage
    from sqlalchemy.exc import SQLAlchemyError

    # Optuna fills in {…} in an address; here it is taken as it is
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    engine = {"connect_args": {"timeout": _LOCKED_S}} if database_file(url) is not None else {}
    for last in (False, True):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # heartbeats are called experimental
                return RDBStorage(
                    text,
                    engine_kwargs=dict(engine),
                    heartbeat_interval=HEARTBEAT_S,
                    grace_period=GRACE_S,
                    heartbeat_stale_trial_callback=on_stale,
                )
        except SQLAlchemyError:
            if last or database_file(url) is not None:
                raise
            time.sleep(1)  # another machine may have been making the same tables
    raise AssertionError


@contextmanager
def faults_told(url: URL) -> Iterator[None]:
    """Turn what goes wrong with the database into one line without secrets."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    hint = "Check --storage, and that the database can be reached and written."
    try:
        yield
    except ImportError as error:
        missing = error.__cause__ or error
        raise UsageError(
            f"storage {shown(url)}: its driver is not installed ({_line(missing, url)})",
            "Install the driver that the URL names.",
        ) from error
    except (SQLAlchemyError, StorageInternalError) as error:
        inner = error if isinstance(error, SQLAlchemyError) else (error.__cause__ or error)
        raise KdError(
            f"storage {shown(url)}: {_line(getattr(inner, 'orig', None) or inner, url)}", hint
        ) from error


def _line(error: BaseException, url: URL) -> str:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    secrets = [url.password, *(value for key, value in url.query.items() if _SECRET.search(key))]
    for secret in secrets:
        if isinstance(secret, str) and secret:
            text = text.replace(secret, "***")
    return text
