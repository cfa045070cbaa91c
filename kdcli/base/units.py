"""Human-readable quantities."""

from rich import filesize

size = filesize.decimal  # of bytes: `41.6 MB`


def count(number: float) -> str:
    """A number with three significant digits: `967 k` for 966,986."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * scale:  # rounded to three digits, `scale`
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f}"
