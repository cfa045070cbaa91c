"""Results of operations: as plain values, and as a table of text or HTML."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import Field, ValidationError

from kdcli.base.text import printable

# Values of results that are read from files
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**53)]

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # columns and rows
_MOST_VALUES = 10  # of a sequence that is listed


def invalid(error: ValidationError) -> str:
    """The first problem that pydantic found: `epochs: Input should be …`."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: " * bool(place) + first["msg"].removeprefix("Value error, ")


class Result:
    """Base of results: `to_dict`, a table for `print`, the same for a notebook."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name, for `json.dumps`."""
        return asdict(cast(Any, self), dict_factory=_plain)

    def table(self) -> Table:
        """Columns and rows; by default a row for each value."""
        return ("", type(self).__name__), list(value_rows(self.to_dict()))

    def __str__(self) -> str:
        columns, rows = self.table()
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        lines = (map(str.ljust, map(printable, cells), widths) for cells in (columns, *rows))
        return "\n".join("  ".join(line).rstrip() for line in lines)

    def _repr_html_(self) -> str:
        columns, rows = self.table()
        lines = [_line("th", columns), *(_line("td", cells) for cells in rows)]
        return f"<table>{''.join(lines)}</table>"


def _plain(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value.as_posix() if isinstance(value, Path) else value for name, value in items}


def _line(tag: str, cells: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(printable(cell))}</{tag}>' for cell in cells)}</tr>"


def value_rows(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """A name and a text for each value, those of dictionaries as `name.key`; long sequences as their length."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield from value_rows(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        plain = len(value) <= _MOST_VALUES and not any(
            isinstance(part, dict | list | tuple) for part in value
        )
        yield name, ", ".join(map(value_text, value)) or "—" if plain else f"{len(value)} values"
    else:
        yield name, value_text(value)


def value_text(value: Any) -> str:
    """Text of a value in a table; of a float with four digits, a dash for None."""
    return "—" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
