"""User functions `package.module:function`: imported only if the user names them, never because a file does."""

import hashlib
import importlib
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcli.base.errors import UsageError
from kdcli.base.text import first_line

SOURCES = ("torchvision", "timm", "module")  # see `models.external`
ALLOWED = "KD_NETWORKS"  # environment variable: functions that make networks and may be run, joined by commas
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_network(text: str) -> bool:
    """Whether a text names an external network: `torchvision:NAME` or a factory, with or without `:WEIGHTS`."""
    return ":" in text and (text.partition(":")[0] in SOURCES or is_name(":".join(text.split(":")[:2])))


def allow(*texts: str) -> None:
    """Allow the functions among names of networks, in this process and those it starts."""
    names = [":".join(text.split(":")[:2]) for text in texts]
    if named := list(filter(is_name, names)):
        os.environ[ALLOWED] = ",".join(dict.fromkeys([*allowed(), *named]))


def allowed() -> list[str]:
    return [name for name in os.environ.get(ALLOWED, "").split(",") if name]


def assignment() -> str:
    """Start of a printed command: the permission for the functions that this process may run."""
    return f"{ALLOWED}={shlex.quote(','.join(allowed()))} " if allowed() else ""


def is_name(text: str) -> bool:
    """Whether a text names a function, and no network of a source."""
    return _NAME.fullmatch(text) is not None and text.partition(":")[0] not in SOURCES


def is_own(arch: str) -> bool:
    """Whether a network is made by the user's code: a function, or a module passed from Python."""
    return is_name(arch) or is_module(arch)


def is_module(arch: str) -> bool:
    """Whether a network is a module passed from Python, which other processes do not know."""
    return arch.startswith("module:")


def load(name: str, owner: str, hint: str) -> Callable[..., Any]:
    """Import a function, searching the current folder last; a UsageError about `owner` if that fails."""
    if not is_name(name):
        raise UsageError(f"{owner} does not name a function", hint)
    module, function = name.split(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last: a file there shadows no other module
    importlib.invalidate_caches()  # the file may be younger than Python's listing of the folder
    try:
        found = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # anything that the module's code raises
        raise UsageError(f"{owner} cannot be imported: {first_line(error)}", hint) from error
    if not callable(found):
        raise UsageError(f"{owner} is not callable", hint)
    digest(name)
    return found


def digest(name: str) -> str:
    """SHA-256 of the module of an imported function; of one without a file (it is part of Python) that of nothing.

    A UsageError if it is not that of the first call since the import: the code in memory is older than the file.
    """
    module = sys.modules[name.partition(":")[0]]
    path = getattr(module, "__file__", None)
    found = hashlib.sha256(b"" if path is None else Path(path).read_bytes()).hexdigest()
    if vars(module.__spec__ or module).setdefault("kd_sha256", found) != found:
        raise UsageError(
            f"{path} changed since it was imported", "Start anew, or importlib.reload its module."
        )
    return found
