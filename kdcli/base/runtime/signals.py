"""SIGINT and SIGTERM as a flag that long loops check."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopFlag:
    """True after the first SIGINT or SIGTERM; long loops check it between steps."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + signal number: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.signal or signal.SIGINT)


_active: list[StopFlag] = []  # of the main thread; at most one


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Turn the first SIGINT or SIGTERM into a flag, shared by nested calls; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield StopFlag()  # handlers can only be set in the main thread
        return
    if _active:
        yield _active[0]
        return
    flag = StopFlag()

    def note(number: int, frame: FrameType | None) -> None:
        if flag.signal is not None:
            os._exit(128 + number)
        flag.signal = number

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    _active.append(flag)
    try:
        yield flag
    finally:
        _active.clear()
        for number, handler in before.items():
            signal.signal(number, handler)
