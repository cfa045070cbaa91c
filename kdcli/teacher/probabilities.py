"""CSV files of probabilities by file name, as outputs of a teacher."""

import posixpath
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from kdcli.base.errors import KdError
from kdcli.base.tables import csv_lines
from kdcli.base.text import first_line
from kdcli.data import ImageSet
from kdcli.models import class_map

_FLOOR = 1e-7  # of probabilities, whose logarithms are the logits
_ROUNDED = 0.01  # difference of their sum from 1
_FORM = "The first line is file,CLASS,CLASS,…; each other line a file's name and its probabilities."


def logits_of(path: Path, sha256: str, data: ImageSet, map_file: Path | None) -> npt.NDArray[np.float32]:
    """Logits (N, classes) of the images, found by path below the data's folder, or by a name that no other has.

    A KdError for an image without a row. `sha256` is that of the file.
    """
    outputs, rows = _read(path, sha256)
    known = class_map.find(outputs, data.classes, map_file)
    if known is None:
        listed = ", ".join(outputs[:6])
        raise KdError(f"{path} has other classes than the data: {listed}", class_map.HINT)
    names = data.names or ["(not a file)"] * len(data)
    others = replace(data, name_bytes=data.other_names).names
    counts = Counter(map(posixpath.basename, [*names, *others]))
    pairs = [(name, posixpath.basename(name)) for name in names]
    chosen = [end if counts[end] == 1 and name not in rows else name for name, end in pairs]
    if missing := [name for name in chosen if name not in rows]:
        raise KdError(
            f"{path} has no row for {len(missing):,} of {len(data):,} images, as {missing[0]}",
            "Name each by its path below the data's folder, or by a file name that no other image has.",
        )
    values = np.log(np.maximum([rows[name] for name in chosen], _FLOOR))
    return known(torch.from_numpy(values)).float().numpy()


@lru_cache(maxsize=1)
def _read(path: Path, sha256: str) -> tuple[list[str], dict[str, npt.NDArray[np.float64]]]:
    """Names of the classes, and the probabilities of each file."""
    lines = csv_lines(path, _FORM)
    _, header = next(lines, ("", []))
    if len(header) < 3:
        raise KdError(f"{path} names no classes in its first line", _FORM)
    rows: dict[str, npt.NDArray[np.float64]] = {}
    for where, (name, *words) in lines:
        if len(words) != len(header) - 1:
            raise KdError(f"{where}: {len(words)} values for {len(header) - 1} classes", _FORM)
        try:
            values = np.array(words, np.float64)
        except ValueError as error:
            raise KdError(f"{where}: {first_line(error)}", _FORM) from error
        if not (values >= 0).all() or not abs(values.sum() - 1) <= _ROUNDED:
            raise KdError(
                f"{where}: probabilities must be 0 or more and sum to 1, these to {values.sum():.4g}", _FORM
            )
        if (place := posixpath.normpath(name)) in rows:
            raise KdError(f"{where}: {place} is there twice", "Leave one row for each file.")
        rows[place] = values
    return header[1:], rows
