"""Exceptions that are shown to the user as one line and a hint."""

import re

START = "Start with: kd demo"  # hint in a folder without data or models


class KdError(Exception):
    """An error with a hint at its remedy; the command line prints both and exits with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        if hint:
            self.add_note(f"hint: {hint}")  # below the message in a traceback


class UsageError(KdError):
    """Invalid command, option or setting."""

    exit_code = 2


class Interrupted(KdError):
    """Work stopped by Ctrl-C (130) or SIGTERM (143); finished parts are kept."""

    def __init__(self, message: str, hint: str = "", *, exit_code: int = 130) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was exhausted; torch raises RuntimeError for that, on CPU and GPU."""
    text = str(error) if isinstance(error, RuntimeError) else ""
    return isinstance(error, MemoryError) or bool(re.search("DefaultCPUAllocator|out of memory", text))
