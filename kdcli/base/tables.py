"""Tables as text: CSV for programs, Markdown for a README. The terminal's are drawn by `cli.output.table`."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcli.base.errors import KdError
from kdcli.base.files import read_bytes
from kdcli.base.text import first_line, printable

_MOST_BYTES = 1 << 30
_FORMULA = ("=", "+", "-", "@")  # a spreadsheet computes a cell that begins so


def csv_lines(path: Path, hint: str) -> Iterator[tuple[str, list[str]]]:
    """Place, such as `a.csv, line 3`, and cells of each line that is not empty; a KdError if it cannot be read."""
    content = io.BytesIO(read_bytes(path, _MOST_BYTES, hint))
    try:
        lines = csv.reader(io.TextIOWrapper(content, "utf-8-sig", newline=""), strict=True)
        for cells in filter(any, lines):
            yield f"{path}, line {lines.line_num}", [cell.strip() for cell in cells]
    except (ValueError, csv.Error) as error:
        raise KdError(f"cannot read {path}: {first_line(error)}", hint) from error


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A header and one line a row; columns are the keys of the first row, `…_low` and `…_high` of an interval."""
    buffer = io.StringIO(newline="")
    lines = list(map(_csv_cells, rows))
    writer = csv.DictWriter(buffer, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def _csv_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    cells = {}
    for key, value in row.items():
        if key.endswith("_interval"):
            name = key.removesuffix("interval")
            cells[f"{name}low"], cells[f"{name}high"] = value or (None, None)
        else:
            cells[key] = csv_cell(value) if isinstance(value, str) else value
    return cells


def markdown_text(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)
) -> str:
    """A Markdown table, cells escaped; the columns numbered in `left` are set flush left, the others flush right."""
    ruler = [":--" if number in left else "--:" for number in range(len(columns))]
    lines = [list(map(markdown_cell, columns)), ruler, *(list(map(markdown_cell, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def csv_cell(text: str) -> str:
    """Printable text that no spreadsheet takes for a formula; spreadsheets skip white space before one."""
    text = printable(text)
    return "'" + text if text.lstrip().startswith(_FORMULA) else text


def markdown_cell(text: str) -> str:
    """Text without line breaks and markup."""
    plain = " ".join(printable(text).split())
    for mark in "\\`*_[]<>|":
        plain = plain.replace(mark, "\\" + mark)
    return plain
