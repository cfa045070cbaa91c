"""Text in a table's cell, wherever it comes from."""

from __future__ import annotations

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would compute what begins so


def csv_cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    return "'" + text if text.startswith(_FORMULA) else text


def markdown_cell(text: str) -> str:
    """Text that ends neither its cell nor its line, and is no markup."""
    plain = " ".join("".join(mark if mark.isprintable() else " " for mark in text).split())
    for mark in "\\`*_[]<>|":
        plain = plain.replace(mark, "\\" + mark)
    return plain
