"""kd: compress image classifiers by knowledge distillation. From Python `import kdcli as kd`, see `kdcli.api`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcli.api import (
        KdError,
        bench,
        compare,
        distill,
        evaluate,
        export,
        load_data,
        load_model,
        output,
        predict,
    )  # fmt: skip

__version__ = "0.1.0"
__all__ = (
    "KdError", "bench", "compare", "distill", "evaluate", "export", "load_data", "load_model", "output", "predict",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a name from `kdcli.api`, and with it torch, on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kdcli import api

    return getattr(api, name)
