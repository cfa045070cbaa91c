"""A method of the user's own: `--method package.module:function`.

That is code, and kd runs code only where it is named on the command line, never because a file names it.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kdcli.config import Ramp, TrainConfig
from kdcli.errors import KdError, UsageError
from kdcli.methods.batch import Batch
from kdcli.methods.objective import CE, Method

if TYPE_CHECKING:
    from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_ABOUT = "__kd_method__"


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
    """Say of a function what `Method` says of kd's own; without it, it has these defaults."""
    about = dict(locals())

    def mark(function: F) -> F:
        setattr(function, _ABOUT, about)
        return function

    return mark


def is_own(name: str) -> bool:
    """Whether a method, or one of several joined by `+`, is a function of the user's own."""
    return ":" in name


def load(name: str, taken: Collection[str]) -> Method:
    """Import a function and make a method of it; the current folder is searched, too.

    Args:
        taken: names of terms that it cannot have.

    Raises:
        UsageError: it cannot be imported, or is no function.
    """
    hint = (
        "It is package.module:function; the function takes a kdcli.methods.Batch and returns a scalar tensor."
    )
    if _NAME.fullmatch(name) is None:
        raise UsageError(f"--method {name} does not name a function", hint)
    module_name, function_name = name.split(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (Exception, SystemExit) as error:  # whatever the user's own code does
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(f"--method {name} cannot be imported: {told}", hint) from error
    if not callable(function):
        raise UsageError(f"--method {name} is no function", hint)
    if function_name in {*taken, CE}:
        raise UsageError(
            f"--method {name}: kd has a method {function_name}", "Give the function another name."
        )
    about = getattr(function, _ABOUT, None) or method()(lambda batch: batch).__dict__[_ABOUT]
    ce_weight, weight = float(about["ce_weight"]), float(about["weight"])
    rest = {key: value for key, value in about.items() if key not in ("ce_weight", "weight")}
    return Method(
        function_name,
        _checked(name, function),
        lambda config: ce_weight,
        lambda config: Ramp(weight, weight),
        (function.__doc__ or "of your own").strip().splitlines()[0],
        module_name,
        reads=("tau", "tau_end"),
        **rest,
    )


def _checked(name: str, function: Callable[[Batch], Any]) -> Callable[[Batch], Tensor]:
    def loss(batch: Batch) -> Tensor:
        from torch import Tensor

        try:
            value = function(batch)
        except KdError:
            raise
        except Exception as error:
            told = " ".join(str(error).split())[:200]
            raise KdError(
                f"method {name} failed: {type(error).__name__}: {told}", "--debug shows where."
            ) from error
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise KdError(f"method {name} must return a scalar tensor", "Take the mean over the batch.")
        return value

    return loss


def check_own_method(config: TrainConfig, typed: str | None, source: str) -> None:
    """Raise UsageError where a file names code and the user has not.

    Args:
        typed: `--method` of the command line.
        source: what names the method, for the message.
    """
    if is_own(config.method) and typed != config.method:
        raise UsageError(
            f"{source} names a method that is code, {config.method}, and kd runs none because a file says so",
            f"If it is yours, name it: --method {config.method}",
        )
