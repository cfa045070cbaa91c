"""Short texts made from errors and shapes."""

from collections.abc import Sequence

_MAX_LINE = 200


def first_line(error: BaseException, most: int = _MAX_LINE) -> str:
    """First line of an error's message, or the error's type where there is no message."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:most]


def printable(text: str) -> str:
    """Text that cannot control a terminal: control characters (C0 and C1), direction marks and lone surrogates are
    replaced by spaces; line breaks stay.
    """
    if text.isprintable():
        return text
    return "".join(mark if mark.isprintable() or mark == "\n" else " " for mark in text)


def one_line(text: str, most: int) -> str:
    """Text as one printable line of at most so many characters."""
    line = " ".join(part.strip() for part in printable(text[: 2 * most]).splitlines()).strip()
    return line if len(line) <= most else line[: most - 1] + "…"


def reason(error: OSError) -> str:
    """The system's words for a failed operation: `No space left on device`."""
    return error.strerror or str(error)


def dims(shape: Sequence[int]) -> str:
    """(3, 32, 32) → `3×32×32`."""
    return "×".join(map(str, shape)) or "scalar"
