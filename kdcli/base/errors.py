"""The one exception a user sees."""


class KdError(Exception):
    """What went wrong, and what to do about it.

    The command line prints `error: message` and `hint: hint` and leaves with `exit_code`:
    1 the thing failed or a check did not hold, 2 wrong usage.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(KdError):
    """The command or its settings make no sense as given."""

    exit_code = 2


class Interrupted(KdError):
    """Ctrl-C (130) or SIGTERM (143) stopped long work; what was done is kept."""

    def __init__(self, message: str, hint: str = "", *, exit_code: int = 130) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code
