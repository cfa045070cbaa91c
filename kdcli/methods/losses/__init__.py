"""Loss functions: pure, from tensors to a scalar. docs/methods.md lists deviations from the papers.

All are float32, or float64 where the student's side is: half types are promoted first, so call them outside autocast,
whose matrix products would be bfloat16 again. No gradient reaches the teacher's side, and no value is waited for.

Modules are imported at their first use, since they import torch, and `kd train --help` imports all methods.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdcli.methods.losses import contrast, features, logits

__all__ = ["contrast", "features", "logits"]


def __getattr__(name: str) -> ModuleType:
    if name not in __all__:
        raise AttributeError(name)
    return import_module(f"{__name__}.{name}")
