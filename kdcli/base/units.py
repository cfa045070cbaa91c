"""Human-readable quantities."""


def size(count: float) -> str:
    """Bytes, powers of 1000: `41.6 MB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def count(number: float) -> str:
    """A number with three significant digits: `967 k` for 966,986."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f}"
