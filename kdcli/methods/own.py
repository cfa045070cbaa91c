"""A method of the user's own: `--method package.module:function`.

That is code, and kd runs code only where it is named on the command line, never because a file names it.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kdcli.base.config import Ramp
from kdcli.base.errors import KdError, UsageError
from kdcli.base.text import reason
from kdcli.methods.batch import Batch
from kdcli.methods.objective import CE, Method
from kdcli.methods.settings import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_ABOUT = "__kd_method__"
_HINT = "It is package.module:function; the function takes a kdcli.methods.Batch and returns a scalar tensor."


@dataclass(frozen=True)
class _About:
    """What is said of a function; see `Method`."""

    ce_weight: float = 0.0
    weight: float = 1.0
    tau: float = 1.0
    needs_teacher: bool = True
    needs_features: bool = False
    needs_labels: bool = False
    regresses: bool = False

    def __post_init__(self) -> None:
        for name in ("ce_weight", "weight", "tau"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"@method: {name} must be a number, 0 or more, not {value!r}")
        if not self.tau:
            raise ValueError("@method: tau must be above 0")
        if self.needs_features and not self.needs_teacher:
            raise ValueError("@method: features are the teacher's, too: needs_teacher must be true")


def method(
    *,
    ce_weight: float = 0.0,
    weight: float = 1.0,
    tau: float = 1.0,
    needs_teacher: bool = True,
    needs_features: bool = False,
    needs_labels: bool = False,
    regresses: bool = False,
) -> Callable[[F], F]:
    """Say of a function what `Method` says of kd's own; without it, it has these defaults.

    Raises:
        ValueError: a weight or temperature that cannot be.
    """
    about = _About(ce_weight, weight, tau, needs_teacher, needs_features, needs_labels, regresses)

    def mark(function: F) -> F:
        setattr(function, _ABOUT, about)
        return function

    return mark


def is_own(name: str) -> bool:
    """Whether a method is a function of the user's own."""
    return ":" in name


def any_own(name: str) -> bool:
    """Whether one of the methods joined by `+` is."""
    return any(is_own(part) for part in name.split("+"))


def load(name: str, taken: Collection[str]) -> Method:
    """Import a function and make a method of it; the current folder is searched, too.

    Args:
        taken: names of terms that it cannot have.

    Raises:
        UsageError: it cannot be imported, or is no function.
    """
    if _NAME.fullmatch(name) is None:
        raise UsageError(f"--method {name} does not name a function", _HINT)
    module_name, function_name = name.split(":")
    if function_name in {*taken, CE}:
        raise UsageError(
            f"--method {name}: kd has a method {function_name}", "Give the function another name."
        )
    try:
        with _current_folder_searched():
            function = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # whatever the user's own code does
        raise UsageError(f"--method {name} cannot be imported: {_told(error)}", _HINT) from error
    if not callable(function):
        raise UsageError(f"--method {name} is no function", _HINT)
    marked = getattr(function, _ABOUT, None)
    about = marked if isinstance(marked, _About) else _About()
    lines = str(function.__doc__ or "").strip().splitlines()
    ce_weight, weight = float(about.ce_weight), Ramp(float(about.weight), float(about.weight))
    return Method(
        function_name,
        _checked(name, function),
        lambda config: ce_weight,
        lambda config: weight,
        lines[0] if lines else "of your own",
        module_name,
        reads=("tau", "tau_end"),
        tau=float(about.tau),
        needs_teacher=bool(about.needs_teacher),
        needs_features=bool(about.needs_features),
        needs_labels=bool(about.needs_labels),
        regresses=bool(about.regresses),
    )


def source_sha256(name: str) -> str:
    """SHA-256 of the module that a function of the user's own is in; it is imported if need be.

    Of a module without a file of its own (it is part of Python) it is that of nothing.

    Raises:
        UsageError: it cannot be imported or read.
    """
    load(name, taken=())
    path = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    try:
        source = b"" if path is None else Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"--method {name}: cannot read {path}: {reason(error)}", _HINT) from error
    return hashlib.sha256(source).hexdigest()


def sources(name: str) -> dict[str, str]:
    """`source_sha256` of each of the methods joined by `+` that is the user's own."""
    return {part: source_sha256(part) for part in name.split("+") if is_own(part)}


@contextmanager
def _current_folder_searched() -> Iterator[None]:
    """Python looks in the current folder, after all else, and only meanwhile.

    A file there that is called like a module that kd imports must not be run in its place, nor one that is called
    like a module that kd would import if it were installed.
    """
    here = str(Path.cwd())
    sys.path.append(here)
    importlib.invalidate_caches()  # the file may be younger than Python's listing of the folder
    try:
        yield
    finally:
        with suppress(ValueError):  # the user's own code may have taken it off
            del sys.path[len(sys.path) - 1 - sys.path[::-1].index(here)]


def _told(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _checked(name: str, function: Callable[[Batch], Any]) -> Callable[[Batch], Tensor]:
    def loss(batch: Batch) -> Tensor:
        from torch import Tensor

        try:
            value = function(batch)
        except KdError:
            raise
        except Exception as error:
            raise KdError(
                f"method {name} failed: {type(error).__name__}: {_told(error)}", "--debug shows where."
            ) from error
        if not isinstance(value, Tensor) or value.dim() != 0 or not value.is_floating_point():
            raise KdError(f"method {name} must return a scalar tensor", "Take the mean over the batch.")
        if batch.student_logits.requires_grad and not value.requires_grad:
            raise KdError(
                f"method {name} returns what does not depend on the student",
                "Compute it from batch.student_logits or batch.student_features, without detach().",
            )
        return value

    return loss


def check_own_method(config: TrainConfig, typed: str | None, source: str) -> None:
    """Raise UsageError where a file names code and the user has not.

    Args:
        config: of a run or recipe.
        typed: `--method` of the command line.
        source: what names the method, for the message.
    """
    if any_own(config.method) and typed != config.method:
        raise UsageError(
            f"{source} names a method that is code, {config.method}, and kd runs none because a file says so",
            f"If it is yours, name it: --method {config.method}",
        )
