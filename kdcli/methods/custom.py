"""Custom methods, `--method package.module:function`.

A custom method is code, and kd runs code only if it is named on the command line, never because a file names it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kdcli.base import code
from kdcli.base.errors import KdError, UsageError
from kdcli.base.text import first_line
from kdcli.methods.batch import Batch
from kdcli.methods.registry import ATTRIBUTE, METHODS, Method, summary_of

if TYPE_CHECKING:
    from torch import Tensor

    from kdcli.methods import TrainConfig

_HINT = "It is package.module:function; the function takes a kdcli.methods.Batch and returns a scalar tensor."


def is_custom(name: str) -> bool:
    """Whether a method, or one of those joined by `+`, is custom."""
    return ":" in name


def load(name: str) -> Method:
    """Import a function and make a method of it; UsageError if it is none."""
    module_name, _, function_name = name.partition(":")
    if function_name in METHODS:
        raise UsageError(
            f"--method {name}: kd has a method {function_name}", "Give the function another name."
        )
    function = code.load(name, f"--method {name}", _HINT)
    entry: Method = getattr(function, ATTRIBUTE, Method(function_name, function, summary_of(function)))
    return replace(
        entry,
        name=function_name,
        loss=_checked(name, function),
        source=module_name,
        tau=1.0 if entry.tau is None else entry.tau,
        fields={},  # its own settings are no options: they keep their defaults
        keywords={},
    )


def source_digests(name: str) -> dict[str, str]:
    """SHA-256 of the modules of the custom methods among those joined by `+`, which are imported."""
    found = {}
    for part in filter(is_custom, name.split("+")):
        load(part)
        found[part] = code.digest(part)
    return found


def check_typed(config: TrainConfig, typed: str | None, source: str) -> None:
    """Raise UsageError if only a file names a custom method, and not `typed`, `--method` of the command line."""
    if is_custom(config.method) and typed != config.method:
        raise UsageError(
            f"{source} names the custom method {config.method}, which runs only if the command line names it",
            f"If you trust its code, add --method {config.method}",
        )


def _checked(name: str, function: Callable[[Batch], Any]) -> Callable[[Batch], Tensor]:
    """The function with its errors as KdError and its result checked."""

    def loss(batch: Batch) -> Tensor:
        from torch import Tensor

        try:
            value = function(batch)
        except KdError:
            raise
        except Exception as error:
            raise KdError(
                f"method {name} failed: {type(error).__name__}: {first_line(error)}", "--debug shows where."
            ) from error
        if not isinstance(value, Tensor) or value.dim() != 0 or not value.is_floating_point():
            raise KdError(f"method {name} must return a scalar tensor", "Take the mean over the batch.")
        if batch.student_logits.requires_grad and not value.requires_grad:
            raise KdError(
                f"method {name} returns a value that does not depend on the student",
                "Compute it from batch.student_logits or batch.student_features, without detach().",
            )
        return value

    return loss
