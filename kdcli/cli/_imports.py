"""Importing what is heavy, inside a command."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports() -> Iterator[None]:
    """Keep the garbage collector from looking through modules while they are made.

    torch makes a million objects that stay, and the collector would go through them a dozen times: a tenth of the
    import. Afterwards what has been imported is no longer looked at.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if (
            gc.get_freeze_count() == 0
        ):  # once: whoever calls commands as functions keeps the garbage between them
            gc.freeze()
        if collecting:
            gc.enable()
